"""The small parts: norm, linear, embedding, gated MLP, rotation tables. Shapes `[..., H]`; no masks, no caches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgemma import kernels
from dgemma.config import RopeConfig
from dgemma.kernels.matrix import Matrix


class RMSNorm(nn.Module):
    """`kernels.rms_norm` over `size` with a weight that multiplies directly."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A bias-free `nn.Linear` whose product goes through the kernel table, or a `matrix` in place of its weight."""

    matrix: Matrix | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight) if self.matrix is None else self.matrix(x)

    def replace(self, matrix: Matrix) -> None:
        """Multiply by `matrix` from now on and forget the weight."""
        assert matrix.shape == (self.out_features, self.in_features)
        self.matrix = matrix
        self.register_parameter("weight", None)

    def restore(self, weight: Tensor) -> None:
        """Multiply by a plain `weight [out, in]` from now on, whatever stood here."""
        assert weight.shape == (self.out_features, self.in_features)
        self.matrix = None
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


class Embedding(nn.Embedding):
    """Token embedding times sqrt(H); the factor is rounded to the weight's type (53.066 becomes 53.0 in bfloat16)."""

    @property
    def scale(self) -> Tensor:
        return torch.tensor(self.embedding_dim**0.5).to(self.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale  # a number of the host: a recorded step may not copy it


class GatedMLP(nn.Module):
    """`down(gelu(gate x) * up x)`."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner)
        self.up_proj = Linear(size, inner)
        self.down_proj = Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.gelu(self.gate_proj(x)) * self.up_proj(x))


class Rotation:
    """cos and sin tables of one layer kind. Not a module: frequencies stay float32 when the model is cast."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        with torch.device("cpu"):  # also when the model is built on the meta device
            self.frequencies = kernels.rope_frequencies(head_dim, config.theta, config.partial, config.factor)
        self._there: dict[torch.device, Tensor] = {}  # a copy to a device waits for it, so no step makes one

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        device = positions.device
        if device not in self._there:
            self._there[device] = self.frequencies.to(device)
        return kernels.rope_tables(positions, self._there[device], dtype)
