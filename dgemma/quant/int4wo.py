"""`int4wo`: four-bit weights in groups of columns. For memory: the product runs in the activations' type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dgemma.kernels.stacked import Stacked
from dgemma.quant.groups import group_count, grouped, multiply, ungrouped
from dgemma.quant.protocol import Part, Shape

_TOP = 15
# Shares of a group's range that its 16 levels may span: cutting off what lies far out makes the steps finer.
_SPANS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True, kw_only=True)
class Int4WeightOnly:
    """weight = code * scale + zero, codes in 0..15; scale and zero in bfloat16 (4 + 32 / group bits a weight).

    Two codes a byte: byte j of a row holds column j in its low half and column j + half the row in the high one.
    Of several spans of levels each group takes the one of the least squared error.
    """

    name: ClassVar[str] = "int4wo"
    groups: ClassVar[tuple[int, ...]] = (32, 64, 128)
    copies: ClassVar[bool] = False
    head: ClassVar[bool] = False
    group: int = 64

    def layout(self, shape: Shape) -> dict[str, Part]:
        rows, count = shape[0], group_count(shape[1], self.group)
        scale = Part((rows, count), torch.bfloat16)
        return {"codes": Part((rows, count * self.group // 2), torch.uint8), "scale": scale, "zero": scale}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        values = grouped(weight, self.group)
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        codes, scale, zero = _levels(values, low, high, _SPANS[0])
        error = _error(values, codes, scale, zero)
        for span in _SPANS[1:]:
            found = _levels(values, low, high, span)
            other = _error(values, *found)
            better = other < error
            codes, scale, zero = (
                torch.where(better, new, old) for new, old in zip(found, (codes, scale, zero), strict=True)
            )
            error = torch.where(better, other, error)
        first, second = codes.flatten(1).to(torch.uint8).chunk(2, dim=1)
        kinds = {"scale": scale.squeeze(-1).bfloat16(), "zero": zero.squeeze(-1).bfloat16()}
        return {"codes": first | (second << 4), **kinds}

    def matrix(self, stored: Mapping[str, Tensor], shape: Shape) -> Int4Matrix:
        return Int4Matrix(stored["codes"], stored["scale"], stored["zero"], shape)

    def stacked(self, stored: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Stacked:
        """The same parts of a stack of experts, for a grouped product."""
        return Stacked("int4", shape, stored["codes"], stored["scale"], stored["zero"], self.group)


def _levels(values: Tensor, low: Tensor, high: Tensor, span: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes for levels that span this share of the range, around its middle; scale and zero as they will be stored."""
    scale = ((high - low) * (span / _TOP)).clamp_min_(1e-30).bfloat16().float()
    zero = ((high + low) / 2 - scale * (_TOP / 2)).bfloat16().float()
    return ((values - zero) / scale).round_().clamp_(0, _TOP), scale, zero


def _error(values: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes * scale).add_(zero).sub_(values).square_().sum(-1, keepdim=True)


class Int4Matrix:
    """Packed codes `[out, groups * group / 2]`, scale and zero `[out, groups]`."""

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, shape: Shape) -> None:
        self._codes, self._scale, self._zero, self._shape = codes, scale, zero, shape

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes + self._zero.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return multiply(x, self._shape, self._decode)

    def dense(self) -> Tensor:
        return self._decode(0, self._shape[0], torch.float32)

    def _decode(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        packed, scale, zero = (part[begin:end] for part in (self._codes, self._scale, self._zero))
        codes = torch.stack([packed & _TOP, packed >> 4], dim=1).view(end - begin, scale.shape[1], -1).to(dtype)
        values = codes.mul_(scale[:, :, None].to(dtype)).add_(zero[:, :, None].to(dtype))
        return ungrouped(values, self._shape[1])
