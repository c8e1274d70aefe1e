"""A dense weight in the layout of the product that serves it: ours where the processor has AVX-512, else oneDNN's.

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
        self._weight = native.panels_of(weight) if self._ours else _reorder(weight.detach().contiguous(), _ROWS)

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
        elif rows.shape[0] == 1:  # oneDNN takes another kernel, and other bits, for one row
            out = _product(rows.expand(2, -1), self._weight, None, "none", [], "")[:1]
        else:
            out = _product(rows, self._weight, None, "none", [], "")
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self._shape[0])

    def dense(self) -> Tensor:
        return native.weight_of(self._weight, *self._shape) if self._ours else self._weight.to_dense()


_ROWS = 256  # oneDNN's layout depends on it only as a hint
_reorder = torch.ops.mkldnn._reorder_linear_weight.default
_product = torch.ops.mkldnn._linear_pointwise.default
