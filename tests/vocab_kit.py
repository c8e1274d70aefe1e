"""Rows for the tests of the vocabulary op: hidden states peaked and flat, an embedding, temperatures, draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.kernels import DRAW_BLOCK
from dgemma.kernels.random import Stream, uniform
from dgemma.kernels.reference import VocabStats, vocab

CAP = 30.0


def uniforms(rows: int, size: int, seed: int = 0, block: int = DRAW_BLOCK) -> Tensor:
    return uniform(Stream.DRAW, seed, torch.arange(rows)[:, None], torch.arange(-(-size // block)))


def example(rows: int = 96, size: int = 1500, hidden: int = 24, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    embed = torch.randn(size, hidden, generator=random)
    states = torch.randn(rows, hidden, generator=random) * torch.linspace(0.01, scale, rows)[:, None]
    return states, embed, torch.linspace(0.4, 0.8, rows)


def run(states: Tensor, embed: Tensor, temperature: Tensor, **options: Tensor) -> VocabStats:
    noise = options.pop("noise", uniforms(len(states), len(embed)))
    return vocab(states, embed, CAP, temperature, noise, **options)
