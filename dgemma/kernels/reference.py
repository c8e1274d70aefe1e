"""Every op in plain torch, attention in `reference_attention`. Faster versions must agree with these two files.

Axes: T tokens (any leading shape), H hidden, Q query heads, K key/value heads, D head dim, S keys, E experts,
k experts per token, V vocabulary. All functions are differentiable unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.kernels.matrix import Matrix
from dgemma.kernels.reference_attention import attention as attention
from dgemma.kernels.reference_attention import canvas_attention as canvas_attention
from dgemma.kernels.reference_attention import stored_attention as stored_attention

Matmul = Callable[[Tensor, Tensor], Tensor]
"""`(x [.., in], weight [out, in]) -> [.., out]`: the product that every backend may replace."""

DRAW_BLOCK = 1024
"""Vocabulary entries per block of the categorical draw; part of the sampler's specification (see `categorical`)."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32, result in x's type. `weight` multiplies directly."""
    wide = x.float()
    wide = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    return (wide if weight is None else wide * weight.float()).type_as(x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x [..., in] @ weight [out, in]^T`."""
    return torch.nn.functional.linear(x, weight)


def rope_frequencies(head_dim: int, theta: float, partial: float, factor: float) -> Tensor:
    """Angles per position, float32 `[D/2]`. With `partial < 1` the first `partial` of the pairs turn, the rest stay.

    The exponent's denominator is the whole head dim (HF "proportional" rotation), not the rotated width.
    """
    live = int(partial * head_dim // 2)
    exponents = torch.arange(0, 2 * live, 2, dtype=torch.int64).float() / head_dim
    turning = 1.0 / (theta**exponents)
    return torch.cat([turning, torch.zeros(head_dim // 2 - live)]) / factor


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[..., D]` for integer `positions [...]`; made in float32, then cast."""
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [..., heads, D]` by the tables `[..., D]`; halves are paired: (i, i + D/2)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat([-right, left], dim=-1) * sin.unsqueeze(-2)


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
    """From rows `[T, queries | keys | values]` to normed and rotated q, k and normed v `[T, heads, D]` each.

    `counts` are of query and key heads; without values (`has_v`) the raw keys stand for them. Tables are `[T, D]`.
    """
    (queries, keys), dim = counts, cos.shape[-1]
    q, k, *v = packed.unflatten(-1, (-1, dim)).split([queries, keys, keys][: 3 if has_v else 2], dim=-2)
    values = v[0] if v else k
    q, k = rope(rms_norm(q, q_norm, eps), cos, sin), rope(rms_norm(k, k_norm, eps), cos, sin)
    return q, k, rms_norm(values, None, eps)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form (the only activation of Gemma 4)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def geglu(packed: Tensor) -> Tensor:
    """`gelu(gate) * up` of `[..., gate | up]`."""
    gate, up = packed.chunk(2, dim=-1)
    return gelu(gate) * up


def middle(
    x: Tensor,
    attended: Tensor,
    post: Tensor,
    dense: Tensor,
    eps: float,
    mixed: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of rows `[T, H]`: the residual after attention, and what MLP, experts and router read (None without experts).

    `post`, `dense` and `mixed` are norm weights, `scale` the router's.
    """
    x = x + rms_norm(attended, post, eps)
    if mixed is None or scale is None:
        return x, rms_norm(x, dense, eps), None, None
    return x, rms_norm(x, dense, eps), rms_norm(x, mixed, eps), rms_norm(x, None, eps) * scale * (x.shape[-1] ** -0.5)


def close(
    x: Tensor,
    dense: Tensor,
    mixed: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor],
    scalar: Tensor,
    following: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """A layer's output, and its norm under the next layer's weight. `weights`: of MLP, experts, both together."""
    if mixed is not None:
        dense = rms_norm(dense, weights[0], eps) + rms_norm(mixed, weights[1], eps)
    x = (x + rms_norm(dense, weights[2], eps)) * scalar
    return x, rms_norm(x, following, eps)


def route(
    x: Tensor,
    proj: Tensor,
    scale: Tensor,
    expert_scale: Tensor,
    top_k: int,
    eps: float,
    matmul: Matmul = linear,
) -> tuple[Tensor, Tensor]:
    """Choose experts for `x [T, H]` (the raw residual): weights and ids `[T, k]`, ids ascending.

    Softmax over all experts in float32, then top-k, renormalise, then the per-expert scale (HF `Router`).
    """
    scores = rms_norm(x, None, eps) * scale * (x.shape[-1] ** -0.5)
    return choose(matmul(scores, proj), expert_scale, top_k)


def choose(scores: Tensor, expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The second half of `route`: from its scores `[T, E]`."""
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
    weights, ids = torch.topk(probs, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    # Ascending ids make the order of the sum below a property of the row, not of the batch.
    ids, order = ids.sort(dim=-1)
    return weights.gather(-1, order) * expert_scale[ids], ids


def experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor | Sequence[Matrix],
    down: Tensor | Sequence[Matrix],
    matmul: Matmul = linear,
    activation: Callable[[Tensor], Tensor] = gelu,
) -> Tensor:
    """Weighted sum of gated MLPs: `x [T, H]`, `weights, ids [T, k]`, `gate_up [E, 2I, H]` (gate rows first),
    `down [E, H, I]` (or a `Matrix` an expert) -> `[T, H]`.

    Rows are grouped by expert; every row then adds its k parts in ascending expert order, in x's type.
    """
    tokens, top_k = ids.shape
    if not tokens:
        return x
    order = ids.reshape(-1).argsort(stable=True)
    counts = torch.bincount(ids.reshape(-1), minlength=len(gate_up)).tolist()
    parts = []
    for expert, rows in enumerate(x[order // top_k].split(counts)):
        if rows.shape[0]:
            gate, up = _product(rows, gate_up[expert], matmul).chunk(2, dim=-1)
            parts.append(_product(activation(gate) * up, down[expert], matmul))
    out = (torch.cat(parts) * weights.reshape(-1)[order].unsqueeze(-1)).to(x.dtype)
    slots = out[order.argsort()].view(tokens, top_k, -1)
    total = slots[:, 0]
    for slot in range(1, top_k):
        total = total + slots[:, slot]
    return total


def _product(x: Tensor, weight: Tensor | Matrix, matmul: Matmul) -> Tensor:
    return matmul(x, weight) if isinstance(weight, Tensor) else weight(x)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Float32 logits bounded to (-cap, cap)."""
    return torch.tanh(logits.float() / cap) * cap


@dataclass(frozen=True)
class VocabStats:
    """What a sampler may know of a position's distribution, and the next step's signal. T rows.

    `entropy` in nats and `argmax`, `top_logprob` are of the temperature-shaped distribution; `draw` was drawn from it
    (further shaped by the request's own temperature and top-k) and `draw_logprob` is its log-probability under the
    temperature-shaped one. `soft [T, H]` is the probability-weighted embedding, unscaled, in the embedding's type.
    """

    entropy: Tensor
    argmax: Tensor
    top_logprob: Tensor
    draw: Tensor
    draw_logprob: Tensor
    soft: Tensor


def categorical(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One draw per row of `logits [T, V]` from softmax, given `uniforms [T, ceil(V / DRAW_BLOCK)]` in [0, 1), float64.

    Blocks are visited in order. Block b, with mass m_b, takes over the draw with probability m_b / (m_0 + .. + m_b);
    inside a block the same uniform, stretched to [0, 1), picks the token by inverse cumulative sum. This needs one
    pass, one uniform per block, and gives the same token on every backend whose chunk is a multiple of the block.
    Not differentiable.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // DRAW_BLOCK)
    weights = torch.exp(logits.double() - logits.double().amax(dim=-1, keepdim=True))
    weights = torch.nn.functional.pad(weights, (0, blocks * DRAW_BLOCK - vocab)).view(rows, blocks, DRAW_BLOCK)
    inner = weights.cumsum(dim=-1)
    mass = inner[..., -1]
    share = mass / mass.cumsum(dim=-1)
    taken = (uniforms < share) & (mass > 0)
    index = torch.arange(blocks, device=logits.device)
    block = torch.where(taken, index, -1).amax(dim=-1)
    at = block.view(rows, 1)
    stretched = (uniforms.gather(1, at) / share.gather(1, at)).clamp(max=1.0)
    curve = inner.gather(1, at.unsqueeze(-1).expand(rows, 1, DRAW_BLOCK)).squeeze(1)
    # `right=True` skips entries without mass; the clamp guards the last bit of rounding.
    last = (curve < curve[:, -1:]).sum(dim=-1, keepdim=True)
    offset = torch.searchsorted(curve, stretched * mass.gather(1, at), right=True).minimum(last)
    return block * DRAW_BLOCK + offset.squeeze(1)


def vocab(
    hidden: Tensor,
    embed: Tensor,
    cap: float,
    temperature: Tensor,
    uniforms: Tensor,
    draw_temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    matmul: Matmul = linear,
    bias: Tensor | None = None,
    top_p: Tensor | None = None,
) -> VocabStats:
    """From hidden states `[T, H]` to what a denoising step needs. `embed [V, H]`, `temperature [T]` float32.

    `uniforms [T, blocks]` feed the draw. `draw_temperature [T]` divides the draw's logits once more (0: the argmax);
    `top_k [T]` (0: off) restricts the draw. `bias [V]` or `[T, V]` is added to the soft-capped logits before the
    temperature (minus infinity excludes a token; one must be left), and `top_p [T]` float64 (1: off) then keeps what
    `nucleus` says; these two shape everything: statistics, draw and soft embedding. Nothing here is differentiable.
    """
    logits = softcap(matmul(hidden, embed), cap)
    logits = (logits if bias is None else logits + bias) / temperature[:, None]
    if top_p is not None:
        logits = nucleus(logits, top_p)
    return prediction(logits, uniforms, draw_temperature, top_k, lambda probs: matmul(probs.to(embed.dtype), embed.t()))


def prediction(
    logits: Tensor,
    uniforms: Tensor,
    draw_temperature: Tensor | None,
    top_k: Tensor | None,
    to_soft: Callable[[Tensor], Tensor],
) -> VocabStats:
    """What `vocab` makes of its tempered and shaped `logits [T, V]`; `to_soft` multiplies with the embedding."""
    logp = torch.log_softmax(logits, dim=-1)
    probs = logp.exp()
    argmax = first_highest(logits)  # of logits, because logp merges near ones
    top_logprob = logp.gather(1, argmax[:, None]).squeeze(1)
    entropy = -(probs * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1)
    draw = draw_tokens(logits, argmax, uniforms, draw_temperature, top_k)
    return VocabStats(
        entropy=entropy,
        argmax=argmax,
        top_logprob=top_logprob,
        draw=draw,
        draw_logprob=logp.gather(1, draw[:, None]).squeeze(1),
        soft=to_soft(probs),
    )


def first_highest(logits: Tensor) -> Tensor:
    """The likeliest token of each row of `logits [T, V]`; ties go to the lowest id, which torch does not promise."""
    return (logits == logits.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)


def nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """`logits [T, V]` with minus infinity outside the fewest most likely tokens whose probabilities sum to at least
    `top_p [T]` float64; ties by the lowest id. A row with `top_p` 1 stays whole."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    mass = torch.softmax(logits.double(), dim=-1).gather(1, order).cumsum(dim=-1)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    return logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -math.inf)


def draw_tokens(
    logits: Tensor, argmax: Tensor, uniforms: Tensor, temperature: Tensor | None, top_k: Tensor | None
) -> Tensor:
    """The draw of `vocab` from its tempered `logits [T, V]`."""
    if top_k is not None and bool((top_k > 0).any()):
        limit = int(top_k.max())
        kept = logits.topk(min(limit, logits.shape[-1]), dim=-1).values
        floor = kept.gather(1, (top_k.clamp(1, kept.shape[1]) - 1)[:, None])
        logits = logits.masked_fill((logits < floor) & (top_k > 0)[:, None], -math.inf)
    if temperature is None:
        return categorical(logits, uniforms)
    greedy = temperature == 0
    # Shifted to a top of 0 first, or a tiny temperature would overflow.
    wide = logits.double()
    wide = wide - wide.amax(dim=-1, keepdim=True)
    draw = categorical(wide / torch.where(greedy, 1.0, temperature.double())[:, None], uniforms)
    return torch.where(greedy, argmax, draw)
