"""CPU versions of some ops that give every row the same bits, whatever shares the batch.

What breaks that in plain torch, and what stands here instead (`tests/test_kernels.py` asserts each, per op):
* MKL's float32 product changes a row's last bits with the number of rows; oneDNN's does not.
* GELU computes the last elements of each thread's share in another way than the rest; no share has a rest here.
* A sum that makes one number out of many is split among threads; a single row is computed as two.

Gradients take the reference path, and so does what is invariant there already (bfloat16 products).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dgemma.kernels import cpu_vocab, native, reference
from dgemma.kernels.packed import has_bfloat16, invariant
from dgemma.kernels.reference_attention import inside

_VECTORS = 32  # elements that torch's GELU takes in one turn (two AVX-512 vectors; fewer elsewhere)


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`reference.linear` by oneDNN in float32. A transposed `weight` costs no copy."""
    if x.dtype is weight.dtype is torch.bfloat16 and not has_bfloat16() and not _tracked(x, weight):
        # Torch's own product takes ten times as long there as this one with its copies.
        return linear(x.float(), weight.float()).to(x.dtype)
    if x.dtype is not torch.float32 or x.numel() == 0 or _tracked(x, weight):
        return reference.linear(x, weight)
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        # oneDNN falls to a path a thousand times slower on rows with gaps between them.
        weight = weight.contiguous()
    return invariant(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, spans: Tensor | None = None) -> Tensor:
    """`reference.attention`, compiled where it can be; else one key head at a time, its query heads as rows.

    A query's result depends neither on the other queries of the pass nor on masked keys behind its own; the fused
    op of torch (no faster here) promises neither. Whoever gives `spans` spares the search for them in the mask.
    """
    if q.dtype not in (torch.float32, torch.bfloat16) or q.dim() != 3 or _tracked(q, k, v):
        return reference.attention(q, k, v, mask, spans)
    compiled = native.load()
    if compiled is not None and compiled.multiplies(q.dtype, q.shape[-1]):
        if spans is None and mask is not None:
            spans = _spans(mask)
        if mask is None or spans is not None:
            return compiled.attention(q, k, v, spans)
    if spans is not None:
        mask = inside(spans, torch.arange(k.shape[0]))
    tokens, heads, dim = q.shape
    groups = heads // k.shape[1]
    out = []
    hidden = None if mask is None else ~mask.unsqueeze(1)
    keys, values = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    softmax = _softmax(q.dtype)
    for head, part in enumerate(q.split(groups, dim=1)):
        scores = linear(part.reshape(tokens * groups, dim), keys[head])
        if hidden is not None:
            scores.view(tokens, groups, -1).masked_fill_(hidden, -torch.inf)
        out.append(linear(softmax(scores), values[head].t()).view(tokens, groups, dim))
    return torch.cat(out, dim=1)


def _spans(mask: Tensor) -> Tensor | None:
    """First and one past the last key that each query of `mask [T, S]` sees `[T, 2]`; None if some see gaps."""
    count, first = mask.sum(dim=-1), mask.to(torch.uint8).argmax(dim=-1)
    last = mask.shape[1] - mask.flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.stack([first, last], dim=-1) if bool(((last - first == count) & (count > 0)).all()) else None


def _softmax(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    compiled = native.load()
    if compiled is not None:
        return compiled.softmax_
    return lambda scores: torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)


def gelu(x: Tensor) -> Tensor:
    """`reference.gelu` over whole vectors only: padded where a thread's share would end with a rest."""
    if _tracked(x):
        return reference.gelu(x)
    rest = -x.numel() % (_VECTORS * torch.get_num_threads())
    if not rest:
        return reference.gelu(x.contiguous())
    padded = torch.nn.functional.pad(x.reshape(-1), (0, rest))
    return reference.gelu(padded)[: x.numel()].view(x.shape)


canvas_attention = partial(reference.canvas_attention, attend=attention)
stored_attention = partial(reference.stored_attention, attend=attention)
route = partial(reference.route, matmul=linear)
experts = partial(reference.experts, matmul=linear, activation=gelu)
vocab = partial(cpu_vocab.vocab, matmul=linear)
