"""The training loop: steps, metrics, checkpoints that survive a kill, resume that continues the same run."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dgemma.diffusion.loss import Objective, by_noise_level
from dgemma.errors import DataError
from dgemma.model import DiffusionGemma
from dgemma.train.objective import Batch, Losses, denoising_loss
from dgemma.train.optim import MasterOptimizer, wsd

NOISE_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Batches(Protocol):
    """Where batches come from: functions of the step, so that a resumed run sees the same ones."""

    def batch(self, step: int) -> Batch: ...

    def source_name(self, step: int) -> str:
        """Which source the batch of a step is drawn from (for the log)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length and schedule of a run. `decay_share` of the steps cool down linearly to zero."""

    steps: int
    warmup: int = 30
    decay_share: float = 0.4
    lr: float = 0.012
    adam_lr: float = 0.003
    seed: int = 0
    save_every: int = 25
    objective: Objective = Objective()


def train(model: DiffusionGemma, batches: Batches, config: LoopConfig, folder: Path) -> bool:
    """Run or resume in `folder` (`state.pt`, `metrics.jsonl`). True when finished, false when interrupted and saved.

    Batches, noise and signals are functions of (seed, step), so a resumed run repeats nothing and skips nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = MasterOptimizer(model.named_parameters(), lr=config.lr, adam_lr=config.adam_lr)
    state_file = folder / "state.pt"
    begin, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        optimizer.load_state(state["optimizer"])
        begin, seconds = state["step"], state["seconds"]
    stop = _Interrupt()
    with (
        stop,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        ) as progress,
        (folder / "metrics.jsonl").open("a") as log,
    ):
        task = progress.add_task("training", total=config.steps, completed=begin)
        for step in range(begin, config.steps):
            started = time.monotonic()
            batch = batches.batch(step)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            losses = denoising_loss(model, batch, generator, config.objective)
            losses.total.backward()
            norm = optimizer.step(wsd(step, config.steps, config.warmup, config.decay_share))
            seconds += time.monotonic() - started
            record = _record(step, losses, norm, seconds, batch.ids.shape[0], batches.source_name(step))
            if not math.isfinite(record["canvas"]):
                raise DataError(f"step {step}: the loss is {record['canvas']}; lower the learning rate ({config.lr})")
            log.write(json.dumps(record) + "\n")
            log.flush()
            rate = losses.t.numel() / (time.monotonic() - started)
            progress.update(task, advance=1, description=f"{_text(record)}  {rate:,.0f} tok/s")
            last = step + 1 == config.steps
            if last or stop.asked or (step + 1) % config.save_every == 0:
                state = {
                    "step": step + 1,
                    "seconds": seconds,
                    "optimizer": optimizer.state(),
                    "loop": asdict(config),
                }
                save_atomically(state_file, partial(torch.save, state))
            if stop.asked and not last:
                return False
    return True


def _record(step: int, losses: Losses, norm: float, seconds: float, rows: int, source: str) -> dict[str, Any]:
    return {
        "step": step,
        "source": source,
        "rows": rows,
        "canvas": float(losses.canvas),
        "encoder": float(losses.encoder),
        "by_t": by_noise_level(losses.per_position, losses.valid, losses.t, NOISE_EDGES),
        "grad_norm": norm,
        "tokens": int(losses.valid.sum()),
        "seconds": round(seconds, 1),
    }


def _text(record: dict[str, Any]) -> str:
    return f"canvas {record['canvas']:.3f}  encoder {record['encoder']:.3f}"


def save_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename over it: a kill leaves the old file or the new one, never half of one."""
    beside = path.with_suffix(".part")
    write(beside)
    os.replace(beside, path)


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
