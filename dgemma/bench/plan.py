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
    """One format on one card. `context` is the longest prompt and answer beside which all else fits; 0: none does."""

    card_gib: int
    format: str
    weights: int
    context: int

    @property
    def fits(self) -> bool:
        return self.context > 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes. `weights` by format; `ring` of keys and values that no context makes longer; `kv_per_1000` beside it."""

    weights: Mapping[str, int]
    ring: int
    kv_per_1000: int
    workspace: Mapping[str, int]
    copy_per_1000: int
    reserve: int
    fits: tuple[Fit, ...]

    def json(self) -> dict[str, Any]:
        fits = [{**asdict(fit), "fits": fit.fits} for fit in self.fits]
        return {**vars(self), "weights": dict(self.weights), "fits": fits}


def memory_plan(config: ModelConfig, cards: Sequence[int] = CARDS) -> Plan:
    """The plan of one request at a time, with keys and values in bfloat16."""
    engine = EngineConfig()
    rows = slack = max(engine.encode_chunk, max_canvas(config))  # what an engine of default settings takes on
    window = config.sliding_window - 1 + slack
    # From where on the rings are full, a token costs what the full layers keep of it.
    ring_and_full = kv_bytes(config, torch.bfloat16, slack, window)
    token = kv_bytes(config, torch.bfloat16, slack, window + 1) - ring_and_full
    ring = ring_and_full - token * window
    copied = _largest_layer(config)
    work = workspace(config, rows)
    weights = {name: weight_bytes(config, kind) for name, kind in FORMATS.items()}
    fits = []
    for card in cards:
        for name, size in weights.items():
            left = card * 2**30 - RESERVE - size - sum(work.values()) - ring
            per = token + copied
            context = config.max_positions if not per else min(config.max_positions, left // per)
            context = context if context >= config.canvas_length else 0
            fits.append(Fit(card_gib=card, format=name, weights=size, context=context))
    return Plan(
        weights=weights,
        ring=ring,
        kv_per_1000=token * _TOKENS,
        workspace=work,
        copy_per_1000=copied * _TOKENS,
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


def _largest_layer(config: ModelConfig) -> int:
    """Bytes a token of one full layer's keys and values, which a pass lays beside the canvas's own."""
    return max(
        (2 * layer.num_kv_heads * layer.head_dim * _SIZE for layer in config.layers if layer.kind == "full"), default=0
    )
