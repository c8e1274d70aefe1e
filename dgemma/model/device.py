"""The layer stack for inference on a device: the kernel table's fused row ops between the products.

Same formulas as `block`, `attention` and `moe`, which remain the specification; no gradients. Projections that read the
same rows become one product: their weights move into one piece of memory, and the model's parameters are views of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgemma import kernels
from dgemma.kernels.matrix import JoiningMatrix
from dgemma.model.attention import Attend
from dgemma.model.backbone import DiffusionGemma
from dgemma.model.block import Block
from dgemma.model.halves import close_halves
from dgemma.model.layers import GatedMLP, Linear


class DeviceStack:
    """A `Stack` of a model whose weights do not change any more."""

    def __init__(self, model: DiffusionGemma) -> None:
        self._eps, self._rotations = model.config.norm_eps, model._rotations
        self._kinds = [layer.kind for layer in model.config.layers]
        blocks: list[Block] = list(model.layers)  # type: ignore[arg-type]
        following = [*(block.input_norm.weight for block in blocks[1:]), model.norm.weight]
        self._first_norm = blocks[0].input_norm.weight
        self._layers = [_Layer(block, after) for block, after in zip(blocks, following, strict=True)]
        self._signal_norm = model.self_conditioning.pre_norm.weight
        self._signal = _GatedMLP(model.self_conditioning.mlp)

    def __call__(self, x: Tensor, positions: Tensor, attend: Attend, scalar: str, clean: int = 0) -> Tensor:
        tables = {kind: rotation(positions, x.dtype) for kind, rotation in self._rotations.items()}
        normed = kernels.rms_norm(x, self._first_norm, self._eps)
        for layer, kind in zip(self._layers, self._kinds, strict=True):
            x, normed = layer(x, normed, *tables[kind], attend, scalar, clean)
        return normed

    def condition(self, embedded: Tensor, soft: Tensor | None) -> Tensor:
        """`SelfConditioning.forward` for rows `[T, H]`."""
        if soft is not None:
            embedded = embedded + self._signal(kernels.rms_norm(soft, self._signal_norm, self._eps))
        return kernels.rms_norm(embedded, None, self._eps)


class _Layer:
    def __init__(self, block: Block, following: Tensor) -> None:
        self._block, self._following = block, following
        attention = block.attention
        self._index, self._eps, dim = attention.index, attention.eps, attention.head_dim
        self._counts = attention.q_proj.out_features // dim, attention.k_proj.out_features // dim
        self._has_v = attention.v_proj is not None
        own_v = [] if attention.v_proj is None else [attention.v_proj]
        self._qkv = _Beside([attention.q_proj, attention.k_proj, *own_v])
        self._mlp = _GatedMLP(block.mlp)
        moe = block.moe
        self._mixed = (block.pre_experts_norm.weight, block.router.scale) if moe else (None, None)
        self._branches = (block.post_mlp_norm.weight, block.post_experts_norm.weight) if moe else (None, None)

    def __call__(
        self, x: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, attend: Attend, scalar: str, clean: int
    ) -> tuple[Tensor, Tensor]:
        block, attention, eps = self._block, self._block.attention, self._eps
        norms = attention.q_norm.weight, attention.k_norm.weight
        q, k, v = kernels.heads(self._qkv(normed), *norms, cos, sin, eps, self._counts, self._has_v)
        attended = attention.o_proj(attend(self._index, q, k, v).flatten(1))
        x, for_dense, for_mixed, routed = kernels.middle(
            x, attended, block.post_attention_norm.weight, block.pre_mlp_norm.weight, eps, *self._mixed
        )
        dense, mixed = self._mlp(for_dense), None
        if for_mixed is not None and routed is not None:
            router = block.router
            weights, ids = kernels.choose(router.proj(routed), router.per_expert_scale, router.top_k)
            mixed = block.experts(for_mixed, weights, ids)
        ends = (*self._branches, block.post_norm.weight)
        scalars = block.encoder_scalar, getattr(block, scalar)
        return close_halves(kernels.close, x, dense, mixed, ends, scalars, clean, self._following, eps)


class _GatedMLP:
    """`GatedMLP`, gate and up in one product."""

    def __init__(self, mlp: GatedMLP) -> None:
        self._gate_up, self._down = _Beside([mlp.gate_proj, mlp.up_proj]), mlp.down_proj

    def __call__(self, x: Tensor) -> Tensor:
        down: Tensor = self._down(kernels.geglu(self._gate_up(x)))
        return down


class _Beside:
    """Linears that read the same rows, their outputs side by side: one product of plain weights, or of FP8."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = linears
        self._weight = _joined(linears) if all(linear.matrix is None for linear in linears) else None
        first, *others = (linear.matrix for linear in linears)
        alike = isinstance(first, JoiningMatrix) and all(type(other) is type(first) for other in others)
        self._matrix = first.joined(others) if alike else None  # type: ignore[union-attr, arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        if self._weight is not None:
            return kernels.linear(x, self._weight)
        if self._matrix is not None:
            return self._matrix(x)
        return torch.cat([linear(x) for linear in self._linears], dim=-1)


def _joined(linears: Sequence[Linear]) -> Tensor:
    """All weights in one tensor, of which the linears keep views."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight = nn.Parameter(part, requires_grad=linear.weight.requires_grad)
    return weight
