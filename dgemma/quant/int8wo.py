"""`int8wo`: eight-bit weights, activations as they are. For memory: the product runs in the activations' type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dgemma.quant.groups import group_count, grouped, multiply, ungrouped
from dgemma.quant.protocol import Part, Shape


@dataclass(frozen=True, kw_only=True)
class Int8WeightOnly:
    """weight = code * scale, codes in -127..127, one scale for each group of columns or (None) for the row."""

    name: ClassVar[str] = "int8wo"
    groups: ClassVar[tuple[int, ...]] = (32, 64, 128)
    copies: ClassVar[bool] = False
    head: ClassVar[bool] = False
    group: int | None = None

    def layout(self, shape: Shape) -> dict[str, Part]:
        count = group_count(shape[1], self.group)
        codes = (shape[0], count * (self.group or shape[1]))
        return {"codes": Part(codes, torch.int8), "scale": Part((shape[0], count), torch.float32)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        values = grouped(weight, self.group)
        scale = symmetric_scale(values)
        codes = (values / scale).round_().to(torch.int8)
        return {"codes": codes.flatten(1), "scale": scale.squeeze(-1)}

    def matrix(self, stored: Mapping[str, Tensor], shape: Shape) -> Int8Matrix:
        return Int8Matrix(stored["codes"], stored["scale"], shape)


def symmetric_scale(values: Tensor) -> Tensor:
    """Maps the last axis' largest magnitude to 127; never 0."""
    return values.abs().amax(-1, keepdim=True).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)


class Int8Matrix:
    """Codes `[out, groups * group]`, scales `[out, groups]`."""

    def __init__(self, codes: Tensor, scale: Tensor, shape: Shape) -> None:
        self._codes, self._scale, self._shape = codes, scale, shape

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if self._codes.shape[1] != self._shape[1] or self._scale.shape[1] > 1:
            return multiply(x, self._shape, self._decode)
        # Codes are exact in every float type; one scale a row can wait until after the sum.
        return multiply(x, self._shape, self._plain) * self._scale.squeeze(1).to(x.dtype)

    def dense(self) -> Tensor:
        return self._decode(0, self.shape[0], torch.float32)

    def _plain(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        return self._codes[begin:end].to(dtype)

    def _decode(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        scale = self._scale[begin:end, :, None].to(dtype)
        codes = self._plain(begin, end, dtype).unflatten(1, (scale.shape[1], -1))
        return ungrouped(codes.mul_(scale), self._shape[1])
