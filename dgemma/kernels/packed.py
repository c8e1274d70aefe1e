"""A dense weight in the layout of the product that serves it: ours where `native` has one, else oneDNN's.
Some processors' oneDNN has no bfloat16: there rows and weight are widened for the moment of the product.

Ours is as fast as oneDNN's at the rows of a canvas and two to four times as fast at a few rows, where oneDNN spends its
time on the way to the product. CPU, no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.kernels import native


class Packed:
    """A `Matrix` of float32 or bfloat16 `weight [out, in]`; sums are float32."""

    def __init__(self, weight: Tensor) -> None:
        self._shape = (weight.shape[0], weight.shape[1])
        self.nbytes = weight.nbytes
        compiled = native.load()
        self._ours = compiled if compiled is not None and compiled.multiplies(weight.dtype, weight.shape[1]) else None
        self._widened = not self._ours and weight.dtype is torch.bfloat16 and not has_bfloat16()
        if self._ours:
            self._weight = native.panels_of(weight)
        else:
            plain = weight.detach().contiguous()
            self._weight = plain if self._widened else _reorder(plain, _ROWS)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def panels(self) -> Tensor | None:
        """The packed weight, if the product is ours."""
        return self._weight if self._ours else None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if self._ours is not None:
            out = self._ours.multiply(rows.contiguous(), self._weight, self._shape[0])
        elif self._widened:
            # torch's own product would take four times as long as this one with its copies.
            out = invariant(rows.float(), self._weight.float()).to(x.dtype)
        else:
            out = invariant(rows, self._weight)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self._shape[0])

    def dense(self) -> Tensor:
        if self._ours:
            return native.weight_of(self._weight, *self._shape)
        return self._weight if self._widened else self._weight.to_dense()


def invariant(rows: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of `rows [T, in]`; it takes another kernel, and other bits, for one row, so that is made two."""
    single = rows.shape[0] == 1
    out: Tensor = _product(rows.expand(2, -1) if single else rows, weight, None, "none", [], "")
    return out[:1] if single else out


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies it on this processor: not without AVX-512 or AVX-NE-CONVERT."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


_ROWS = 256  # oneDNN's layout depends on it only as a hint
_reorder = torch.ops.mkldnn._reorder_linear_weight.default
_product = torch.ops.mkldnn._linear_pointwise.default
