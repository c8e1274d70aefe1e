"""Gemma 4 attention, one class for both passes: what may be seen, and what is remembered, is the `attend` argument."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from dgemma import kernels
from dgemma.config import LayerConfig, ModelConfig
from dgemma.model.layers import Linear, RMSNorm


class Attend(Protocol):
    """Mixes positions. Given one layer's `q [..., Q, D]` and fresh `k, v [..., K, D]`, returns `[..., Q, D]`.

    Encoding also stores k and v; denoising reads a prefix and stores nothing; training uses explicit masks.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Attention(nn.Module):
    """Projections, per-head norms and rotation around an `Attend`. Score scale is 1; the q/k norms carry it."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        layer: LayerConfig = config.layers[index]
        self.index, self.head_dim, self.eps = index, layer.head_dim, config.norm_eps
        self.q_proj = Linear(config.hidden_size, config.num_heads * layer.head_dim)
        self.k_proj = Linear(config.hidden_size, layer.num_kv_heads * layer.head_dim)
        # Full layers have no v_proj: V is the raw K projection, before k_norm and rotation.
        self.v_proj = None if layer.kind == "full" else Linear(config.hidden_size, layer.num_kv_heads * layer.head_dim)
        self.o_proj = Linear(config.num_heads * layer.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(layer.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(layer.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self._heads(self.q_proj(x))
        k = self._heads(self.k_proj(x))
        v = k if self.v_proj is None else self._heads(self.v_proj(x))
        q = kernels.rope(self.q_norm(q), cos, sin)
        k = kernels.rope(self.k_norm(k), cos, sin)
        v = kernels.rms_norm(v, None, self.eps)
        return self.o_proj(attend(self.index, q, k, v).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))
