"""The forward pass of adapted experts, in low rank: `x W^T + scale (x A^T) B^T` for each expert's rows.

peft adds `B A` to the whole fused weight at every pass, which keeps a second copy of all experts alive per layer and
pass, and its gradient. Here neither exists, and in bfloat16 a small delta is not rounded away against the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dgemma import kernels


def factors(layer: Any, adapter: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`A [(E,) rank, in]` and `B [(E,) out, rank]` of a peft layer on `weight [(E,) out, in]`."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if weight.ndim == 2:
        return a, b
    # peft's layout: A lies expert by expert, B rank by rank.
    count = len(weight)
    return a.view(count, -1, a.shape[-1]), b.view(len(b), -1, count).permute(2, 0, 1)


class _Expert(NamedTuple):
    """One expert's weight `[out, in]`, `a [rank, in]`, `b [out, rank]`: as much of a `Matrix` as a product needs."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        delta = kernels.linear(kernels.linear(x, self.a), self.b)
        return kernels.linear(x, self.weight) + delta * self.scale


def _experts(weight: Tensor, layer: Any, adapter: str) -> Any:
    a, b = factors(layer, adapter, weight)
    parts = zip(weight.unbind(), a.unbind(), b.contiguous().unbind(), strict=True)
    return [_Expert(*part, layer.scaling[adapter]) for part in parts]


def low_rank_experts(layer: Any, adapter: str, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """`Experts.forward` under peft's two nested wrappers: `layer` adapts `down_proj`, the one inside `gate_up_proj`."""
    base = layer.get_base_layer()
    gate_up = _experts(base.gate_up_proj, layer.base_layer, adapter)
    return kernels.experts(x, weights, ids, gate_up, _experts(base.down_proj, layer, adapter))
