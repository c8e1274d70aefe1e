"""A weight `[out, in]` in the form that its kernel wants: packed for a library, or quantised. A layer that has one
multiplies by it instead of by its parameter."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Matrix(Protocol):
    """A linear map. As everywhere, a row's result is the same bits whatever other rows are there."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""

    @property
    def nbytes(self) -> int:
        """What it keeps in memory."""

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., in] -> [..., out]` in x's type."""

    def dense(self) -> Tensor:
        """The map as a plain tensor `[out, in]`: what the product equals up to rounding."""
