"""Ragged batches of made-up canvases for the tests of samplers and stop rules, and their single rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from dgemma.diffusion.protocol import Noise, Rows, Stats

VOCAB = 11
T = TypeVar("T", Stats, Rows, Noise)


def random_batch(widths: Sequence[int], seed: int, levels: int = 6) -> tuple[Stats, Rows, Noise]:
    """Rows of the given widths with parameters of their own; few entropy `levels` make ties common.

    What stands on the padding is rubbish on purpose: NaN, infinities, ids out of range.
    """
    random = torch.Generator().manual_seed(seed)
    count, width = len(widths), torch.tensor(widths)
    shape = (count, int(width.max()))
    valid = torch.arange(shape[1]) < width[:, None]
    rubbish = torch.tensor([float("nan"), float("-inf"), float("inf"), -1.0])

    def ids() -> Tensor:
        chosen = torch.randint(VOCAB, shape, generator=random)
        return torch.where(valid, chosen, torch.randint(-9, 99, shape, generator=random))

    def real(values: Tensor) -> Tensor:
        return torch.where(valid, values, rubbish[torch.randint(4, shape, generator=random)].to(values.dtype))

    def level() -> Tensor:
        return torch.randint(levels, shape, generator=random) / 37

    steps = torch.randint(1, 9, (count,), generator=random)
    stats = Stats(
        entropy=real(level()),
        argmax=ids(),
        top_logprob=real(-level() * 4),
        draw=ids(),
        draw_logprob=real(-level() * 8),
    )
    rows = Rows(
        canvas=torch.where(torch.rand(shape, generator=random) < 0.3, stats.draw, ids()),
        valid=valid,
        width=width,
        step=1 + (torch.rand(count, generator=random) * steps).long(),
        steps=steps,
        entropy_bound=torch.rand(count, generator=random) / 3 + 1e-3,
        accept_confidence=torch.rand(count, generator=random),
        vocab=VOCAB,
    )
    return stats, rows, Noise(ids(), real(torch.rand(shape, generator=random, dtype=torch.float64)))


def take(value: T, row: int, width: int) -> T:
    """One row as a batch of its own, without padding."""
    cut = {}
    for field in fields(value):
        tensor = getattr(value, field.name)
        if isinstance(tensor, Tensor):
            cut[field.name] = tensor[row : row + 1, :width] if tensor.dim() == 2 else tensor[row : row + 1]
    return replace(value, **cut)
