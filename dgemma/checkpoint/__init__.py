"""Checkpoints in HF's format: find, check, load, save. Knows files and names, no text and no engine."""

from dgemma.checkpoint.load import Checkpoint, load_checkpoint
from dgemma.checkpoint.names import hf_name, our_name
from dgemma.checkpoint.save import save_checkpoint

__all__ = ["Checkpoint", "hf_name", "load_checkpoint", "our_name", "save_checkpoint"]
