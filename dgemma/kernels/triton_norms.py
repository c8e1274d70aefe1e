"""Row ops on a GPU: norms with what stands before and after them, and GELU. All sums and products in float32.

A program takes whole rows, so a row's bits depend on no other row. Gradients take the reference.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgemma.kernels import reference
from dgemma.kernels.triton_types import activated, interpreted, narrow

_AT_ONCE = 4096  # numbers of a program that takes several short rows


def tracked(*tensors: Tensor | None) -> bool:
    """Whether somebody wants gradients, which no kernel here gives."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    return reference.rms_norm(x, weight, eps) if tracked(x, weight) else scaled_norm(x, weight, eps, 1.0)


def scaled_norm(x: Tensor, weight: Tensor | None, eps: float, factor: float) -> Tensor:
    """`reference.rms_norm` times a factor, in one launch."""
    size = x.shape[-1]
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    block = triton.next_power_of_2(size)
    several = max(1, min(16, _AT_ONCE // block))
    _norm[(triton.cdiv(len(rows), several),)](
        rows, _flat(weight, x), out, len(rows), size, rows.stride(0), eps, factor,
        HAS_WEIGHT=weight is not None, ROWS=several, BLOCK=block, WIDE=interpreted(), num_warps=_warps(block),
    )  # fmt: skip
    return out


def middle(
    x: Tensor,
    attended: Tensor,
    post: Tensor,
    dense: Tensor,
    eps: float,
    mixed: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`reference.middle`."""
    if tracked(x, attended, post, dense, mixed, scale):
        return reference.middle(x, attended, post, dense, eps, mixed, scale)
    assert (mixed is None) == (scale is None)
    x, attended = _rows(x), _rows(attended)
    rows, size = x.shape
    out, for_dense = (torch.empty(rows, size, dtype=x.dtype, device=x.device) for _ in range(2))
    for_mixed, routed = (None, None) if mixed is None else (torch.empty_like(out), torch.empty_like(out))
    if rows:
        block = triton.next_power_of_2(size)
        _middle[(rows,)](
            x, attended, _flat(post, x), _flat(dense, x), _flat(mixed, x), _flat(scale, x),
            out, for_dense, for_dense if for_mixed is None else for_mixed, for_dense if routed is None else routed,
            size, x.stride(0), attended.stride(0), eps, size**-0.5,
            MOE=mixed is not None, BLOCK=block, WIDE=interpreted(), num_warps=_warps(block),
        )  # fmt: skip
    return out, for_dense, for_mixed, routed


def close(
    x: Tensor,
    dense: Tensor,
    mixed: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor],
    scalar: Tensor,
    following: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`reference.close`."""
    if tracked(x, dense, mixed, *weights, scalar, following):
        return reference.close(x, dense, mixed, weights, scalar, following, eps)
    x, dense = _rows(x), _rows(dense)
    other = dense if mixed is None else _rows(mixed)
    rows, size = x.shape
    out, normed = (torch.empty(rows, size, dtype=x.dtype, device=x.device) for _ in range(2))
    if rows:
        block = triton.next_power_of_2(size)
        _close[(rows,)](
            x, dense, other, *(_flat(weight, x) for weight in weights), scalar, _flat(following, x), out, normed,
            size, x.stride(0), dense.stride(0), other.stride(0), eps,
            MOE=mixed is not None, BLOCK=block, WIDE=interpreted(), num_warps=_warps(block),
        )  # fmt: skip
    return out, normed


def gelu(x: Tensor) -> Tensor:
    """`reference.gelu`."""
    if tracked(x):
        return reference.gelu(x)
    flat = x.contiguous()
    out = torch.empty_like(flat)
    if x.numel():
        block = 1024
        _gelu[(triton.cdiv(x.numel(), block),)](flat, out, x.numel(), BLOCK=block, WIDE=interpreted())
    return out


def geglu(packed: Tensor) -> Tensor:
    """`reference.geglu`."""
    if tracked(packed):
        return reference.geglu(packed)
    rows, size = _rows(packed), packed.shape[-1] // 2
    out = torch.empty(*packed.shape[:-1], size, dtype=packed.dtype, device=packed.device)
    if out.numel():
        block = 1024
        _geglu[(len(rows), triton.cdiv(size, block))](
            rows, out, size, rows.stride(0), BLOCK=block, WIDE=interpreted()
        )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """x as `[rows, size]` with neighbours in the last axis; rows may lie apart."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _flat(weight: Tensor | None, instead: Tensor) -> Tensor:
    """A weight without gaps; of what is not there, a pointer that nobody reads."""
    return instead if weight is None else weight.contiguous()


def _warps(block: int) -> int:
    return 8 if block >= 2048 else 4


@triton.jit
def _inverse(squares, size, eps, AXIS: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(squares, axis=AXIS) / size + eps)


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x, weight, out, rows, size, stride, eps, factor,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    there = (row < rows) & (at < size)
    values = tl.load(x + row * stride + at, mask=there, other=0.0).to(tl.float32)
    values *= _inverse(values * values, size, eps, 1)[:, None] * factor
    if HAS_WEIGHT:
        values *= tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + row * size + at, narrow(values, out.dtype.element_ty, WIDE), mask=there)


@triton.jit
def _read(pointer, at, there):
    return tl.load(pointer + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _normed(values, weight, at, there, size, eps):
    return values * _inverse(values * values, size, eps, 0) * _read(weight, at, there)


@triton.jit
def _middle(
    x, attended, post, dense, mixed, scale, out, for_dense, for_mixed, routed,
    size, x_stride, attended_stride, eps, factor,
    MOE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    kind: tl.constexpr = out.dtype.element_ty
    added = _normed(_read(attended + row * attended_stride, at, there), post, at, there, size, eps)
    stream = narrow(_read(x + row * x_stride, at, there) + added, kind, WIDE)
    tl.store(out + row * size + at, stream, mask=there)
    # The norms are of the stream as it is stored, not of what was rounded to it.
    values = stream.to(tl.float32)
    values *= _inverse(values * values, size, eps, 0)
    tl.store(for_dense + row * size + at, narrow(values * _read(dense, at, there), kind, WIDE), mask=there)
    if MOE:
        tl.store(for_mixed + row * size + at, narrow(values * _read(mixed, at, there), kind, WIDE), mask=there)
        tl.store(routed + row * size + at, narrow(values * _read(scale, at, there) * factor, kind, WIDE), mask=there)


@triton.jit
def _close(
    x, dense, mixed, dense_weight, mixed_weight, both_weight, scalar, following, out, normed,
    size, x_stride, dense_stride, mixed_stride, eps,
    MOE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    kind: tl.constexpr = out.dtype.element_ty
    both = _read(dense + row * dense_stride, at, there)
    if MOE:
        both = _normed(both, dense_weight, at, there, size, eps)
        both += _normed(_read(mixed + row * mixed_stride, at, there), mixed_weight, at, there, size, eps)
    added = _read(x + row * x_stride, at, there) + _normed(both, both_weight, at, there, size, eps)
    stream = narrow(added * tl.load(scalar).to(tl.float32), kind, WIDE)
    tl.store(out + row * size + at, stream, mask=there)
    values = _normed(stream.to(tl.float32), following, at, there, size, eps)
    tl.store(normed + row * size + at, narrow(values, kind, WIDE), mask=there)


@triton.jit(do_not_specialize=["count"])
def _gelu(x, out, count, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = activated(_read(x, at, at < count))
    tl.store(out + at, narrow(values, out.dtype.element_ty, WIDE), mask=at < count)


@triton.jit
def _geglu(packed, out, size, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    values = activated(_read(packed + row * stride, at, there)) * _read(packed + row * stride + size, at, there)
    tl.store(out + row * size + at, narrow(values, out.dtype.element_ty, WIDE), mask=there)
