"""The layer stack for inference on a CPU: packed weights, one product for q, k and v, and the compiled row ops between
the products. Same formulas as `block`, `attention` and `moe`, which remain the specification; no gradients.

The public classes are where the parts of a step meet: each is called once a layer and pass, so whoever asks where the
time goes (`bench`) may put a stopwatch around them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma.kernels.cpu_vocab import PackedHead
from dgemma.kernels.matrix import Matrix, RoundingMatrix
from dgemma.kernels.native import Native
from dgemma.kernels.packed import Packed
from dgemma.kernels.pages import give_back
from dgemma.model.attention import Attend
from dgemma.model.backbone import DiffusionGemma
from dgemma.model.block import Block
from dgemma.model.halves import close_halves
from dgemma.model.layers import GatedMLP, Linear

_SMALL = 1 << 22  # an embedding that may be kept twice


class FastStack:
    """A `Stack` of a model whose weights do not change any more."""

    def __init__(self, model: DiffusionGemma, native: Native) -> None:
        self._native, self._eps = native, model.config.norm_eps
        self._rotations, self._kinds = model._rotations, [layer.kind for layer in model.config.layers]
        blocks: list[Block] = list(model.layers)  # type: ignore[arg-type]
        following = [*(block.input_norm.weight for block in blocks[1:]), model.norm.weight]
        self._first_norm = blocks[0].input_norm.weight
        self._layers = [FastLayer(block, after, native) for block, after in zip(blocks, following, strict=True)]
        self._signal_norm = model.self_conditioning.pre_norm.weight
        self._signal = FastGatedMLP(model.self_conditioning.mlp, native)
        embed = model.embed.weight
        self.head = PackedHead(embed, model.head) if model.head or embed.numel() <= _SMALL else embed
        """What `kernels.vocab` takes for the embedding."""

    def __call__(self, x: Tensor, positions: Tensor, attend: Attend, scalar: str, clean: int = 0) -> Tensor:
        tables = {kind: rotation(positions, x.dtype) for kind, rotation in self._rotations.items()}
        normed = self._native.norm(x, self._first_norm, self._eps)
        for layer, kind in zip(self._layers, self._kinds, strict=True):
            x, normed = layer(x, normed, *tables[kind], attend, scalar, clean)
        return normed

    def condition(self, embedded: Tensor, soft: Tensor | None) -> Tensor:
        """`SelfConditioning.forward` for rows `[T, H]`."""
        if soft is not None:
            embedded = embedded + self._signal(self._native.norm(soft.contiguous(), self._signal_norm, self._eps))
        return self._native.norm(embedded, None, self._eps)


class FastLayer:
    """One block. What it calls is `Native`'s, an `Attend`'s, and the two classes below."""

    def __init__(self, block: Block, following: Tensor, native: Native) -> None:
        self._native, self._following = native, following
        attention = block.attention
        self._index, self._eps, self._dim = attention.index, attention.eps, attention.head_dim
        self._q_norm, self._k_norm = attention.q_norm.weight, attention.k_norm.weight
        self._counts = (attention.q_proj.out_features // self._dim, attention.k_proj.out_features // self._dim)
        self._has_v = attention.v_proj is not None
        parts = [attention.q_proj, attention.k_proj, *([attention.v_proj] if attention.v_proj is not None else [])]
        self._qkv, self._out = _beside(parts), _matrix(attention.o_proj)
        self._mlp = FastGatedMLP(block.mlp, native)
        self._post_attention, self._pre_mlp = block.post_attention_norm.weight, block.pre_mlp_norm.weight
        self._post = block.post_norm.weight
        self._scalars = {name: getattr(block, name) for name in ("encoder_scalar", "decoder_scalar")}
        self._moe = FastExperts(block, native) if block.moe else None
        self._post_mlp = self._post_experts = self._pre_experts = self._route_scale = None
        if block.moe:
            self._post_mlp, self._post_experts = block.post_mlp_norm.weight, block.post_experts_norm.weight
            self._pre_experts, self._route_scale = block.pre_experts_norm.weight, block.router.scale

    def __call__(
        self, x: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, attend: Attend, scalar: str, clean: int
    ) -> tuple[Tensor, Tensor]:
        native, eps = self._native, self._eps
        heads = native.heads(
            self._qkv(normed), self._q_norm, self._k_norm, cos, sin, eps, self._counts, self._has_v
        )  # fmt: skip
        attended = self._out(attend(self._index, *heads).flatten(1))
        x, for_dense, for_mixed, routed = native.middle(
            x, attended, self._post_attention, self._pre_mlp, eps, self._pre_experts, self._route_scale
        )
        dense = self._mlp(for_dense)
        mixed = None if self._moe is None or for_mixed is None or routed is None else self._moe(for_mixed, routed)
        norms = (self._post_mlp, self._post_experts, self._post)
        scalars = self._scalars["encoder_scalar"], self._scalars[scalar]
        return close_halves(native.close, x, dense, mixed, norms, scalars, clean, self._following, eps)


class FastGatedMLP:
    """`GatedMLP`, gate and up in one product."""

    def __init__(self, mlp: GatedMLP, native: Native) -> None:
        self._native = native
        self._gate_up, self._down = _beside([mlp.gate_proj, mlp.up_proj]), _matrix(mlp.down_proj)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._native.geglu(self._gate_up(x)))


class FastExperts:
    """Router and experts of a block: `route` and the weighted sum."""

    def __init__(self, block: Block, native: Native) -> None:
        self._native, self._top_k = native, block.router.top_k
        self._router, self._scale = _matrix(block.router.proj), block.router.per_expert_scale
        experts = block.experts
        if experts.matrices is None:
            self._gate_up: Sequence[Matrix] = [Packed(weight) for weight in experts.gate_up_proj]
            self._down: Sequence[Matrix] = [Packed(weight) for weight in experts.down_proj]
            _rest([experts.gate_up_proj, experts.down_proj])
        else:
            self._gate_up, self._down = experts.matrices
        # All experts in one call, where their products are the compiled ones.
        self._places = _addresses(self._gate_up), _addresses(self._down)

    def __call__(self, x: Tensor, routed: Tensor) -> Tensor:
        native = self._native
        weights, order, place, counts = native.route(self._router(routed), self._scale, self._top_k)
        rows, (gate_up, down) = x.index_select(0, order), self._places
        if gate_up is not None and down is not None:
            return native.combine(native.experts(rows, counts, gate_up, down, self._down[0].shape[1]), place, weights)
        jobs = zip(rows.split(counts.tolist()), self._gate_up, self._down, strict=True)
        parts = [down(native.geglu(gate_up(rows))) for rows, gate_up, down in jobs if rows.shape[0]]
        return native.combine(torch.cat(parts), place, weights)


def _addresses(matrices: Sequence[Matrix]) -> Tensor | None:
    panels = [matrix.panels if isinstance(matrix, Packed) else None for matrix in matrices]
    found = [part.data_ptr() for part in panels if part is not None]
    return torch.tensor(found) if len(found) == len(matrices) else None


class _Beside:
    """Several matrices that read the same rows, their outputs side by side."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        self._parts = parts
        rounding = [part for part in parts if isinstance(part, RoundingMatrix)]
        self._rounding = rounding if len(rounding) == len(parts) else []

    def __call__(self, x: Tensor) -> Tensor:
        if not self._rounding:
            return torch.cat([part(x) for part in self._parts], dim=-1)
        rounded, widths = self._rounding[0].rounded(x), [part.shape[0] for part in self._rounding]
        out = x.new_empty(x.shape[0], sum(widths))
        for part, columns in zip(self._rounding, out.split(widths, dim=1), strict=True):
            part.into(rounded, columns)
        return out


def _matrix(linear: Linear) -> Matrix:
    return _packed([linear]) if linear.matrix is None else linear.matrix


def _beside(linears: Sequence[Linear]) -> Matrix | _Beside:
    if all(linear.matrix is None for linear in linears):
        return _packed(linears)
    return _Beside([_matrix(linear) for linear in linears])


def _packed(linears: Sequence[Linear]) -> Matrix:
    weights = [linear.weight for linear in linears]
    packed = Packed(weights[0] if len(weights) == 1 else torch.cat(weights))
    _rest(weights)
    return packed


def _rest(weights: Sequence[Tensor]) -> None:
    """What was packed stays a weight of the model (to save, to train), but need not stay in memory."""
    for weight in weights:
        give_back(weight.detach())
