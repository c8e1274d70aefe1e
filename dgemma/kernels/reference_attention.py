"""The specification of attention, in plain torch. T queries, S keys, Q query heads, K key/value heads, D head dim."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dgemma.kernels.vectors import restore

Scales = tuple[Tensor, Tensor] | None
"""Of keys and values that are stored as e4m3 codes (`vectors.round_vectors`): float32 `[S, K]` each."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, spans: Tensor | None = None) -> Tensor:
    """Softmax attention with scale 1 over one sequence: `q [T, Q, D]`, `k, v [S, K, D]` -> `[T, Q, D]`.

    Query head i reads key/value head `i // (Q / K)`. `mask [T, S]` is true where a query may look.
    Leading batch axes are allowed on all three (and on the mask). Or `spans [T, 2]` int64 has the first and one past
    the last key of each query.
    """
    if spans is not None:
        mask = inside(spans, torch.arange(k.shape[-3], device=k.device))
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    repeat = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeat, dim=-3), v.repeat_interleave(repeat, dim=-3)
    scores = q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-3), -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(-3, -2)


def inside(spans: Tensor, numbers: Tensor) -> Tensor:
    """Whether `spans [T, 2]` hold keys of these `numbers [S]`: a mask `[T, S]`."""
    return (spans[:, :1] <= numbers) & (numbers < spans[:, 1:])


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
    attend: Callable[..., Tensor] = attention,
) -> Tensor:
    """A canvas that sees all of itself `k, v [C, K, D]`, and `count` tokens of a store `old_k, old_v [S, K, D]`.

    They lie from slot `start` on and go on at slot 0 behind the last: a ring needs no copy to be read. For who must not
    ask the device, `where [2]` has the two numbers instead; there are no more than `count` then. With `scales [S, K]`
    of keys and values, float32, the store has e4m3 codes (`vectors.round_vectors`).
    """
    keys, values, numbers = _stored(old_k, old_v, start, count, scales, where, k.dtype)
    mask = None
    if where is not None:
        mask = torch.cat([numbers < where[1], torch.ones_like(k[:, 0, 0], dtype=torch.bool)]).expand(len(q), -1)
    return attend(q, torch.cat([keys, k]), torch.cat([values, v]), mask)


def stored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    count: int,
    spans: Tensor | None = None,
    scales: Scales = None,
    where: Tensor | None = None,
    attend: Callable[..., Tensor] = attention,
) -> Tensor:
    """Queries whose own keys are in the store `k, v [S, K, D]` already; see `canvas_attention` for where and how.

    `spans [T, 2]` as in `attention`, keys numbered from the first of the `count` on; without them all are seen.
    """
    keys, values, numbers = _stored(k, v, start, count, scales, where, q.dtype)
    if where is None:
        return attend(q, keys, values, None, spans)
    live = (numbers < where[1]).expand(len(q), -1)
    return attend(q, keys, values, live if spans is None else live & inside(spans, numbers))


def _stored(
    k: Tensor, v: Tensor, start: int, count: int, scales: Scales, where: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values of a store, and their numbers: in order, or with `where` all slots as they lie."""
    slots = k.shape[0]

    def part(stop: int, begin: int = 0) -> tuple[Tensor, Tensor]:
        both = k[begin:stop], v[begin:stop]
        if scales is None:
            return both
        return restore(both[0], scales[0][begin:stop], dtype), restore(both[1], scales[1][begin:stop], dtype)

    if where is not None:
        numbers = torch.arange(slots, device=k.device) - where[0]
        numbers = torch.where(numbers < 0, numbers + slots, numbers)
        free = (numbers >= where[1])[:, None, None]
        keys, values = part(slots)
        return keys.masked_fill(free, 0.0), values.masked_fill(free, 0.0), numbers  # a free slot holds anything
    keys, values = part(min(start + count, slots), start)
    if start + count > slots:
        more = part(start + count - slots)
        keys, values = torch.cat([keys, more[0]]), torch.cat([values, more[1]])
    return keys, values, torch.arange(count, device=k.device)
