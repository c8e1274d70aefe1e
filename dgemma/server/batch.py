"""Offline generation over a file of JSON lines: `run_batch(in, out)`, on one process or on several through Ray Data.

Every input line has exactly one output line, in input order, whatever was killed in between. A line's answer depends
on the line and its seed only, never on the number of workers or on who shared a pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgemma.config import is_whole
from dgemma.errors import ConfigError, DataError
from dgemma.server.batch_journal import Journal
from dgemma.server.batch_lines import Answered, Answerer, Line
from dgemma.server.ray_cluster import import_ray, start_ray
from dgemma.settings import Settings


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How the work is spread. None of these changes an answer."""

    workers: int = 1
    """Copies of the model. One runs in this process, without Ray; more are actors of Ray Data."""
    block: int = 32
    """Lines that a worker of several takes at a time; what it has not handed back is done again after a crash."""
    rows: int = 64
    """Lines that one copy of the model answers at a time."""
    address: str | None = None
    """A running Ray cluster (`auto`, `ray://host:10001`); None starts one on this machine."""
    object_store_bytes: int = 200_000_000
    """Shared memory of a Ray that is started here; lines and answers pass through it."""

    def __post_init__(self) -> None:
        for name, low in (("workers", 1), ("block", 1), ("rows", 1), ("object_store_bytes", 80_000_000)):
            value = getattr(self, name)
            if not is_whole(value, low):
                raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")


@dataclass(frozen=True)
class BatchProgress:
    """Where a batch is. `resumed` of the `done` lines were answered by a former run; `tokens` are this run's."""

    done: int
    total: int
    failed: int
    resumed: int
    tokens: int
    seconds: float


def run_batch(
    source: str | Path,
    target: str | Path,
    settings: Settings,
    config: BatchConfig | None = None,
    *,
    overwrite: bool = False,
    advance: Callable[[BatchProgress], object] = lambda progress: None,
) -> BatchProgress:
    """Answer every line of `source`; `target` appears when all are. `advance` hears of every answer.

    A killed run leaves `TARGET.partial`, and the same call goes on from it. Raises `DataError` for files that cannot
    be read, written or continued, `ConfigError` if Ray is needed and missing; a line's own fault becomes its answer.
    """
    config = config or BatchConfig()
    source, target = Path(source), Path(target)
    total, digest = _survey(source)
    if total == 0:
        raise DataError(f"{source} has no lines")
    if target.exists() and target.samefile(source):
        raise DataError(f"{target} is the input; choose another output")
    job = {"format": 1, "input_sha256": digest, "lines": total, "model": settings.model, "dtype": settings.dtype}
    with Journal(target, job | {"generation": dict(settings.generation)}, total) as journal:
        if target.exists() and not overwrite and journal.done == 0:
            raise DataError(f"{target} exists already; remove it, or overwrite it (--overwrite)")
        begun, resumed, tokens = time.perf_counter(), journal.done, 0

        def progress() -> BatchProgress:
            seconds = time.perf_counter() - begun
            return BatchProgress(journal.done, total, journal.failed, resumed, tokens, seconds)

        advance(progress())
        if journal.done < total:
            pending = (line for line in _lines(source) if line.number not in journal)
            with contextlib.closing(_results(pending, settings, config)) as results:
                for answer in results:
                    if journal.add(answer):
                        tokens += answer.tokens
                    advance(progress())
        journal.finish()
        return progress()


def _survey(source: Path) -> tuple[int, str]:
    """Number of lines and the hash of the file."""
    digest, count = hashlib.sha256(), 0
    try:
        with open(source, "rb") as file:
            for raw in file:
                digest.update(raw)
                count += 1
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from None
    return count, digest.hexdigest()


def _lines(source: Path) -> Iterator[Line]:
    with open(source, "rb") as file:
        for number, raw in enumerate(file):
            yield Line(number, raw.removesuffix(b"\n").removesuffix(b"\r"))


def _results(pending: Iterable[Line], settings: Settings, config: BatchConfig) -> Generator[Answered]:
    if config.workers == 1 and config.address is None:
        return Answerer.load(settings, config.rows).answers(pending)
    return _spread(list(pending), settings, config)


def _spread(lines: Sequence[Line], settings: Settings, config: BatchConfig) -> Generator[Answered]:
    """The same on `workers` actors. A block whose actor dies is given to its successor."""
    ray = import_ray(f"a batch on {config.workers} workers")
    threads = settings.threads or max(1, (os.cpu_count() or 1) // config.workers)
    settings = replace(settings, threads=threads)
    gpus = _wants_gpu(settings.device)
    cpus = config.workers * threads
    own = start_ray(ray, config.address, cpus=cpus, object_store_bytes=config.object_store_bytes, logs=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.enable_operator_progress_bars = False
        context.print_on_execution_start = False
        rows = [{"number": line.number, "data": line.data} for line in lines]
        answered = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // config.block)).map_batches(
            _Actor,
            fn_constructor_args=(settings, config.rows),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
            num_cpus=threads,
            **({"num_gpus": 1} if gpus else {}),
        )
        for block in answered.iter_batches(batch_size=None, batch_format="numpy"):
            for number, text, tokens, failed in zip(
                block["number"], block["text"], block["tokens"], block["failed"], strict=True
            ):
                yield Answered(int(number), str(text), int(tokens), bool(failed))
    finally:
        if own:
            ray.shutdown()


class _Actor:
    """A worker of Ray Data: loads its model once, then answers block after block."""

    def __init__(self, settings: Settings, rows: int) -> None:
        self._answerer = Answerer.load(settings, rows)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        lines = (Line(int(n), bytes(data)) for n, data in zip(block["number"], block["data"], strict=True))
        done = list(self._answerer.answers(lines))
        return {name: [getattr(answer, name) for answer in done] for name in ("number", "text", "tokens", "failed")}


def _wants_gpu(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
