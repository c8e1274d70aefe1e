"""`int8dyn`: eight-bit weights, and activations rounded to eight bits as they come. For speed: integer products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.kernels import native
from dgemma.quant.groups import filled_up
from dgemma.quant.int8wo import symmetric_scale
from dgemma.quant.protocol import Part, Shape, refuse_gradient

_ZERO = 128  # what stands for 0 among the unsigned activations; signed ones have no fast kernel in oneDNN


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic:
    """weight = code * scale with one scale a row. An activation row is rounded to 255 levels of its own scale.

    The product adds whole numbers, so a row's result cannot depend on what shares the batch. `head` is for a model
    whose entropies it leaves alone: see docs/quantize.md.
    """

    name: ClassVar[str] = "int8dyn"
    groups: ClassVar[tuple[int, ...]] = ()
    copies: ClassVar[bool] = True
    group: int | None = None
    head: bool = False

    def layout(self, shape: Shape) -> dict[str, Part]:
        return {"codes": Part(shape, torch.int8), "scale": Part((shape[0],), torch.float32)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        wide = weight.detach().float()
        scale = symmetric_scale(wide)
        return {"codes": (wide / scale).round_().to(torch.int8), "scale": scale.squeeze(-1)}

    def matrix(self, stored: Mapping[str, Tensor], shape: Shape) -> CompiledInt8Matrix | Int8DynamicMatrix:
        compiled = native.load() if stored["codes"].device.type == "cpu" else None
        if compiled is not None and compiled.multiplies(torch.int8, shape[1]):
            return CompiledInt8Matrix(stored["codes"], stored["scale"], compiled)
        return Int8DynamicMatrix(stored["codes"], stored["scale"])


class CompiledInt8Matrix:
    """The codes in panels of `native`'s own product, which rounds and multiplies without torch in between."""

    def __init__(self, codes: Tensor, scale: Tensor, compiled: native.Native) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._compiled = compiled
        self._panels, self._zero = compiled.pack_bytes(codes)
        self._scale = torch.nn.functional.pad(scale, (0, len(self._zero) - len(scale)))

    @property
    def nbytes(self) -> int:
        return self._panels.nbytes + self._scale.nbytes + self._zero.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        refuse_gradient(x)
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(rows.shape[0], self.shape[0])
        self.into(self.rounded(rows), out)
        return out.view(*x.shape[:-1], self.shape[0])

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._compiled.bytes_of(x.contiguous())

    def into(self, rounded: tuple[Tensor, Tensor], out: Tensor) -> None:
        self._compiled.multiply_bytes(rounded, self.shape[1], self._panels, self._zero, self._scale, out)

    def dense(self) -> Tensor:
        return native.weight_of(self._panels, *self.shape).float() * self._scale[: self.shape[0], None]


class Int8DynamicMatrix:
    """oneDNN's packed form of the codes on a CPU with byte dot products; the codes and float products elsewhere."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self._shape, self._scale = (codes.shape[0], codes.shape[1]), scale.clone()
        self._packed = has_byte_products(codes.device)
        self._codes = torch.ops.onednn.qlinear_prepack(codes, None) if self._packed else codes
        self._zeros = torch.zeros(codes.shape[0], dtype=torch.int32)

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def nbytes(self) -> int:
        return self._shape[0] * self._shape[1] + self._scale.nbytes + self._zeros.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        refuse_gradient(x)
        rows = x.reshape(-1, x.shape[-1])
        if not rows.shape[0]:
            return x.new_empty(*x.shape[:-1], self._shape[0])
        levels, step = round_rows(rows)
        out = self._product(filled_up(levels))[: rows.shape[0]]
        return out.mul_(step).to(x.dtype).view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        codes = self._codes.to_dense().t() if self._packed else self._codes
        return codes.float() * self._scale[:, None]

    def _product(self, levels: Tensor) -> Tensor:
        """Float32 `[T, out]` of unsigned `levels [T, in]`, without the rows' own steps."""
        if not self._packed:
            return kernels.linear(levels.float() - _ZERO, self._codes.float()) * self._scale
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, _ZERO, self._codes, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [T, in]` as unsigned levels, 128 for 0, and each row's step `[T, 1]` in float32: x = (level - 128) * step."""
    step = x.abs().amax(-1, keepdim=True).float().div_(127).clamp_min_(1e-30)
    # Cutting off after adding a half rounds; the sum stays within 1.5 .. 255.5.
    return (x * step.reciprocal()).add_(_ZERO + 0.5).to(torch.uint8), step


def has_byte_products(device: torch.device) -> bool:
    """Whether oneDNN multiplies unsigned by signed bytes fast and without overflow here (x86 with VNNI)."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_vnni") or able.get("avx_vnni"))
