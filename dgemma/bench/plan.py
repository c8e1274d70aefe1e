"""What a model takes on a GPU by weight format, and whether it fits a card: arithmetic, nothing measured.

Weights are counted tensor by tensor as the formats lay them out. What a pass needs beside them is that of the Triton
kernels, none of which writes rows x vocabulary; what driver, context and allocator keep is an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch

from dgemma.cache.kv import kv_bytes
from dgemma.checkpoint.load import empty_model
from dgemma.checkpoint.quantized import part_shapes
from dgemma.config import EngineConfig, ModelConfig
from dgemma.engine.request import max_canvas
from dgemma.kernels import DRAW_BLOCK
from dgemma.quant import make_format
from dgemma.quant.sites import weight_sites

FORMATS: Mapping[str, str | None] = MappingProxyType({"bf16": None, "fp8": "fp8", "int4": "int4wo"})
"""Name in the plan -> weight format; None is plain bfloat16."""
CARDS = (24, 32, 80)
"""GiB of memory."""
RESERVE = 1 << 30
"""Bytes left to driver, context and allocator: assumed."""
_SIZE = 2  # bytes of bfloat16, which activations, keys and values have
_TOKENS = 1000


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One format on one card. `context` is the longest prompt and answer beside which all else fits; 0: none does.

    `context_fp8` is the same with keys and values in FP8.
    """

    card_gib: int
    format: str
    weights: int
    context: int
    context_fp8: int

    @property
    def fits(self) -> bool:
        return self.context > 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes. `weights` by format; `ring` of keys and values that no context makes longer; `kv_per_1000` beside it.

    `_fp8`: with the engine's `kv_cache_dtype="fp8"`.
    """

    weights: Mapping[str, int]
    ring: int
    ring_fp8: int
    kv_per_1000: int
    kv_per_1000_fp8: int
    workspace: Mapping[str, int]
    copy_per_1000: int
    copy_per_1000_fp8: int
    reserve: int
    fits: tuple[Fit, ...]

    def json(self) -> dict[str, Any]:
        fits = [{**asdict(fit), "fits": fit.fits} for fit in self.fits]
        return {**vars(self), "weights": dict(self.weights), "fits": fits}


def memory_plan(config: ModelConfig, cards: Sequence[int] = CARDS) -> Plan:
    """The plan of one request at a time, with keys and values in bfloat16, and in FP8 beside."""
    rows = max(EngineConfig().encode_chunk, max_canvas(config))  # what an engine of default settings takes on
    kinds = [_kept(config, rows, fp8) for fp8 in (False, True)]
    work = workspace(config, rows)
    weights = {name: weight_bytes(config, kind) for name, kind in FORMATS.items()}
    fits = []
    for card in cards:
        for name, size in weights.items():
            left = card * 2**30 - RESERVE - size - sum(work.values())
            context, context_fp8 = (_context(config, left - kind.ring, kind.token + kind.copied) for kind in kinds)
            fits.append(Fit(card_gib=card, format=name, weights=size, context=context, context_fp8=context_fp8))
    plain, fp8 = kinds
    return Plan(
        weights=weights,
        ring=plain.ring,
        ring_fp8=fp8.ring,
        kv_per_1000=plain.token * _TOKENS,
        kv_per_1000_fp8=fp8.token * _TOKENS,
        workspace=work,
        copy_per_1000=plain.copied * _TOKENS,
        copy_per_1000_fp8=fp8.copied * _TOKENS,
        reserve=RESERVE,
        fits=tuple(fits),
    )


def weight_bytes(config: ModelConfig, name: str | None) -> int:
    """Bytes of all weights in a format (None: bfloat16). What a format leaves alone is bfloat16."""
    model = empty_model(config)
    sites = {} if name is None else weight_sites(model)
    plain = {key: tensor.shape for key, tensor in model.state_dict().items() if key not in sites}
    total = sum(_SIZE * math.prod(shape) for shape in plain.values())
    if name is not None:
        kind = make_format(name)
        for shape in sites.values():
            total += sum(part.dtype.itemsize * math.prod(part.shape) for part in part_shapes(shape, kind).values())
    return total


def workspace(config: ModelConfig, rows: int) -> dict[str, int]:
    """Bytes that live at once in a pass of `rows` tokens, by what they are for."""
    stream = rows * config.hidden_size * _SIZE
    widest = max(config.num_heads * layer.head_dim for layer in config.layers)
    keys = max(layer.num_kv_heads * layer.head_dim for layer in config.layers)
    slots = rows * config.top_k_experts
    return {
        "stream": 4 * stream,  # residual, normed, and what both branches return
        "heads": 2 * rows * (widest + 2 * keys) * _SIZE,  # before and after norm and rotation
        "mlp": 3 * rows * config.intermediate_size * _SIZE,
        "experts": slots * (config.expert_size + config.hidden_size) * _SIZE,
        # The soft embedding is added up in float32; draws have a float64 a block of the vocabulary.
        "vocabulary": 2 * rows * config.hidden_size * 4 + rows * -(-config.vocab_size // DRAW_BLOCK) * 8,
    }


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Bytes of keys and values: of the rings; of a token beside them; and of a token in what a pass copies."""

    ring: int
    token: int
    copied: int


def _kept(config: ModelConfig, slack: int, fp8: bool) -> _Kept:
    window = config.sliding_window - 1 + slack
    # From where on the rings are full, a token costs what the full layers keep of it.
    ring_and_full = kv_bytes(config, torch.bfloat16, slack, window, fp8)
    token = kv_bytes(config, torch.bfloat16, slack, window + 1, fp8) - ring_and_full
    # A pass lays one full layer's keys and values beside its own. Codes are widened for it: when the values are, there
    # are the keys in bfloat16, and the values in float32 and in bfloat16.
    numbers = max((layer.num_kv_heads * layer.head_dim for layer in config.layers if layer.kind == "full"), default=0)
    return _Kept(ring=ring_and_full - token * window, token=token, copied=numbers * (2 * _SIZE + (4 if fp8 else 0)))


def _context(config: ModelConfig, left: int, per_token: int) -> int:
    """Tokens that `left` bytes hold; 0 if not even a canvas."""
    tokens = config.max_positions if not per_token else min(config.max_positions, left // per_token)
    return tokens if tokens >= config.canvas_length else 0
