"""p-values of random things by chi-square. Seeds are fixed, so a test passes always or never."""

from __future__ import annotations

import torch
from torch import Tensor

SURE = 1e-6
"""A p-value below this is a fault, not bad luck."""


def fits(counts: Tensor, probs: Tensor) -> float:
    """p-value that `counts [K]` come from `probs [K]`; cells that expect fewer than 10 are pooled.

    A count where the probability is zero gives 0.
    """
    counts, expected = counts.double(), probs.double() / probs.sum() * counts.sum()
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    live = expected > 0
    statistic = ((counts - expected)[live].square() / expected[live]).sum()
    return float(torch.special.gammaincc((live.sum() - 1).double() / 2, statistic / 2))


def uniformly(tokens: Tensor, vocab: int) -> float:
    """p-value that `tokens` are uniform over 0..vocab-1."""
    return fits(torch.bincount(tokens.flatten(), minlength=vocab), torch.ones(vocab))


def independent(left: Tensor, right: Tensor, bins: int = 16) -> float:
    """p-value that `left` and `right` `[...]` are uniform in [0, 1) and independent, by `bins`^2 cells."""
    cells = (left.flatten() * bins).long() * bins + (right.flatten() * bins).long()
    return uniformly(cells, bins * bins)
