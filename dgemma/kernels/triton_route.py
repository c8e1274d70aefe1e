"""The router on a GPU: softmax over experts in float32, top-k, weights, ids ascending, in one launch.

The k most likely are found one after the other, ties by the lowest id, as a mask; counting along the mask gives each
its place, so nothing is sorted. The product before it is torch's.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgemma.kernels import reference
from dgemma.kernels.triton_norms import scaled_norm, tracked


def route(
    x: Tensor, proj: Tensor, scale: Tensor, expert_scale: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.route`."""
    if tracked(x, proj, scale, expert_scale):
        return reference.route(x, proj, scale, expert_scale, top_k, eps)
    return choose(reference.linear(scaled_norm(x, scale, eps, x.shape[-1] ** -0.5), proj), expert_scale, top_k)


def choose(scores: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`reference.choose`; of experts alike at the end, the one with the lower id."""
    if tracked(scores, expert_scale):
        return reference.choose(scores, expert_scale, top_k)
    tokens, count = scores.shape
    assert top_k <= count
    kind = torch.promote_types(torch.float32, expert_scale.dtype)
    weights = torch.empty(tokens, top_k, dtype=kind, device=scores.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=scores.device)
    if tokens:
        scores = scores if scores.stride(1) == 1 else scores.contiguous()
        _choose[(tokens,)](
            scores, expert_scale.contiguous(), weights, ids, count, scores.stride(0),
            TOP_K=top_k, BLOCK=triton.next_power_of_2(count), num_warps=1,
        )  # fmt: skip
    return weights, ids


@triton.jit
def _choose(scores, expert_scale, weights, ids, count, stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < count
    values = tl.load(scores + row * stride + at, mask=there, other=float("-inf")).to(tl.float32)
    probs = tl.exp(values - tl.max(values, axis=0))
    probs = tl.where(there, probs / tl.sum(probs, axis=0), -1.0)
    left, chosen = probs, at < 0
    for _ in range(TOP_K):
        # Rows that are not numbers choose something too: the sums below need k places.
        best = tl.min(tl.where((left == tl.max(left, axis=0)) | (left != left), at, BLOCK), axis=0)
        chosen = chosen | (at == best)
        left = tl.where(at == best, -2.0, left)
    picked = tl.where(chosen, probs, 0.0)
    scaled = picked / tl.sum(picked, axis=0) * tl.load(expert_scale + at, mask=there, other=0.0).to(tl.float32)
    place = row * TOP_K + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(weights + place, scaled, mask=chosen)
    tl.store(ids + place, at.to(tl.int64), mask=chosen)
