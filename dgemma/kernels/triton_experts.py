"""Experts on a GPU: grouped products for the few rows that each expert gets, in bfloat16, float32, FP8 and INT4.

Four launches: rows are listed by expert; gate and up together with the activation; down, times the router's weight;
the parts of each row added in the order of its ids. No sum depends on who else is in the batch, no atomics, nothing
waits for the host. A program holds 64 or more outputs of one expert against all its rows: the weight is the left side
of the product, so that it fills the tensor core's 64 rows and the expert's few rows cost no more than they are.
Axes: T tokens, k experts a token, S = T k slots, E experts, I inner width, H hidden.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgemma.kernels import reference, tuning
from dgemma.kernels.matrix import Matrix
from dgemma.kernels.stacked import Kind, Stacked, stacked_of
from dgemma.kernels.triton_norms import tracked
from dgemma.kernels.triton_types import activated, interpreted, narrow, narrow_e4m3

_SLOTS = 1024  # ids that a program of `_list_rows` reads at a time
_ADDED = 1024  # columns of a program that adds or rounds
_E4M3 = tl.constexpr(448.0)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a product is cut: `rows` of an expert, `outputs`, `inputs` (of INT4: bytes) at a time.

    By the formulas only `inputs` has a part in the order of a sum. INT4 takes less where a group or half a row ends.
    """

    rows: int = 32
    outputs: int = 64
    inputs: int = 64
    warps: int = 4
    stages: int = 4


def shipped_blocks(kind: Kind, dtype: torch.dtype) -> Blocks:
    """Not tuned; what fits shared memory and registers of an H100 (`tests/test_triton_compile.py`)."""
    if kind == "fp8":
        return Blocks(inputs=128)
    # Products without tensor cores keep more in registers.
    return Blocks(rows=16, outputs=32, inputs=32, stages=3) if dtype is torch.float32 else Blocks()


def blocks_of(weight: Stacked, dtype: torch.dtype) -> Blocks:
    """For experts whose gate and up are `weight`, and rows of that type: what was tuned here, or the shipped ones."""
    key = (*weight.shape, weight.kind, weight.group, str(dtype))
    return tuning.blocks("experts", key, shipped_blocks(weight.kind, dtype))


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor | Sequence[Matrix],
    down: Tensor | Sequence[Matrix],
) -> Tensor:
    """`reference.experts`. Matrices that lie apart, and gradients, take the reference itself."""
    first, second = stacked_of(gate_up), stacked_of(down)
    if first is None or second is None or tracked(x, weights, first.codes, second.codes):
        return reference.experts(x, weights, ids, gate_up, down)
    tokens, top_k = ids.shape
    count, both, size = first.shape
    inner = both // 2
    assert second.shape == (count, size, inner) and first.kind == second.kind and x.dim() == 2
    out = x.new_empty(tokens, size)
    if not tokens:
        return out
    blocks = blocks_of(first, x.dtype)
    ids, weights = ids.contiguous(), weights.contiguous()
    slots = tokens * top_k
    order = torch.empty(slots, dtype=torch.int32, device=x.device)
    starts = torch.empty(count + 1, dtype=torch.int32, device=x.device)
    _list_rows[(count,)](ids, order, starts, slots, BLOCK=_SLOTS)
    middle = x.new_empty(slots, inner)
    _multiply(_gate_up, x.contiguous(), first, (order, starts), middle, (inner, top_k), blocks)
    parts = x.new_empty(slots, size)
    _multiply(_down, middle, second, (order, starts), parts, (weights,), blocks)
    _add_slots[(tokens, triton.cdiv(size, _ADDED))](parts, out, size, TOP_K=top_k, BLOCK=_ADDED, WIDE=interpreted())
    return out


