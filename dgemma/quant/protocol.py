"""What a weight format is. It knows one matrix at a time; a stack of experts is as many matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dgemma.errors import ConfigError
from dgemma.kernels.matrix import Matrix
from dgemma.kernels.stacked import MatrixStack, Stacked

Shape = tuple[int, int]
"""Of a matrix: `(out, in)`."""


class Part(NamedTuple):
    """One of the tensors that stand for a matrix in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFormat(Protocol):
    """A frozen dataclass. `group` columns share a scale (None: the whole row); `groups` are those one may ask for.

    `copies` says that a matrix packs the stored tensors anew; else it multiplies by them as they lie in their file.
    """

    name: ClassVar[str]
    groups: ClassVar[tuple[int, ...]]
    copies: ClassVar[bool]

    def __init__(self, *, group: int | None = ...) -> None: ...

    @property
    def group(self) -> int | None: ...

    @property
    def head(self) -> bool:
        """Whether the product from hidden states to logits is of this format, too; the embedding never is."""

    def layout(self, shape: Shape) -> dict[str, Part]:
        """The tensors that `quantize` makes of a matrix of that shape, by name."""

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """A finite floating `weight [out, in]` in this format. The same bits on every machine of one kind."""

    def matrix(self, stored: Mapping[str, Tensor], shape: Shape) -> Matrix:
        """The product with what `quantize` made. Keeps the tensors, or a packed copy; never the dense matrix."""


@runtime_checkable
class StackedFormat(Protocol):
    """A format whose experts have a grouped product."""

    def stacked(self, stored: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Stacked: ...


def stack_of(
    weight_format: WeightFormat, stored: Mapping[str, Tensor], shape: tuple[int, int, int]
) -> Sequence[Matrix]:
    """A matrix an expert, of parts that have the experts' axis in front; kept as one where the format can do so."""
    singles = ({part: tensor[index] for part, tensor in stored.items()} for index in range(shape[0]))
    matrices = [weight_format.matrix(single, (shape[1], shape[2])) for single in singles]
    if isinstance(weight_format, StackedFormat):
        return MatrixStack(matrices, weight_format.stacked(stored, shape))
    return matrices


def refuse_gradient(x: Tensor) -> None:
    """A product with a quantised matrix has no derivative here: say so instead of training around it."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError("a quantised weight has no gradient: train the checkpoint it was made from, then quantise")
