"""`fp8`: e4m3 weights, and activations rounded to e4m3 as they come. For GPUs; exact sums elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dgemma.kernels.scaled import E4M3, LARGEST, has_products, product, round_rows, to_codes
from dgemma.kernels.stacked import Stacked
from dgemma.quant.groups import multiply
from dgemma.quant.protocol import Part, Shape, refuse_gradient


@dataclass(frozen=True, kw_only=True)
class Fp8Dynamic:
    """weight = code * scale with one scale a row; an activation row is rounded to codes of its own scale.

    Products of codes are exact in float32 and are added in it, so nothing but the order of sums differs by device.
    """

    name: ClassVar[str] = "fp8"
    groups: ClassVar[tuple[int, ...]] = ()
    copies: ClassVar[bool] = False
    head: ClassVar[bool] = False
    group: int | None = None

    def layout(self, shape: Shape) -> dict[str, Part]:
        return {"codes": Part(shape, E4M3), "scale": Part((shape[0],), torch.float32)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        wide = weight.detach().float()
        scale = wide.abs().amax(-1).div_(LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        return {"codes": to_codes(wide / scale[:, None]), "scale": scale}

    def matrix(self, stored: Mapping[str, Tensor], shape: Shape) -> Fp8Matrix:
        return Fp8Matrix(stored["codes"], stored["scale"])

    def stacked(self, stored: Mapping[str, Tensor], shape: tuple[int, int, int]) -> Stacked:
        """The same parts of a stack of experts, for a grouped product."""
        return Stacked("fp8", shape, stored["codes"], stored["scale"])


class Fp8Matrix:
    """Codes `[out, in]`, scales `[out]`."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._codes, self._scale = codes, scale

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def joined(self, others: Sequence[Fp8Matrix]) -> Fp8Matrix:
        """One matrix of all outputs, so that rows are rounded once; all keep views of its codes and scales."""
        parts = [self, *others]
        heights = [part.shape[0] for part in parts]
        codes, scale = torch.cat([part._codes for part in parts]), torch.cat([part._scale for part in parts])
        for part, own, step in zip(parts, codes.split(heights), scale.split(heights), strict=True):
            part._codes, part._scale = own, step
        return Fp8Matrix(codes, scale)

    def __call__(self, x: Tensor) -> Tensor:
        refuse_gradient(x)
        rounded = self.rounded(x.reshape(-1, x.shape[-1]))
        return self._product(rounded, x.dtype).view(*x.shape[:-1], self.shape[0])

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return round_rows(x)

    def into(self, rounded: tuple[Tensor, Tensor], out: Tensor) -> None:
        out.copy_(self._product(rounded, out.dtype))

    def _product(self, rounded: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        codes, scale = rounded
        if has_products(codes.device, self.shape, dtype) and codes.shape[0]:
            return product(rounded, (self._codes, self._scale))
        sums = multiply(codes.float(), self.shape, self._wide)
        return (sums * self._scale * scale[:, None]).to(dtype)

    def _wide(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        return self._codes[begin:end].to(dtype)

    def dense(self) -> Tensor:
        return self._codes.float() * self._scale[:, None]
