"""Muon for the matrices of the network, AdamW for the rest (or for all); float32 masters, an average, sharded or not.

Muon (Jordan et al., 2024): momentum, then the nearest semi-orthogonal matrix by a Newton-Schulz iteration. torch's own
`torch.optim.Muon` takes 2-D tensors only; the fused expert weights are 3-D, so the iteration here is batched.
Parameters may be DTensors (FSDP2). It knows no model, no loss and no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from dgemma.errors import ConfigError
from dgemma.kernels.packed import has_bfloat16

OPTIMIZERS = ("muon", "adamw")
SCHEDULES = ("wsd", "cosine")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move. `muon`: matrices by Muon with `lr`, the rest by AdamW with `adam_lr`; `adamw`: all with `lr`.

    Matrices are 2-D and 3-D parameters that are no embeddings; only they decay (`weight_decay`). Gradients longer
    than `clip` are shortened to it. `ema` > 0 keeps an average of the weights with that decay a step.
    """

    name: str = "muon"
    lr: float = 0.012
    adam_lr: float = 0.003
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"optimizer name must be one of {', '.join(OPTIMIZERS)}; got {self.name!r}")
        for field in ("lr", "adam_lr", "clip"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"optimizer {field} must be above 0, got {getattr(self, field)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"optimizer weight_decay must be a number from 0, got {self.weight_decay!r}")
        decays = {"momentum": self.momentum, "ema": self.ema}
        for field, value in {**decays, **{f"betas[{i}]": beta for i, beta in enumerate(self.betas)}}.items():
            if not 0 <= value < 1:
                raise ConfigError(f"optimizer {field} must be at least 0 and below 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves: `warmup` steps up, then as `rate` says. `decay_share` matters to `wsd` only."""

    name: str = "wsd"
    warmup: int = 30
    decay_share: float = 0.4
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ConfigError(f"schedule name must be one of {', '.join(SCHEDULES)}; got {self.name!r}")
        if self.warmup < 0:
            raise ConfigError(f"schedule warmup must be a number of steps from 0, got {self.warmup!r}")
        for field in ("decay_share", "floor"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"schedule {field} must be from 0 to 1, got {getattr(self, field)!r}")


def rate(config: ScheduleConfig, step: int, total: int) -> float:
    """The factor of both learning rates at `step` (from 0) of `total`: linear warm-up to 1, then down to `floor`.

    `wsd` stays at 1 and falls linearly over the last `decay_share` of the run; `cosine` falls from the warm-up on.
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.name == "wsd":
        share = min(1.0, (total - step) / max(1.0, config.decay_share * total))
    else:
        share = (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup))) / 2
    return config.floor + (1 - config.floor) * share


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate `U V^T` of `matrix [..., m, n]` (quintic Newton-Schulz in bfloat16, where the processor has it)."""
    x = matrix.bfloat16() if matrix.device.type != "cpu" or has_bfloat16() else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MasterOptimizer:
    """Steps the trainable ones of `named` parameters in float32 and writes them back in their own type.

    A float32 parameter is its own master; of any other there is a float32 copy. What needs no gradient now is left
    out for good; what is frozen later has no gradient and rests. Either all parameters are DTensors, sharded alike,
    or none is. Then all state is sharded like its parameter, and every rank must call `step`.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        self.params = {name: p for name, p in named if p.requires_grad}
        if not self.params:
            raise ConfigError("nothing to train: every parameter is frozen")
        if len({(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in self.params.values()}) > 1:
            raise ConfigError("parameters must all be sharded alike, or none of them")
        # float() of a float32 tensor is the tensor itself.
        self.masters = {name: p.detach().float() for name, p in self.params.items()}
        self.first = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        self.second = {name: torch.zeros_like(m) for name, m in self.masters.items() if not self._is_muon(name)}
        self.average = {name: m.clone() for name, m in self.masters.items()} if config.ema else {}
        # Per parameter: Adam's correction for its zero start must not count steps for which it was frozen.
        self.steps = {name: torch.zeros((), dtype=torch.int64) for name in self.params}

    def _is_matrix(self, name: str) -> bool:
        return self.params[name].ndim >= 2 and "embed" not in name

    def _is_muon(self, name: str) -> bool:
        return self.config.name == "muon" and self._is_matrix(name)

    @torch.no_grad()
    def step(self, scale: float) -> float:
        """One update with both learning rates times `scale`; drops the gradients.

        Returns the norm of the whole gradient (all ranks') before clipping.
        """
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        norm = _norm(list(grads.values()))
        shrink = min(1.0, self.config.clip / (norm + 1e-6))
        for name, grad in grads.items():
            self.steps[name] += 1
            update = self._muon if self._is_muon(name) else self._adamw
            update(name, _local(grad).float() * shrink, scale)
            self.params[name].grad = None
        for name, average in self.average.items():
            _local(average).lerp_(_local(self.masters[name]), 1 - self.config.ema)
        self._write_back(grads)
        return norm

    def averaged(self) -> dict[str, Tensor]:
        """The float32 weights to evaluate or ship (not copies): the average if there is one, else the masters.

        Parameters that were frozen from the start are not among them.
        """
        return self.average or self.masters

    @torch.no_grad()
    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin at these float32 weights (whole ones, of every parameter here), which bfloat16 parameters only round.

        For a new run, before the first step. Raises `ConfigError` if one is missing.
        """
        missing = [name for name in self.params if name not in weights]
        if missing:
            raise ConfigError(f"no weights to start from for {', '.join(missing)}")
        for name, param in self.params.items():
            whole = weights[name].to(param.device)
            for held in (self.masters, self.average):
                if name in held:
                    _local(held[name]).copy_(_part(whole, param))
        self._write_back(self.params)

    def state(self) -> dict[str, Any]:
        """All that a continued run needs, as nested dicts of the live tensors: may be saved, or filled in place.

        After filling them call `load_state` with them, so that the parameters follow.
        """
        named = {"masters": self.masters, "first": self.first, "second": self.second, "steps": self.steps}
        return {**named, "average": self.average} if self.average else named

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned; raises `ConfigError` where it is another set of parameters.

        One number under `steps` (how states before the freeze schedules have it) stands for every parameter.
        """
        if isinstance(state["steps"], int):
            state = {**state, "steps": {name: torch.tensor(state["steps"]) for name in self.steps}}
        for kind, mine in self.state().items():
            if kind not in state or set(state[kind]) != set(mine):
                raise ConfigError(f"the saved optimizer state has other parameters under {kind!r} than this run")
            for name, value in state[kind].items():
                _local(mine[name]).copy_(_local(value))
        self._write_back(self.params)

    def _muon(self, name: str, grad: Tensor, scale: float) -> None:
        moment, master, config = _local(self.first[name]), _local(self.masters[name]), self.config
        moment.lerp_(grad, 1 - config.momentum)
        direction = self._orthogonal(name, grad.lerp(moment, config.momentum))
        master.mul_(1 - config.lr * scale * config.weight_decay)
        rows, columns = self.params[name].shape[-2:]
        master.add_(direction, alpha=-config.lr * scale * max(1.0, rows / columns) ** 0.5)

    def _orthogonal(self, name: str, local: Tensor) -> Tensor:
        """This rank's part of the orthogonalised matrix.

        Shards of a 3-D parameter are whole experts; a 2-D one is gathered, in bfloat16 as the iteration rounds to that
        anyway, and every rank iterates on all of it.
        """
        param = self.params[name]
        if not isinstance(param, DTensor) or param.ndim > 2:
            return orthogonalise(local)
        mesh, placements, shape, stride = param.device_mesh, param.placements, param.shape, param.stride()
        sharded = DTensor.from_local(local.bfloat16(), mesh, placements, run_check=False, shape=shape, stride=stride)
        return _part(orthogonalise(sharded.full_tensor()), param)

    def _adamw(self, name: str, grad: Tensor, scale: float) -> None:
        first, second, master = (_local(of[name]) for of in (self.first, self.second, self.masters))
        config, steps = self.config, int(self.steps[name])
        lr = (config.adam_lr if config.name == "muon" else config.lr) * scale
        beta1, beta2 = config.betas
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad.square(), 1 - beta2)
        bias1, bias2 = 1 - beta1**steps, 1 - beta2**steps
        if self._is_matrix(name):
            master.mul_(1 - lr * config.weight_decay)
        master.addcdiv_(first / bias1, (second / bias2).sqrt() + 1e-8, value=-lr)

    def _write_back(self, names: Iterable[str]) -> None:
        for name in names:
            if self.params[name].dtype != torch.float32:
                _local(self.params[name].detach()).copy_(_local(self.masters[name]))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (sharing its memory), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of `whole`, which every rank has, if it is sharded like `like`."""
    if not isinstance(like, DTensor):
        return whole
    return _local(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))


def _norm(grads: list[Tensor]) -> float:
    """Euclidean norm of all gradients together, over all ranks; 0 if there are none."""
    if not grads:
        return 0.0
    squares = torch.stack([_local(grad).float().square().sum() for grad in grads]).sum()
    if isinstance(grads[0], DTensor):
        mesh = grads[0].device_mesh
        sums = [Partial() if place.is_shard() else Replicate() for place in grads[0].placements]
        squares = DTensor.from_local(squares, mesh, sums, run_check=False).full_tensor()
    return float(squares.sqrt())
