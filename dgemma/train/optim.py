"""Muon for the matrices of the network, AdamW for embeddings, norms and vectors; float32 masters for bfloat16 weights.

Muon (Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix by a Newton-Schulz iteration. torch's own
`torch.optim.Muon` takes 2-D tensors only; the fused expert weights are 3-D, so the iteration here is batched.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate `U V^T` of `matrix [..., m, n]` (quintic Newton-Schulz in bfloat16)."""
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MasterOptimizer:
    """Holds float32 copies of `named` parameters, steps them, and writes them back in the parameters' own type.

    Matrices (2-D and 3-D, but no embeddings) get Muon with learning rate `lr`, everything else AdamW with `adam_lr`.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        adam_lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        clip: float = 1.0,
    ) -> None:
        self.params = dict(named)
        self.lr, self.adam_lr, self.momentum, self.betas = lr, adam_lr, momentum, betas
        self.weight_decay, self.clip = weight_decay, clip
        self.steps = 0
        self.masters = {name: p.detach().float().clone() for name, p in self.params.items()}
        self.first = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        self.second = {name: torch.zeros_like(m) for name, m in self.masters.items() if not self._is_matrix(name)}

    def _is_matrix(self, name: str) -> bool:
        return self.params[name].ndim >= 2 and "embed" not in name

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """One update with both learning rates times `scale`; returns the gradient norm before clipping."""
        self.steps += 1
        grads = {name: p.grad.float() for name, p in self.params.items() if p.grad is not None}
        norm = float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt())
        shrink = min(1.0, self.clip / (norm + 1e-6))
        for name, grad in grads.items():
            update = self._muon if self._is_matrix(name) else self._adamw
            update(name, grad * shrink, scale)
            self.params[name].copy_(self.masters[name])
            self.params[name].grad = None
        return norm

    def _muon(self, name: str, grad: Tensor, scale: float) -> None:
        moment, master = self.first[name], self.masters[name]
        moment.lerp_(grad, 1 - self.momentum)
        direction = orthogonalise(grad.lerp(moment, self.momentum))
        master.mul_(1 - self.lr * scale * self.weight_decay)
        ratio = max(1.0, grad.shape[-2] / grad.shape[-1]) ** 0.5
        master.add_(direction, alpha=-self.lr * scale * ratio)

    def _adamw(self, name: str, grad: Tensor, scale: float) -> None:
        first, second, master = self.first[name], self.second[name], self.masters[name]
        beta1, beta2 = self.betas
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        bias1, bias2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        master.addcdiv_(first / bias1, (second / bias2).sqrt() + 1e-8, value=-self.adam_lr * scale)

    def state(self) -> dict[str, object]:
        return {"steps": self.steps, "masters": self.masters, "first": self.first, "second": self.second}

    @torch.no_grad()
    def load_state(self, state: dict[str, object]) -> None:
        self.steps = int(state["steps"])  # type: ignore[call-overload]
        for mine, theirs in ((self.masters, "masters"), (self.first, "first"), (self.second, "second")):
            for name, value in state[theirs].items():  # type: ignore[attr-defined]
                mine[name].copy_(value)
        for name, param in self.params.items():
            param.copy_(self.masters[name])


def wsd(step: int, total: int, warmup: int, decay_share: float) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero over the last `decay_share` of the run."""
    if step < warmup:
        return (step + 1) / warmup
    left = total - step
    return min(1.0, left / max(1.0, decay_share * total))
