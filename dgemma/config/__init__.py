"""Frozen configuration: the model's shape, what one request asks for, how much an engine takes on.

The only place that knows the field names of Hugging Face's `config.json` and `generation_config.json`.
"""

from dgemma.config.checks import is_whole
from dgemma.config.engine import EngineConfig
from dgemma.config.generation import BAN, Convention, GenerationConfig, Mode, Narrow
from dgemma.config.model import LayerConfig, LayerKind, ModelConfig, RopeConfig, token_ids

__all__ = [
    "BAN",
    "Convention",
    "EngineConfig",
    "GenerationConfig",
    "LayerConfig",
    "LayerKind",
    "Mode",
    "ModelConfig",
    "Narrow",
    "RopeConfig",
    "is_whole",
    "token_ids",
]
