"""Uniform token noise: the first canvas, the fresh randomness of a step, and the corruption for training.

Sampling draws are keyed (see `kernels.random`): a pure function of (seed, choice, canvas, step, position,
block), so an answer depends on nobody who shares its batch. Training draws come from a generator. Knows no
network and no schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.kernels import DRAW_BLOCK
from dgemma.kernels.random import Stream, uniform, uniform_tokens

Word = int | Tensor
"""A number, or for R canvases at once a tensor `[R, 1]` (`[R, 1, 1]` for `draw_uniforms`): results begin with `[R]`."""

_TOKEN, _CHOICE = 0, 1  # the `block` word of the RENOISE stream: the fresh token, and the sampler's uniform


def first_canvas(
    seed: int, choice: int, canvas: int, width: int, vocab: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The prior, t = 1: `[C]` int64 ids, uniform over the whole vocabulary (as in HF: special tokens too)."""
    return uniform_tokens(vocab, Stream.FIRST, seed, choice, canvas, 0, _positions(width, device), 0)


def step_noise(
    seed: Word,
    choice: Word,
    canvas: Word,
    step: Word,
    width: int,
    vocab: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """What a sampler may use in one step: uniform tokens `[C]` int64 and uniforms `[C]` in [0, 1), float64.

    `step` counts down N..1; the two are independent of each other and of the draw.
    """
    key = (Stream.RENOISE, seed, choice, canvas, step, _positions(width, device))
    return uniform_tokens(vocab, *key, _TOKEN), uniform(*key, _CHOICE)


def draw_uniforms(
    seed: Word,
    choice: Word,
    canvas: Word,
    step: Word,
    width: int,
    vocab: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """What `kernels.vocab` turns into the step's draw: `[C, ceil(vocab / DRAW_BLOCK)]` float64 in [0, 1)."""
    blocks = torch.arange(-(-vocab // DRAW_BLOCK), device=device)
    return uniform(Stream.DRAW, seed, choice, canvas, step, _positions(width, device)[:, None], blocks)


def _positions(width: int, device: torch.device | str) -> Tensor:
    return torch.arange(width, device=device)


def corrupt(ids: Tensor, t: Tensor | float, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The forward process (arXiv 2608.00146, Eq. 11): each token of `ids` is replaced with probability t.

    `t` in [0, 1] is the noise level (0 clean, 1 the prior): one number, one per example `[B]`, or one per
    position; axes that it lacks are added on the right. Returns the noisy ids and the mask of replaced
    positions. The new token is uniform over the vocabulary: it may equal the old one and counts as replaced.
    """
    level = torch.as_tensor(t, dtype=torch.float32, device=ids.device)
    level = level.reshape(*level.shape, *(1,) * (ids.dim() - level.dim()))
    replaced = torch.rand(ids.shape, generator=generator, device=ids.device) < level
    fresh = torch.randint(vocab, ids.shape, generator=generator, device=ids.device, dtype=ids.dtype)
    return torch.where(replaced, fresh, ids), replaced
