"""What a run says while it runs: a line of JSON a step, TensorBoard if asked, a progress bar in a terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dgemma.diffusion.loss import by_noise_level
from dgemma.errors import ConfigError, DataError
from dgemma.train.objective import Losses

NOISE_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
JOURNAL = "metrics.jsonl"


@dataclass
class Record:
    """One step: losses in nats (the mean over its batches), `tokens` noisy targets, `seconds` since the beginning."""

    step: int
    source: str = ""
    rows: int = 0
    canvas: float = 0.0
    encoder: float = 0.0
    by_t: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    more: dict[str, float] = field(default_factory=dict)
    """What a loss of its own kind tells beside."""

    def add(self, source: str, rows: int, losses: Losses, ranks: Any, batches: int) -> None:
        """Count one of `batches` batches; `ranks.sum` adds what each rank has of it."""
        canvas, encoder, tokens = ranks.sum([float(losses.canvas), float(losses.encoder), float(losses.valid.sum())])
        self.source, self.rows = source, self.rows + rows
        self.canvas += canvas / batches
        self.encoder += encoder / batches
        self.tokens += int(tokens)
        own = {f.name for f in fields(losses)} - {f.name for f in fields(Losses)}
        self.more = {name: float(getattr(losses, name)) for name in sorted(own)}
        self.by_t = by_noise_level(losses.per_position, losses.valid, losses.t, NOISE_EDGES)


class Journal:
    """Writes records. Opened for a resumed run, it drops the lines of steps that will be done again."""

    def __init__(self, folder: Path, begin: int, config: Any, quiet: bool = False) -> None:
        self._quiet, self._config = quiet, config
        self._path = folder / JOURNAL
        self._console = Console(stderr=True)
        self._board: Any = None
        if not quiet:
            _rewind(self._path, begin)
        if config.tensorboard and not quiet:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError("loop.tensorboard needs tensorboard: pip install 'dgemma[train]'") from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=begin)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=config.steps, completed=begin)

    def __enter__(self) -> Journal:
        self._file = None if self._quiet else self._path.open("a", encoding="utf-8")
        self._progress.start()
        return self

    def write(self, record: Record, seconds: float) -> None:
        """Record one step that took `seconds`."""
        if self._file is None:
            return
        self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()
        text = f"canvas {record.canvas:.3f}  encoder {record.encoder:.3f}  {record.tokens / seconds:,.0f} tok/s"
        self._progress.update(self._task, advance=1, description=text)
        done = record.step + 1
        # Where nothing can be redrawn (a log file), a line now and then.
        if not self._console.is_terminal and (done % self._config.save_every == 0 or done == self._config.steps):
            self._console.print(f"step {done}/{self._config.steps}  {text}", highlight=False)
        if self._board is not None:
            for name in ("canvas", "encoder", "grad_norm"):
                self._board.add_scalar(name, getattr(record, name), record.step)
            for level, value in record.by_t.items():
                self._board.add_scalar(f"canvas by noise level/{level}", value, record.step)
            for name, value in record.more.items():
                self._board.add_scalar(name, value, record.step)
            self._board.add_scalar("tokens per second", record.tokens / seconds, record.step)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first. A last line that a kill cut short is left out."""
    path = folder / JOURNAL
    if not path.is_file():
        raise DataError(f"{path}: no such file; is {folder} the folder of a run?")
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _rewind(path: Path, begin: int) -> None:
    if not path.is_file():
        return
    kept = [record for record in read_journal(path.parent) if record["step"] < begin]
    beside = path.with_suffix(".part")
    beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    beside.replace(path)
