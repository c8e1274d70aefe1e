"""The matrices of all experts of a layer as one piece of memory: what a grouped product takes in place of a list.

Knows how the parts of a format lie in memory, not how they were made (that is `quant`'s).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor

from dgemma.kernels.matrix import Matrix

Kind = Literal["plain", "fp8", "int4"]


@dataclass(frozen=True, eq=False)
class Stacked:
    """E matrices `[out, in]`, one behind the other.

    plain: `codes [E, out, in]` are the weights. fp8: codes of e4m3, `scale [E, out]` float32. int4: two codes a byte as
    `quant.int4wo` packs them, `scale, zero [E, out, groups]` of `group` columns each.
    """

    kind: Kind
    shape: tuple[int, int, int]
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    group: int = 0


class MatrixStack(Sequence[Matrix]):
    """A matrix an expert, each a view of the stack, and the stack itself."""

    def __init__(self, matrices: Sequence[Matrix], stacked: Stacked) -> None:
        assert len(matrices) == stacked.shape[0]
        self._matrices, self.stacked = list(matrices), stacked

    def __len__(self) -> int:
        return len(self._matrices)

    @overload
    def __getitem__(self, index: int) -> Matrix: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Matrix]: ...
    def __getitem__(self, index: int | slice) -> Matrix | Sequence[Matrix]:
        return self._matrices[index]

    def __iter__(self) -> Iterator[Matrix]:
        return iter(self._matrices)


def stacked_of(weights: Tensor | Sequence[Matrix]) -> Stacked | None:
    """The stack of what `kernels.experts` takes; None for a list of matrices that lie apart."""
    if isinstance(weights, Tensor):
        return Stacked("plain", (weights.shape[0], weights.shape[1], weights.shape[2]), weights)
    return weights.stacked if isinstance(weights, MatrixStack) else None
