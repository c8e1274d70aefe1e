"""Several processes train one model: FSDP2 shards weights, gradients and optimizer state, each computes some rows.

Started by `torchrun`, whose environment says who is who. All processes build the same batch and draw the same noise,
each takes every world-th example, and the gradients add up: one run, whatever the number of processes. Knows no
optimizer and no files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dgemma.errors import ConfigError
from dgemma.model import DiffusionGemma
from dgemma.train.objective import Batch, Losses

Compute = Callable[[Batch, torch.Generator], Losses]
"""This rank's part of the losses: over all ranks they add up to the batch's, and so do the gradients."""


class TrainingStep(nn.Module):
    """The root that is sharded. The objective runs inside its forward: it calls two passes and the tied embedding."""

    def __init__(self, model: DiffusionGemma, loss: Callable[..., Losses], part: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.loss, self.part = model, loss, part

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        # A plain tuple: FSDP finds the tensors in it that the backward pass begins at.
        losses = self.loss(self.model, batch, generator, part=self.part)
        self.kind = type(losses)
        return tuple(getattr(losses, field.name) for field in fields(losses))


class Parallel:
    """Who we are among how many. The default is one process, for which every method is the plain thing."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._skeleton: DiffusionGemma | None = None

    @staticmethod
    def from_environment() -> Parallel:
        """Join the processes that `torchrun` started (gloo, and NCCL beside it on CUDA); alone if there are none."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return Parallel()
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        return Parallel(dist.get_rank(), dist.get_world_size())

    def wrap(self, model: DiffusionGemma, loss: Callable[..., Losses]) -> Compute:
        """Shard `model` in place (its parameters become DTensors) and return what computes this rank's losses.

        `loss(model, batch, generator, part=(rank, world))` may run passes without gradient on some ranks only; those
        with gradient must be the same on all. Every rank must hold the same weights; optimizers are made afterwards.
        """
        if self.world == 1:
            return lambda batch, generator: loss(model, batch, generator)
        hollow = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
        self._skeleton = copy.deepcopy(model, hollow)
        root = TrainingStep(model, loss, (self.rank, self.world))
        _shard(root, list(model.layers)[:-1], init_device_mesh(next(model.parameters()).device.type, (self.world,)))

        def compute(batch: Batch, generator: torch.Generator) -> Losses:
            self.check(batch)
            values = root(batch, generator)
            return root.kind(*values)

        return compute

    def check(self, batch: Batch) -> None:
        """Raises `ConfigError` for a batch that leaves some rank without an example."""
        if len(batch.ids) < self.world:
            raise ConfigError(
                f"a batch of {len(batch.ids)} examples cannot be shared by {self.world} processes; "
                "start fewer, or make batches larger"
            )

    def plain(self, model: DiffusionGemma) -> DiffusionGemma:
        """The model that `wrap` sharded as an ordinary one with whole weights, on the CPU of every rank."""
        if self._skeleton is None:
            return model
        whole = copy.deepcopy(self._skeleton)
        whole.load_state_dict(self.whole(dict(model.named_parameters())), strict=False, assign=True)
        return whole

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather sharded tensors on the CPU of every rank; what is whole there already is not copied.

        All ranks call it together, with the same names in the same order.
        """
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
            for name, tensor in tensors.items()
        }

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the ranks."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank; the same answer on all."""
        return self.sum([float(flag)])[0] > 0

    def close(self) -> None:
        """Leave the others, at the end of the program."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _shard(root: nn.Module, units: list[nn.Module], mesh: DeviceMesh) -> None:
    """Every unit is gathered, and its gradients are added up, at once; the root has what is in no unit.

    The last block is no unit: without an encoder loss nothing but its keys and values leaves its first pass, and FSDP
    would not see that the backward pass needs it again.

    Once gathered for the first pass, weights stay whole until the backward pass, and what is gathered then is told in
    advance. Otherwise a pass that one rank runs and another does not (a first prediction that only some rows are
    told) would be a collective call without partners.
    """
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32)  # bfloat16 gradients are added up in float32
    sharded = [fully_shard(unit, mesh=mesh, mp_policy=wide, reshard_after_forward=False) for unit in (*units, root)]
    for unit, before in zip(sharded, (sharded[0], *sharded), strict=False):
        unit.set_gradient_divide_factor(1.0)  # a sum: the parts are normalised by the whole batch
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
        unit.set_modules_to_backward_prefetch([before])
