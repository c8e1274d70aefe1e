"""A weight `[out, in]` in the form that its kernel wants: packed for a library, or quantised. A layer that has one
multiplies by it instead of by its parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

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


@runtime_checkable
class RoundingMatrix(Protocol):
    """A `Matrix` that rounds its rows first. What reads the same rows need round them only once."""

    shape: tuple[int, int]

    def rounded(self, x: Tensor) -> Any:
        """Rows `[T, in]` as `into` wants them."""

    def into(self, rounded: Any, out: Tensor) -> None:
        """Write the product `[T, out]` to `out`, which may be a slice of columns."""


@runtime_checkable
class JoiningMatrix(Protocol):
    """A `Matrix` that can be one with others of its kind: what reads the same rows is then one product."""

    def joined(self, others: Sequence[Self]) -> Matrix:
        """All outputs in order, these first. The matrices keep views of the memory that it has, so nothing is twice."""
