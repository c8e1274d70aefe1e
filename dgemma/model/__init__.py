"""The network: two passes over one set of weights. Knows no cache, no sampler, no text."""

from dgemma.model.attention import Attend
from dgemma.model.backbone import DiffusionGemma

__all__ = ["Attend", "DiffusionGemma"]
