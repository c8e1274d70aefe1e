"""A dense weight in the layout that oneDNN wants, so that no product reorders it again. CPU, no gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class Packed:
    """A `Matrix` of float32 or bfloat16 `weight [out, in]`; the product accumulates in float32."""

    def __init__(self, weight: Tensor) -> None:
        self._shape = (weight.shape[0], weight.shape[1])
        self.nbytes = weight.nbytes
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.shape[0] != 1:
            out = _product(rows, self._weight, None, "none", [], "")
            return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)
        # oneDNN takes another kernel, and other bits, for one row.
        return _product(rows.expand(2, -1), self._weight, None, "none", [], "")[:1].view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        return self._weight.to_dense()


_ROWS = 256  # the layout depends on it only as a hint
_product = torch.ops.mkldnn._linear_pointwise.default
