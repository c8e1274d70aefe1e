"""Rotation on a GPU, alone and fused with the norms of query, key and value heads. Float32 inside.

Halves are paired, (i, i + D/2): a program holds both halves of its heads, so each number is read and written once.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgemma.kernels import reference
from dgemma.kernels.triton_norms import tracked
from dgemma.kernels.triton_types import interpreted, narrow

_AT_ONCE = 4096  # numbers of a program


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rope`."""
    if tracked(x):
        return reference.rope(x, cos, sin)
    count, dim = x.shape[-2:]
    flat = x.contiguous()
    out = torch.empty_like(flat)
    if x.numel():
        shape = (*x.shape[:-2], dim)
        _run(flat.view(-1, count * dim), [out], None, None, _table(cos, shape), _table(sin, shape), 0.0, (count, 0, 0))
    return out


def heads(
    packed: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    counts: tuple[int, int],
    has_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.heads` in one launch."""
    if tracked(packed, q_norm, k_norm):
        return reference.heads(packed, q_norm, k_norm, cos, sin, eps, counts, has_v)
    (queries, keys), dim = counts, cos.shape[-1]
    assert packed.dim() == 2 and packed.shape[1] == (queries + (2 if has_v else 1) * keys) * dim
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    q, k, v = (
        torch.empty(len(packed), heads, dim, dtype=packed.dtype, device=packed.device)
        for heads in (queries, keys, keys)
    )
    if len(packed):
        _run(packed, [q, k, v], q_norm, k_norm, cos, sin, eps, (queries, keys, keys), has_v)
    return q, k, v


def _table(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    return table.expand(shape).reshape(-1, shape[-1])


def _run(
    packed: Tensor,
    out: list[Tensor],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    counts: tuple[int, int, int],
    has_v: bool = True,
) -> None:
    """One program for a block of rows and one head. Without norm weights, only the rotation."""
    half = cos.shape[-1] // 2
    block = triton.next_power_of_2(half)
    rows = max(1, min(16, _AT_ONCE // (2 * block)))
    cos, sin = cos.contiguous(), sin.contiguous()
    q, k, v = out if len(out) == 3 else (out[0], out[0], out[0])
    _heads[(triton.cdiv(len(packed), rows), sum(counts))](
        packed, q if q_norm is None else q_norm.contiguous(), q if k_norm is None else k_norm.contiguous(),
        cos, sin, q, k, v, len(packed), packed.stride(0), eps, half,
        QUERIES=counts[0], KEYS=counts[1], HAS_V=has_v, NORM=q_norm is not None, ROWS=rows, BLOCK=block,
        WIDE=interpreted(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _heads(
    packed, q_norm, k_norm, cos, sin, q, k, v, rows, stride, eps, half,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HAS_V: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Heads 0 .. QUERIES + 2 KEYS - 1 are those of q, k and v; without v its heads read what k's read."""
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = at < half
    there = (row < rows) & inside
    source = head
    if not HAS_V:
        source = tl.where(head >= QUERIES + KEYS, head - KEYS, head)
    first = packed + row * stride + source * 2 * half + at
    left = tl.load(first, mask=there, other=0.0).to(tl.float32)
    right = tl.load(first + half, mask=there, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)
        scale = 1.0 / tl.sqrt(squares / (2 * half) + eps)[:, None]
        left, right = left * scale, right * scale
    if head < QUERIES + KEYS:
        if NORM:
            weight = q_norm if head < QUERIES else k_norm
            left *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            right *= tl.load(weight + half + at, mask=inside, other=0.0).to(tl.float32)
        # Both halves of a table are the same angles, but nothing here relies on it.
        near, far = row * 2 * half + at, row * 2 * half + half + at
        turned = left * _wide(cos, near, there) - right * _wide(sin, near, there)
        right = right * _wide(cos, far, there) + left * _wide(sin, far, there)
        left = turned
    if head < QUERIES:
        _write(q, row, head, QUERIES, half, at, there, left, right, WIDE)
    elif head < QUERIES + KEYS:
        _write(k, row, head - QUERIES, KEYS, half, at, there, left, right, WIDE)
    else:
        _write(v, row, head - QUERIES - KEYS, KEYS, half, at, there, left, right, WIDE)


@triton.jit
def _wide(pointer, at, there):
    return tl.load(pointer + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _write(out, row, head, HEADS: tl.constexpr, half, at, there, left, right, WIDE: tl.constexpr):
    place = out + (row * HEADS + head) * 2 * half + at
    tl.store(place, narrow(left, out.dtype.element_ty, WIDE), mask=there)
    tl.store(place + half, narrow(right, out.dtype.element_ty, WIDE), mask=there)
