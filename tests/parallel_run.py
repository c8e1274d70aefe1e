"""What tests/test_parallel.py trains: in one process, or as a program under torchrun; the same cases and code."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from train_kit import CONFIG

from dgemma.diffusion.loss import Objective
from dgemma.model import DiffusionGemma
from dgemma.train import state
from dgemma.train.attend import Layout
from dgemma.train.init import new_model
from dgemma.train.objective import OFFICIAL, Batch, denoising_loss
from dgemma.train.optim import MasterOptimizer, OptimConfig
from dgemma.train.parallel import Parallel

STEPS = 5
RESUMED = ("muon", "frozen")


@dataclass(frozen=True)
class Case:
    """How one run differs from the others. `frozen` names a part whose parameters rest before step 2."""

    optimizer: OptimConfig
    objective: Objective = OFFICIAL
    dtype: torch.dtype = torch.float32
    frozen: str | None = None
    accumulation: int = 1
    recompute: bool = False


ADAMW = OptimConfig(name="adamw", lr=0.003)
CASES = {
    # Muon rounds to bfloat16 inside, so differences of 1e-7 in a gradient grow with its learning rate.
    "muon": Case(OptimConfig(lr=0.0005, ema=0.5)),
    "adamw": Case(ADAMW, accumulation=2),
    "frozen": Case(ADAMW, frozen="layers.1"),
    "no encoder": Case(ADAMW, Objective(encoder_weight=0.0, self_conditioning=0.2), recompute=True),
    "bf16": Case(OptimConfig(), dtype=torch.bfloat16),
}


def batch(step: int) -> Batch:
    """Five examples (no multiple of two), each corrupted twice."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(97, (5, 20), generator=generator)
    valid = torch.rand(5, 20, generator=generator) < 0.8
    return Batch(ids, valid, Layout(torch.randint(1, 5, (5,), generator=generator), 20, 16, 8, draws=2))


def lopsided(model: DiffusionGemma, given: Batch, generator: torch.Generator, objective: Objective, **part: Any) -> Any:
    """The loss; where there are several ranks, the first one runs passes without gradient that the others do not."""
    if part.get("part") == (0, 2):
        with torch.no_grad():
            denoising_loss(model, given, torch.Generator().manual_seed(0), objective, **part)
    return denoising_loss(model, given, generator, objective, **part)


def run(case: Case, parallel: Parallel, folder: Path, resume: Path | None = None) -> dict[str, Any]:
    """Train `STEPS` steps from scratch, or one step more from a saved state; whatever there is to compare."""
    model = new_model(CONFIG, 2)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    if case.recompute:
        for block in model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    compute = parallel.wrap(model.to(case.dtype), partial(lopsided, objective=case.objective))
    optimizer = MasterOptimizer(model.named_parameters(), case.optimizer)
    optimizer.start_from(masters)
    begin, end, losses, norms = 0, STEPS, [], []
    if resume is not None:
        begin, end = STEPS, STEPS + 1
        tensors = optimizer.state()
        state.load(resume, tensors)
        optimizer.load_state(tensors)
    loaded = copy.deepcopy({kind: parallel.whole(values) for kind, values in optimizer.state().items()})
    for step in range(begin, end):
        for name, param in model.named_parameters():
            param.requires_grad_(case.frozen is None or case.frozen not in name or step >= 2)
        for micro in range(case.accumulation):
            made = compute(batch(10 * step + micro), torch.Generator().manual_seed(step))
            (made.total / case.accumulation).backward()
            losses.append(parallel.sum([float(made.total.detach()), float(made.canvas), float(made.encoder)]))
        norms.append(optimizer.step(0.5))
        if case.frozen is not None and step == 1:
            for name, master in parallel.whole(optimizer.masters).items():
                assert torch.equal(master, masters[name]) == (case.frozen in name), name
    state.save(folder, end, optimizer.state(), {"norms": norms})
    plain = parallel.plain(model)
    with torch.no_grad():
        after = float(denoising_loss(plain, batch(0), torch.Generator().manual_seed(0), case.objective).total)
    return {
        "losses": losses,
        "norms": norms,
        "weights": parallel.whole(optimizer.masters),
        "averaged": parallel.whole(optimizer.averaged()),
        "plain": {name: p.detach() for name, p in plain.named_parameters()},
        "after": after,
        "state": {kind: parallel.whole(values) for kind, values in optimizer.state().items()},
        "loaded": loaded,
        "bytes": held_bytes(list(model.parameters()), optimizer),
    }


def same_gradients(parallel: Parallel) -> dict[str, torch.Tensor]:
    """Masters after two Muon steps on given gradients, the same whatever the number of processes."""
    model = new_model(CONFIG, 3)
    parallel.wrap(model, denoising_loss)
    optimizer = MasterOptimizer(model.named_parameters(), OptimConfig(clip=math.inf))
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            gradient = torch.randn(param.shape, generator=generator)
            if isinstance(param, DTensor):
                gradient = distribute_tensor(gradient, param.device_mesh, param.placements)
            param.grad = gradient
        optimizer.step(1.0)
    return parallel.whole(optimizer.masters)


def held_bytes(params: list[torch.nn.Parameter], optimizer: MasterOptimizer) -> int:
    """Memory of this rank's parts of weights and optimizer state; what shares memory counts once."""
    tensors = [*params, *(tensor for part in optimizer.state().values() for tensor in part.values())]
    local = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in local}.values())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    parallel = Parallel.from_environment()
    for name, case in CASES.items():
        result = run(case, parallel, folder / "two" / name)
        torch.save(result, folder / f"{name}.{parallel.rank}.pt")
    torch.save(same_gradients(parallel), folder / f"same gradients.{parallel.rank}.pt")
    for name in RESUMED:
        before = state.latest(folder / "one" / name)
        torch.save(run(CASES[name], parallel, folder / "again", before), folder / f"{name}.resumed.{parallel.rank}.pt")
    parallel.close()
