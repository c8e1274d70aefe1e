"""The training loop: steps, checkpoints that survive a kill, resume that continues the very same run.

It knows neither files of text nor recipes: batches are functions of the step, the loss is a function of a batch.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from dgemma.errors import ConfigError, DataError
from dgemma.kernels.packed import has_bfloat16
from dgemma.model import DiffusionGemma
from dgemma.train import state
from dgemma.train.metrics import Journal, Record
from dgemma.train.objective import Batch, Losses, denoising_loss
from dgemma.train.optim import MasterOptimizer, OptimConfig, ScheduleConfig, rate
from dgemma.train.parallel import Parallel

Loss = Callable[..., Losses]
"""`(model, batch, generator, part=(rank, world)) -> Losses`."""


class Batches(Protocol):
    """Where batches come from: functions of the step, so that a resumed run sees the same ones."""

    def batch(self, step: int) -> Batch: ...

    def source_name(self, step: int) -> str:
        """Which source the batch of a step is drawn from (for the log)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of a run and how it computes.

    A step is `accumulation` batches. `device` auto is a CUDA GPU if there is one. `precision` bf16 keeps bfloat16
    weights beside float32 masters; auto is that, but on CPUs that cannot multiply bfloat16. `recompute` is activation
    checkpointing: a layer's activations are computed again in the backward pass.
    """

    steps: int
    accumulation: int = 1
    device: str = "auto"
    precision: str = "auto"
    recompute: bool = False
    seed: int = 0
    save_every: int = 50
    keep: int = 2
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"loop.device must be auto, cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("loop.device is cuda, but torch sees no CUDA GPU here")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"loop.precision must be auto, bf16 or fp32, got {self.precision!r}")

    @property
    def place(self) -> torch.device:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name if self.device == "auto" else self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in a pass."""
        slow = self.precision == "auto" and self.place.type == "cpu" and not has_bfloat16()
        return torch.float32 if slow else self.stored

    @property
    def stored(self) -> torch.dtype:
        """Of the weights in the checkpoint that is made."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16


@dataclass
class Run:
    """A run at one moment: what is trained, how far it is. `finished` says whether the last step was done."""

    optimizer: MasterOptimizer
    step: int = 0
    seconds: float = 0.0
    finished: bool = False


def train(
    model: DiffusionGemma,
    batches: Batches,
    config: LoopConfig,
    folder: Path,
    *,
    optimizer: OptimConfig | None = None,
    schedule: ScheduleConfig | None = None,
    loss: Loss = denoising_loss,
    before_step: Callable[[int], None] | None = None,
    parallel: Parallel | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Run:
    """Run or resume in `folder` (`state/`, `metrics.jsonl`); SIGINT and SIGTERM save and return.

    `model` comes in float32 and is cast if the configuration says so. `before_step(step)` may freeze parameters.
    `identity` is what must not change between a run and its resumption (`ConfigError` names the difference).
    Raises `DataError` when the loss is not finite: the last saved state stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.recompute:
        _recompute(model)
    parallel = parallel or Parallel()
    schedule = schedule or ScheduleConfig()
    exact = {} if config.dtype == torch.float32 else _copies(model)
    compute = parallel.wrap(model.to(config.dtype), loss)
    run = Run(MasterOptimizer(model.named_parameters(), optimizer or OptimConfig()))
    if exact:
        run.optimizer.start_from(exact)
        exact.clear()  # a whole model's worth of memory, for the rest of the run
    _resume(run, folder, dict(identity or {}))
    save = partial(_save, run, folder, dict(identity or {}), config.keep)
    with _Interrupt() as stop, Journal(folder, run.step, config, quiet=parallel.rank > 0) as journal:
        while run.step < config.steps:
            if before_step is not None:
                before_step(run.step)
            started = time.monotonic()
            record = _step(compute, batches, run, config, rate(schedule, run.step, config.steps), parallel)
            run.step += 1
            run.seconds += time.monotonic() - started
            record.seconds = round(run.seconds, 1)
            if not math.isfinite(record.canvas + record.encoder + record.grad_norm):
                raise DataError(f"step {record.step}: the loss is {record.canvas}; lower the learning rate")
            journal.write(record, time.monotonic() - started)
            asked = parallel.any(stop.asked)
            if run.step == config.steps or asked or run.step % config.save_every == 0:
                save()
            if asked:
                break
    run.finished = run.step >= config.steps
    return run


def _step(compute: Loss, batches: Batches, run: Run, config: LoopConfig, scale: float, parallel: Parallel) -> Record:
    """One optimiser step over `accumulation` batches. Their noise has seeds of its own."""
    record = Record(run.step)
    for micro in range(config.accumulation):
        at = run.step * config.accumulation + micro
        batch = batches.batch(at)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + at)
        losses = compute(batch, generator)
        (losses.total / config.accumulation).backward()
        record.add(batches.source_name(at), len(batch.ids), losses, parallel, config.accumulation)
    record.grad_norm = run.optimizer.step(scale)
    return record


def _save(run: Run, folder: Path, identity: dict[str, Any], keep: int) -> None:
    info = {"step": run.step, "seconds": run.seconds, "identity": identity}
    state.save(folder / "state", run.step, run.optimizer.state(), info, keep=keep)


def _resume(run: Run, folder: Path, identity: dict[str, Any]) -> None:
    found = state.latest(folder / "state")
    if found is None:
        return
    tensors = run.optimizer.state()
    info = state.load(found, tensors)
    before = info["identity"]
    changed = [key for key in sorted({*before, *identity}) if before.get(key) != identity.get(key)]
    if changed:
        raise ConfigError(
            f"{folder} holds a run whose {', '.join(changed)} differ from this recipe's; choose another folder, or "
            "give the recipe that it was started with"
        )
    run.optimizer.load_state(tensors)
    run.step, run.seconds = info["step"], info["seconds"]


def _copies(model: DiffusionGemma) -> dict[str, torch.Tensor]:
    """The float32 weights before they are rounded: masters begin with these."""
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def _recompute(model: DiffusionGemma) -> None:
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


class _Interrupt:
    """SIGINT and SIGTERM ask the loop to save and stop; the previous handlers come back at the end."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupt:
        self._old = {sig: signal.signal(sig, self._ask) for sig in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: Any) -> None:
        for sig, handler in self._old.items():
            signal.signal(sig, handler)
