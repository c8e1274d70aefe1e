"""CPU ops whose gradient is written by hand because autograd's takes several times longer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgemma.kernels import reference


class _Norm(torch.autograd.Function):
    """`reference.rms_norm` in x's own type; forward and backward take a fifth of the autograd version's time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit if weight is None else unit * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        unit, inverse, weight = ctx.saved_tensors
        grad, grad_weight = grads[0], None
        if weight is not None:
            grad_weight = (grad * unit).reshape(-1, grad.shape[-1]).sum(0)
            grad = grad * weight
        along = (grad * unit).mean(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).mul_(inverse), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The hand-written gradient where one is asked for, else the reference."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Norm.apply(x, weight, eps)
    return reference.rms_norm(x, weight, eps)
