"""How sure a canvas is of what it commits: kept up while it is denoised, told when it is decided. Knows no text."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgemma.diffusion.protocol import Stats


@dataclass(frozen=True, eq=False)
class Changes:
    """Of each position of a canvas `[C]`: how often its prediction changed, and the step (from 1) of the last time."""

    count: Tensor
    last: Tensor

    @staticmethod
    def start(canvas: Tensor) -> Changes:
        """Before the first step, whose prediction is no change of an earlier one."""
        return Changes(torch.full_like(canvas, -1), torch.zeros_like(canvas))

    def after(self, changed: Tensor, step: int | Tensor) -> Changes:
        """After step number `step`, which predicts something else where `changed [C]`; the first one everywhere."""
        return Changes(self.count + changed, torch.where(changed, step, self.last))


def confidence(changes: Changes, stats: Stats, row: int, count: int, certain: Collection[int]) -> dict[str, Any]:
    """The fields of `Committed` about its first `count` positions, from the stats of the deciding step.

    `certain` positions hold what was demanded of them.
    """
    entropy, top = (values[row, :count].tolist() for values in (stats.entropy, stats.top_logprob))
    for place in certain:
        if place < count:
            entropy[place] = top[place] = 0.0
    return {
        "entropy": tuple(entropy),
        "top_logprob": tuple(top),
        "revisions": tuple(changes.count[:count].tolist()),
        "last_change": tuple(changes.last[:count].tolist()),
    }
