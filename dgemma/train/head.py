"""The vocabulary head in training: cross-entropy without a `tokens x vocabulary` tensor.

The gradient of a mean cross-entropy is known as soon as the logits are, so it is taken chunk by chunk in the forward
pass and only scaled in the backward one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.model import DiffusionGemma

_ROWS = 512


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embed: Tensor, targets: Tensor, weights: Tensor, cap: float, seen: Any
    ) -> Any:
        grad_hidden = torch.empty_like(hidden)
        wanted = ctx.needs_input_grad[1]  # not with LoRA, and an embedding may be large
        grad_embed = torch.zeros(embed.shape if wanted else (0,), dtype=torch.float32, device=embed.device)
        losses = torch.empty(hidden.shape[0], device=hidden.device)
        for begin in range(0, hidden.shape[0], _ROWS):
            part = slice(begin, begin + _ROWS)
            bent = (hidden[part] @ embed.t()).float().div_(cap).tanh_()
            logits = bent * cap
            if seen is not None:
                logits.scatter_add_(1, seen[0][part, None], seen[1][part, None])
            logp = torch.log_softmax(logits, dim=-1)
            at = targets[part, None]
            losses[part] = -logp.gather(1, at).squeeze(1)
            slope = logp.exp_()
            slope.scatter_add_(1, at, torch.full_like(at, -1.0, dtype=torch.float32))
            slope.mul_(bent.square_().neg_().add_(1.0)).mul_(weights[part, None])
            slope_low = slope.to(embed.dtype)
            grad_hidden[part] = slope_low @ embed
            if wanted:
                grad_embed += slope_low.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_embed)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_embed = ctx.saved_tensors
        slope = (grad_embed * grads[0]).to(grad_hidden.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden * grads[0], slope, None, None, None, None


def head_loss(
    model: DiffusionGemma,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    weight_sum: Tensor | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted mean of the cross-entropies (nats, differentiable), and the losses of all positions (not so).

    `hidden [..., H]`, `targets, weights [...]`; equal to `diffusion.loss.cross_entropy` of `model.logits(hidden)`.
    `weight_sum` divides in place of `weights.sum()` (these rows are part of a larger batch).
    `seen` = (tokens, bonus) `[...]`: the logit of that token is raised by the bonus first.
    """
    whole = weights.sum() if weight_sum is None else weight_sum
    shares = weights.reshape(-1) / whole.clamp(min=1e-9)
    flat = hidden.reshape(-1, hidden.shape[-1])
    known = None if seen is None else tuple(part.reshape(-1) for part in seen)
    total, losses = _HeadLoss.apply(flat, model.embed.weight, targets.reshape(-1), shares, model.config.softcap, known)
    return total, losses.view(targets.shape)


@torch.no_grad()
def soft_signal(model: DiffusionGemma, hidden: Tensor) -> Tensor:
    """`model.soft_embedding(model.logits(hidden))` in chunks of rows."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    embed, cap = model.embed.weight, model.config.softcap
    parts = []
    for rows in flat.split(_ROWS):
        probs = torch.softmax(kernels.softcap(rows @ embed.t(), cap), dim=-1).to(embed.dtype)
        parts.append(probs @ embed)
    return torch.cat(parts).view(hidden.shape)
