"""Mixture of experts: the router (which reads the raw residual) and the fused expert weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgemma import kernels
from dgemma.config import ModelConfig
from dgemma.kernels.matrix import Matrix
from dgemma.kernels.stacked import stacked_of
from dgemma.model.layers import Linear


class Router(nn.Module):
    """Top-k of a softmax over all experts; weights renormalised, then scaled per expert. See `kernels.route`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k, self.eps = config.top_k_experts, config.norm_eps
        self.proj = Linear(config.hidden_size, config.num_experts)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.route(x, self.proj.weight, self.scale, self.per_expert_scale, self.top_k, self.eps)


class Experts(nn.Module):
    """Fused gated MLPs: `gate_up_proj [E, 2I, H]` (gate rows first), `down_proj [E, H, I]`, or a matrix each."""

    matrices: tuple[Sequence[Matrix], Sequence[Matrix]] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, inner, size = config.num_experts, config.expert_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, size))
        self.down_proj = nn.Parameter(torch.empty(count, size, inner))

    @property
    def stacked(self) -> bool:
        """Whether all matrices of a kind lie together: then no pass has to ask how many rows each expert has."""
        return self.matrices is None or all(stacked_of(matrices) is not None for matrices in self.matrices)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gate_up, down = self.matrices or (self.gate_up_proj, self.down_proj)
        return kernels.experts(x, weights, ids, gate_up, down)

    def replace(self, gate_up: Sequence[Matrix], down: Sequence[Matrix]) -> None:
        """Multiply by one matrix an expert from now on and forget the weights."""
        assert len(gate_up) == len(down)
        self.matrices = gate_up, down
        self.register_parameter("gate_up_proj", None)
        self.register_parameter("down_proj", None)
