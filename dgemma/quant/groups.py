"""Groups of columns that share a scale, and the product with a matrix that is decoded a panel at a time.

Decoding is little work beside the product at the 256 rows of a canvas. torch's products of packed weights
(`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`) are faster for one row, but take twice as long at 256 in
bfloat16, forty times as long in float32, and the first one crashed where the columns did not fill its vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.quant.protocol import Shape, refuse_gradient

_PANEL = 1 << 18  # weights decoded at a time: 1 MB in float32
_ROWS = 8

Decode = Callable[[int, int, torch.dtype], Tensor]
"""Rows `[begin:end]` of a matrix, `[end - begin, in]`, in that type."""


def group_count(columns: int, group: int | None) -> int:
    """How many groups cover a row; the last may be filled up with columns that do not exist."""
    return 1 if group is None else -(-columns // group)


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """`weight [out, in]` in float32 as `[out, groups, group]`, filled up with the row's last column."""
    count = group_count(weight.shape[1], group)
    lack = count * (group or weight.shape[1]) - weight.shape[1]
    wide = weight.detach().float()
    if lack:
        # A copy of a value that is there widens no group's range.
        wide = torch.cat([wide, wide[:, -1:].expand(-1, lack)], dim=1)
    return wide.reshape(weight.shape[0], count, -1)


def ungrouped(values: Tensor, columns: int) -> Tensor:
    """`[out, groups, group]` as `[out, columns]`, without gaps between rows."""
    return values.flatten(1)[:, :columns].contiguous()


def multiply(x: Tensor, shape: Shape, decode: Decode) -> Tensor:
    """`x [..., in]` times the matrix that `decode` gives rows of."""
    refuse_gradient(x)
    rows, columns = shape
    wide = filled_up(x.reshape(-1, columns))
    panels = -(-rows * columns // _PANEL)
    if panels <= 1:
        out = kernels.linear(wide, decode(0, rows, x.dtype))
    else:
        out = wide.new_empty(wide.shape[0], rows)
        height = -(-rows // panels)
        for begin in range(0, rows, height):
            end = min(begin + height, rows)
            out[:, begin:end] = kernels.linear(wide, decode(begin, end, x.dtype))
    return out[: x.shape[:-1].numel()].view(*x.shape[:-1], rows)


def filled_up(x: Tensor) -> Tensor:
    """Rows `[T, in]` and rows of zeros up to a multiple of 8.

    oneDNN compiles code for every number of rows that it meets, and keeps it: half a megabyte each. Experts get all.
    """
    lack = -x.shape[0] % _ROWS
    return x if not lack or x.shape[0] == 1 else torch.nn.functional.pad(x, (0, 0, 0, lack))
