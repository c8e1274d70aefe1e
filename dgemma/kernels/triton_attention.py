"""Attention on a GPU: canvas queries over a stored prefix and the canvas, or spans of keys; no mask tensor, no copies.

A program takes a block of (query, head) rows that read the same key head, and goes over its share of the keys with a
running maximum. Keys may be cut into shares so that a few rows fill the device; a second launch adds the shares up in
order. How keys are cut depends on their number only, never on who else is in the batch. A store of e4m3 codes is
widened in registers: a key's scale multiplies its scores, a value's its weight.
Axes: T queries, Q heads, S keys, K key heads, G = Q / K heads that share keys, D head dim.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgemma.kernels import reference, tuning
from dgemma.kernels.reference_attention import Scales
from dgemma.kernels.triton_norms import tracked
from dgemma.kernels.triton_types import interpreted, narrow


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """`rows` (query, head) pairs against `keys` at a time; a share has `share` keys, a multiple of `keys`."""

    rows: int
    keys: int
    share: int = 640
    warps: int = 4
    stages: int = 2


def blocks_of(dim: int, dtype: torch.dtype) -> Blocks:
    """What was tuned here, or the shipped ones."""
    return tuning.blocks("attention", (dim, str(dtype)), shipped_blocks(dim, dtype))


def shipped_blocks(dim: int, dtype: torch.dtype) -> Blocks:
    """Not tuned; what fits shared memory and registers of an H100 (`tests/test_triton_compile.py`)."""
    wide = dtype is torch.float32
    if dim <= 128:
        return Blocks(rows=32, keys=32) if wide else Blocks(rows=64, keys=64)
    if dim <= 256:
        return Blocks(rows=32, keys=32) if wide else Blocks(rows=64, keys=32, warps=8)
    return Blocks(rows=16, keys=16, warps=8) if wide else Blocks(rows=32, keys=32, warps=8)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, spans: Tensor | None = None) -> Tensor:
    """`reference.attention`. Masks that no `spans` describe, batches and gradients take the reference."""
    if (mask is not None and spans is None) or q.dim() != 3 or tracked(q, k, v):
        return reference.attention(q, k, v, mask, spans)
    return _run(q, None, (k, v), 0, k.shape[0], spans=spans)


def canvas_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    old_k: Tensor,
    old_v: Tensor,
    start: int,
    count: int,
    scales: Scales = None,
    where: Tensor | None = None,
) -> Tensor:
    """`reference.canvas_attention`: the store is read where it lies, whichever slot its tokens begin at.

    With `where`, `count` says how many shares there are; those behind the last key add nothing, not even to a last bit.
    """
    if tracked(q, k, v, old_k, old_v) or (scales is not None and not _reads_codes(q.device)):
        return reference.canvas_attention(q, k, v, old_k, old_v, start, count, scales, where)
    return _run(q, (k, v), (old_k, old_v), start, count, scales, where)


def stored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    count: int,
    spans: Tensor | None = None,
    scales: Scales = None,
    where: Tensor | None = None,
) -> Tensor:
    """`reference.stored_attention`: read where it lies, too. Blocks of keys are counted from the first one."""
    if tracked(q, k, v) or (scales is not None and not _reads_codes(q.device)):
        return reference.stored_attention(q, k, v, start, count, spans, scales, where)
    return _run(q, None, (k, v), start, count, scales, where, spans)


def _reads_codes(device: torch.device) -> bool:
    """Triton has no e4m3 below compute capability 8.9."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _run(
    q: Tensor,
    fresh: tuple[Tensor, Tensor] | None,
    store: tuple[Tensor, Tensor],
    start: int,
    count: int,
    scales: Scales = None,
    where: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    """Queries that see `count` keys of the store, each those of its span, and all `fresh` ones."""
    tokens, heads, dim = q.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    more = 0 if fresh is None else fresh[0].shape[0]
    q, k, v, old_k, old_v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, *(fresh or (q, q)), *store))
    keys = old_k.shape[1]
    groups, width = heads // keys, max(16, triton.next_power_of_2(dim))
    blocks = blocks_of(dim, q.dtype)
    shares = triton.cdiv(count + more, blocks.share)
    if shares > 1:
        parts = torch.empty(shares, tokens, heads, dim, dtype=torch.float32, device=q.device)
        weights = torch.empty(2, shares, tokens, heads, dtype=torch.float32, device=q.device)
    else:
        parts = weights = out
    spans = spans if spans is None else spans.contiguous()
    k_scale, v_scale = (q, q) if scales is None else (scale.contiguous() for scale in scales)
    _attend[(triton.cdiv(tokens * groups, blocks.rows), keys, shares)](
        q, k, v, old_k, old_v, k_scale, v_scale, q if spans is None else spans, q if where is None else where,
        parts, weights, tokens, more, start, count, max(1, old_k.shape[0]),
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *old_k.stride()[:2], *old_v.stride()[:2],
        GROUPS=groups, KEYS=keys, DIM=dim, WIDTH=width, CODES=scales is not None, SPANS=spans is not None,
        ASKS=where is not None, FRESH=fresh is not None, SPLIT=shares > 1, ROWS=blocks.rows, AT_ONCE=blocks.keys,
        SHARE=blocks.share, WIDE=interpreted(), num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if shares > 1:
        _add[(tokens, heads)](
            parts, weights, out, shares, tokens * heads, dim, WIDTH=width, WIDE=interpreted(), num_warps=1
        )
    return out


# Numbers that change from call to call: no variant of a kernel for each that happens to be 1 or a multiple of 16.
_VARYING = ["tokens", "fresh", "start", "count", "slots", "shares", "size"]


@triton.jit(do_not_specialize=_VARYING)
def _attend(
    q, k, v, old_k, old_v, k_scale, v_scale, spans, where, out, weights, tokens, fresh, start, count, slots,
    q_token, q_head, k_token, k_head, v_token, v_head, old_k_token, old_k_head, old_v_token, old_v_head,
    GROUPS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CODES: tl.constexpr,
    SPANS: tl.constexpr, ASKS: tl.constexpr, FRESH: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr, SHARE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row i of a block is query i // GROUPS under head i % GROUPS of the key head's group."""
    if ASKS:
        start, count = tl.load(where).to(tl.int32), tl.load(where + 1).to(tl.int32)
    key_head, share = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // GROUPS).to(tl.int64), key_head * GROUPS + row % GROUPS
    live, dims = token < tokens, tl.arange(0, WIDTH)
    queries = tl.load(
        q + token[:, None] * q_token + head[:, None] * q_head + dims[None, :],
        mask=live[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip
    if WIDE:
        queries = queries.to(tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    # Keys are numbered through: the store's `count` first, then the fresh ones, which have no spans.
    begin = share * SHARE
    end = tl.minimum(begin + SHARE, count + fresh)
    old_begin, old_end = begin, tl.minimum(end, count)
    first, last = tl.zeros((ROWS,), tl.int64), tl.zeros((ROWS,), tl.int64)
    if SPANS:
        first = tl.load(spans + 2 * token, mask=live, other=count)
        last = tl.load(spans + 2 * token + 1, mask=live, other=0)
        # Blocks that no query of this program sees are not read.
        seen = tl.maximum(begin, tl.min(first, axis=0).to(tl.int32))
        old_begin += (seen - begin) // AT_ONCE * AT_ONCE
        old_end = tl.minimum(old_end, tl.max(last, axis=0).to(tl.int32))
    top, total, mixed = _over(
        queries, old_k + key_head * old_k_head, old_v + key_head * old_v_head, top, total, mixed,
        old_begin, old_end, start, slots, old_k_token, old_v_token, first, last,
        k_scale + key_head, v_scale + key_head, KEYS, CODES, DIM, WIDTH, AT_ONCE, SPANS, WIDE,
    )  # fmt: skip
    if FRESH:
        top, total, mixed = _over(
            queries, k + key_head * k_head, v + key_head * v_head, top, total, mixed,
            tl.maximum(begin, count) - count, end - count, 0, fresh, k_token, v_token, first, last,
            k_scale, v_scale, KEYS, False, DIM, WIDTH, AT_ONCE, False, WIDE,
        )  # fmt: skip
    place = token * (GROUPS * KEYS) + head
    inside = live[:, None] & (dims < DIM)[None, :]
    if SPLIT:
        place += share.to(tl.int64) * tokens * (GROUPS * KEYS)
        tl.store(out + place[:, None] * DIM + dims[None, :], mixed, mask=inside)
        tl.store(weights + place, top, mask=live)
        behind = tl.num_programs(2).to(tl.int64) * tokens * (GROUPS * KEYS)
        tl.store(weights + behind + place, total, mask=live)
    else:
        mixed /= tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + place[:, None] * DIM + dims[None, :], narrow(mixed, out.dtype.element_ty, WIDE), mask=inside)


@triton.jit
def _over(
    queries, k, v, top, total, mixed, begin, end, start, slots, k_token, v_token, first, last, k_scale, v_scale,
    KEYS: tl.constexpr, CODES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
    SPANS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end - 1 of one store, `AT_ONCE` at a time, into the running sums. Key i lies in slot start + i."""
    dims = tl.arange(0, WIDTH)
    for at in range(begin, end, AT_ONCE):
        number = at + tl.arange(0, AT_ONCE)
        there = number < end
        slot = start + number
        slot = tl.where(slot >= slots, slot - slots, slot).to(tl.int64)
        inside = there[:, None] & (dims < DIM)[None, :]
        keys = tl.load(k + slot[:, None] * k_token + dims[None, :], mask=inside, other=0.0)
        values = tl.load(v + slot[:, None] * v_token + dims[None, :], mask=inside, other=0.0)
        if CODES:
            # Every code is a number of the queries' type, too.
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        elif WIDE:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if CODES:
            scores *= tl.load(k_scale + slot * KEYS, mask=there, other=0.0)[None, :]
        seen = there[None, :]
        if SPANS:
            seen = seen & (number[None, :] >= first[:, None]) & (number[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has seen no key yet has no maximum to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        down = tl.exp(top - base)
        total = total * down + tl.sum(weights, axis=1)
        if CODES:
            weights *= tl.load(v_scale + slot * KEYS, mask=there, other=0.0)[None, :]
        mixed = mixed * down[:, None]
        mixed = tl.dot(weights.to(values.dtype), values, mixed, input_precision="ieee")
        top = higher
    return top, total, mixed


@triton.jit(do_not_specialize=_VARYING)
def _add(parts, weights, out, shares, size, dim, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """One row's shares, in order."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, WIDTH)
    top = float("-inf")
    for share in range(shares):
        top = tl.maximum(top, tl.load(weights + share * size + row))
    total, mixed = 0.0, tl.zeros((WIDTH,), tl.float32)
    for share in range(shares):
        place = share * size + row
        scale = tl.exp(tl.load(weights + place) - top)
        total += scale * tl.load(weights + shares * size + place)
        mixed += scale * tl.load(parts + place * dim + dims, mask=dims < dim, other=0.0)
    tl.store(out + row * dim + dims, narrow(mixed / total, out.dtype.element_ty, WIDE), mask=dims < dim)
