"""`mode="ar"`: the encoder as an ordinary language model; the last hidden state gives the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.kernels import DRAW_BLOCK
from dgemma.kernels.random import Stream, uniform
from dgemma.kernels.reference import draw_tokens


def next_tokens(logits: Tensor, configs: Sequence[GenerationConfig], positions: Sequence[int]) -> list[int]:
    """One token per row of float32 `logits [R, V]`; `positions` are the absolute positions it will stand at.

    temperature 0 is the argmax, ties to the lowest id. Otherwise logits are divided by the temperature, then
    cut to `top_k` and, of what is left, to the smallest set of probability `top_p`. Draws are keyed by (seed,
    choice, position).
    """
    argmax = _greedy(logits)
    if all(config.temperature == 0 for config in configs):
        return argmax.tolist()
    shaped = torch.stack([_shape(row, config) for row, config in zip(logits, configs, strict=True)])
    blocks = torch.arange(-(-logits.shape[-1] // DRAW_BLOCK), device=logits.device)
    uniforms = torch.stack(
        [
            uniform(Stream.AR, config.seed, config.choice, 0, 0, position, blocks)
            for config, position in zip(configs, positions, strict=True)
        ]
    )
    temperature = torch.tensor([config.temperature for config in configs], device=logits.device)
    return draw_tokens(shaped, argmax, uniforms, temperature, None).tolist()


def laws(logits: Tensor, config: GenerationConfig) -> Tensor:
    """What `next_tokens` draws from, as float64 probabilities `[R, V]`, for rows of one configuration."""
    if config.temperature == 0:
        return torch.nn.functional.one_hot(_greedy(logits), logits.shape[-1]).double()
    wide = torch.stack([_shape(row, config) for row in logits]).double()
    return torch.softmax((wide - wide.amax(dim=-1, keepdim=True)) / config.temperature, dim=-1)


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row; ties to the lowest id."""
    vocab = logits.shape[-1]
    ids = torch.arange(vocab, device=logits.device)
    return torch.where(logits == logits.amax(dim=-1, keepdim=True), ids, vocab).amin(dim=-1)


def _shape(logits: Tensor, config: GenerationConfig) -> Tensor:
    """`logits [V]` with what top_k and top_p exclude at minus infinity; top_k keeps what equals its last."""
    if config.temperature == 0:
        return logits
    if 0 < config.top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -math.inf)
    if config.top_p < 1.0:
        ranked, order = logits.sort(descending=True, stable=True)
        probs = torch.softmax((ranked / config.temperature).double(), dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= config.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(0, order, outside), -math.inf)
    return logits