def _multiply(
    kernel: Any,
    x: Tensor,
    weight: Stacked,
    listed: tuple[Tensor, Tensor],
    out: Tensor,
    more: tuple[Any, ...],
    blocks: Blocks,
) -> None:
    """One grouped product `x -> out`; FP8 rounds the rows of x first."""
    count, columns = weight.shape[0], weight.shape[2]
    codes = weight.codes if weight.codes.is_contiguous() else weight.codes.contiguous()
    row_scale = scale = zero = x  # stands for what a kind does not have; never read
    if weight.kind == "fp8":
        assert weight.scale is not None
        x, row_scale = round_rows(x)
        scale = weight.scale.contiguous()
    elif weight.kind == "int4":
        assert weight.scale is not None and weight.zero is not None
        scale, zero = weight.scale.contiguous(), weight.zero.contiguous()
    width = codes.shape[2]
    inputs = inputs_of(weight, blocks)
    outputs = out.shape[1]
    kernel[(triton.cdiv(outputs, blocks.outputs), count)](
        x, row_scale, codes, scale, zero, *listed, out, *more, outputs,
        COLUMNS=columns, WIDTH=width, GROUP=weight.group, KIND=weight.kind, WIDE=interpreted(),
        ROWS=blocks.rows, OUTPUTS=blocks.outputs, INPUTS=inputs,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def inputs_of(weight: Stacked, blocks: Blocks) -> int:
    """Inputs of a block that lies in one group of columns, whichever half of a byte they are in (at least 16)."""
    inputs = blocks.inputs
    while weight.kind == "int4" and (weight.group % inputs or weight.codes.shape[2] % inputs):
        inputs //= 2
    return inputs


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`scaled.round_rows` in one launch."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        _round_rows[(x.shape[0],)](x, codes, scale, x.shape[1], BLOCK=_ADDED, WIDE=interpreted())
    return codes, scale


@triton.jit
def _list_rows(ids, order, starts, slots, BLOCK: tl.constexpr):
    """Slots of one expert, ascending, behind those of the experts before it; a program an expert."""
    expert = tl.program_id(0)
    before = 0
    for base in range(0, slots, BLOCK):
        at = base + tl.arange(0, BLOCK)
        before += tl.sum((tl.load(ids + at, mask=at < slots, other=expert) < expert).to(tl.int32), axis=0)
    tl.store(starts + expert, before)
    for base in range(0, slots, BLOCK):
        at = base + tl.arange(0, BLOCK)
        mine = tl.load(ids + at, mask=at < slots, other=-1) == expert
        place = before + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(order + place, at, mask=mine)
        before += tl.sum(mine.to(tl.int32), axis=0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts + expert + 1, before)


@triton.jit
def _gate_up(
    x, row_scale, codes, scale, zero, order, starts, out, inner, top_k, outputs,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """`out[place] = gelu(gate x) * (up x)` for every listed row of an expert; a program a block of its outputs."""
    expert = tl.program_id(1).to(tl.int64)
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = columns < outputs
    gates = expert * 2 * inner + tl.where(inside, columns, 0)
    for base in range(begin, end, ROWS):
        places = base + tl.arange(0, ROWS)
        live = places < end
        rows = tl.load(order + places, mask=live, other=0) // top_k
        gate = tl.zeros((OUTPUTS, ROWS), tl.float32)
        up = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for at in range(0, WIDTH, INPUTS):
            if KIND == "int4":
                low, low_sum = _rows_of(x, rows, live, at, COLUMNS, WIDTH, INPUTS, WIDE)
                high, high_sum = _rows_of(x, rows, live, at + WIDTH, COLUMNS, 2 * WIDTH, INPUTS, WIDE)
                gate = _add_int4(
                    gate, low, high, low_sum, high_sum, codes, scale, zero, gates, at, WIDTH, GROUP, INPUTS
                )
                up = _add_int4(
                    up, low, high, low_sum, high_sum, codes, scale, zero, gates + inner, at, WIDTH, GROUP, INPUTS
                )
            else:
                given, _ = _rows_of(x, rows, live, at, COLUMNS, WIDTH, INPUTS, WIDE)
                gate = _add(gate, given, codes, gates, at, WIDTH, INPUTS, WIDE)
                up = _add(up, given, codes, gates + inner, at, WIDTH, INPUTS, WIDE)
        if KIND == "fp8":
            steps = tl.load(row_scale + rows, mask=live, other=0.0)[None, :]
            gate *= tl.load(scale + gates)[:, None] * steps
            up *= tl.load(scale + gates + inner)[:, None] * steps
        value = activated(gate) * up
        tl.store(
            out + places.to(tl.int64)[None, :] * outputs + columns[:, None],
            narrow(value, out.dtype.element_ty, WIDE),
            mask=live[None, :] & inside[:, None],
        )


@triton.jit
def _down(
    x, row_scale, codes, scale, zero, order, starts, out, weights, outputs,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """`out[slot] = weight[slot] * (down x[place])`; a program a block of outputs of an expert."""
    expert = tl.program_id(1).to(tl.int64)
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = columns < outputs
    downs = expert * outputs + tl.where(inside, columns, 0)
    for base in range(begin, end, ROWS):
        places = base + tl.arange(0, ROWS)
        live = places < end
        total = tl.zeros((OUTPUTS, ROWS), tl.float32)
        for at in range(0, WIDTH, INPUTS):
            if KIND == "int4":
                low, low_sum = _rows_of(x, places, live, at, COLUMNS, WIDTH, INPUTS, WIDE)
                high, high_sum = _rows_of(x, places, live, at + WIDTH, COLUMNS, 2 * WIDTH, INPUTS, WIDE)
                total = _add_int4(
                    total, low, high, low_sum, high_sum, codes, scale, zero, downs, at, WIDTH, GROUP, INPUTS
                )
            else:
                given, _ = _rows_of(x, places, live, at, COLUMNS, WIDTH, INPUTS, WIDE)
                total = _add(total, given, codes, downs, at, WIDTH, INPUTS, WIDE)
        if KIND == "fp8":
            total *= tl.load(scale + downs)[:, None] * tl.load(row_scale + places, mask=live, other=0.0)[None, :]
        slots = tl.load(order + places, mask=live, other=0)
        value = total * tl.load(weights + slots, mask=live, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out + slots.to(tl.int64)[None, :] * outputs + columns[:, None],
            narrow(value, out.dtype.element_ty, WIDE),
            mask=live[None, :] & inside[:, None],
        )


@triton.jit
def _rows_of(
    x, rows, live, at, COLUMNS: tl.constexpr, END: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Columns at .. at + INPUTS of rows of x, turned `[INPUTS, ROWS]`, zero where there are none; and their sums."""
    inputs = at + tl.arange(0, INPUTS)
    there = (inputs < COLUMNS) & (inputs < END)
    values = tl.load(
        x + rows.to(tl.int64)[None, :] * COLUMNS + inputs[:, None], mask=there[:, None] & live[None, :], other=0.0
    )
    sums = tl.sum(values.to(tl.float32), axis=0)
    if WIDE:
        values = values.to(tl.float32)
    return values, sums


@triton.jit
def _add(total, given, codes, outputs, at, WIDTH: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr):
    inputs = at + tl.arange(0, INPUTS)
    values = tl.load(codes + outputs[:, None] * WIDTH + inputs[None, :], mask=(inputs < WIDTH)[None, :], other=0.0)
    if WIDE:
        values = values.to(tl.float32)
    # Hopper adds e4m3 products in fewer bits than float32 has: carry them over after every 128 inputs at the latest.
    exact: tl.constexpr = 128 if INPUTS > 128 else INPUTS
    return tl.dot(values, given, total, input_precision="ieee", max_num_imprecise_acc=exact)


@triton.jit
def _add_int4(
    total, low, high, low_sum, high_sum, codes, scale, zero, outputs, at,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Both halves of a block of bytes. Codes are exact in every type; scale and zero join after the sum of a group."""
    packed = tl.load(codes + outputs[:, None] * WIDTH + (at + tl.arange(0, INPUTS))[None, :])
    groups: tl.constexpr = 2 * WIDTH // GROUP
    first, second = outputs * groups + at // GROUP, outputs * groups + (at + WIDTH) // GROUP
    total += tl.dot((packed & 15).to(low.dtype), low, input_precision="ieee") * _wide(scale, first)[:, None]
    total += _wide(zero, first)[:, None] * low_sum[None, :]
    total += tl.dot((packed >> 4).to(high.dtype), high, input_precision="ieee") * _wide(scale, second)[:, None]
    total += _wide(zero, second)[:, None] * high_sum[None, :]
    return total


@triton.jit
def _wide(pointer, at):
    return tl.load(pointer + at).to(tl.float32)


@triton.jit
def _add_slots(parts, out, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A row's parts, added one by one in float32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        total += tl.load(parts + (token * TOP_K + slot) * size + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, narrow(total, out.dtype.element_ty, WIDE), mask=there)


@triton.jit
def _round_rows(x, codes, scale, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A row's codes and its scale; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    top = 0.0
    for base in range(0, size, BLOCK):
        columns = base + tl.arange(0, BLOCK)
        values = tl.load(x + row * size + columns, mask=columns < size, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(values), axis=0))
    step = tl.maximum(top / _E4M3, 1e-30)
    tl.store(scale + row, step)
    for base in range(0, size, BLOCK):
        columns = base + tl.arange(0, BLOCK)
        values = tl.load(x + row * size + columns, mask=columns < size, other=0.0).to(tl.float32) / step
        values = tl.minimum(tl.maximum(values, -_E4M3), _E4M3)
        tl.store(codes + row * size + columns, narrow_e4m3(values, WIDE), mask=columns < size)
