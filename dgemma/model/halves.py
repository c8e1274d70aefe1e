"""Rows of both halves in one pass: clean rows first, then canvas rows. Where they part, for stacks of packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Norms = tuple[Tensor | None, Tensor | None, Tensor]
Close = Callable[[Tensor, Tensor, Tensor | None, Norms, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""As `kernels.close`."""


def close_halves(
    close: Close,
    x: Tensor,
    dense: Tensor,
    mixed: Tensor | None,
    norms: Norms,
    scalars: tuple[Tensor, Tensor],
    clean: int,
    following: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`close` with the first of `scalars` for the first `clean` rows, and the second for the others."""
    if not clean:
        return close(x, dense, mixed, norms, scalars[1], following, eps)
    outs, normed = [], []
    for rows, scalar in zip((slice(clean), slice(clean, None)), scalars, strict=True):
        part = close(x[rows], dense[rows], None if mixed is None else mixed[rows], norms, scalar, following, eps)
        outs.append(part[0])
        normed.append(part[1])
    return torch.cat(outs), torch.cat(normed)
