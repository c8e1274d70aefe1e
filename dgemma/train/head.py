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
    def forward(ctx: Any, hidden: Tensor, embed: Tensor, targets: Tensor, weights: Tensor, cap: float) -> Any:
        grad_hidden = torch.empty_like(hidden)
        grad_embed = torch.zeros(embed.shape, dtype=torch.float32)
        losses = torch.empty(hidden.shape[0])
        for rows in torch.arange(hidden.shape[0]).split(_ROWS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            bent = (hidden[part] @ embed.t()).float().div_(cap).tanh_()
            logp = torch.log_softmax(bent * cap, dim=-1)
            at = targets[part, None]
            losses[part] = -logp.gather(1, at).squeeze(1)
            slope = logp.exp_()
            slope.scatter_add_(1, at, torch.full(at.shape, -1.0))
            slope.mul_(bent.square_().neg_().add_(1.0)).mul_(weights[part, None])
            slope_low = slope.to(embed.dtype)
            grad_hidden[part] = slope_low @ embed
            grad_embed += slope_low.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_embed)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_embed = ctx.saved_tensors
        return grad_hidden * grads[0], (grad_embed * grads[0]).to(grad_hidden.dtype), None, None, None


def head_loss(model: DiffusionGemma, hidden: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over `valid` positions (nats, differentiable), and the losses of all positions (not so).

    `hidden [..., H]`, `targets, valid [...]`; equal to `diffusion.loss.cross_entropy` of `model.logits(hidden)`.
    """
    weights = valid.reshape(-1).float() / valid.sum().clamp(min=1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    total, losses = _HeadLoss.apply(flat, model.embed.weight, targets.reshape(-1), weights, model.config.softcap)
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
