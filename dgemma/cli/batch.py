"""Answer every line of a JSONL file: one line out for each line in, in order. A killed run goes on where it was.

A line is {"prompt": "..."} or {"messages": [...]}, with generation settings and an "id" if you like, or OpenAI's batch
shape {"custom_id", "method", "url", "body"}. docs/scale-out.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dgemma.cli.arguments import add_generation, add_loading, settings_of
from dgemma.cli.output import note

if TYPE_CHECKING:
    from dgemma.server.batch import BatchProgress

NAME = "batch"
HELP = "answer a file of JSON lines, resumable, on one worker or several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a JSONL file")
    parser.add_argument("target", metavar="OUT", help="the JSONL file to write; OUT.partial holds what is done")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no summary")
    group = parser.add_argument_group("workers")
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="copies of the model; more than one needs Ray (1)"
    )
    group.add_argument("--block", type=int, default=32, metavar="N", help="lines that a worker takes at a time (32)")
    group.add_argument("--rows", type=int, default=64, metavar="N", help="lines in work at a time in each worker (64)")
    group.add_argument("--address", metavar="URL", help="a running Ray cluster, such as auto or ray://host:10001")
    add_loading(parser)
    add_generation(parser)


def run(arguments: argparse.Namespace) -> int:
    from dgemma.server.batch import BatchConfig, run_batch

    settings = settings_of(arguments)
    config = BatchConfig(
        workers=arguments.workers, block=arguments.block, rows=arguments.rows, address=arguments.address
    )
    last: BatchProgress | None = None

    with _bar(arguments.quiet) as show:

        def advance(progress: BatchProgress) -> None:
            nonlocal last
            last = progress
            show(progress)

        try:
            done = run_batch(
                arguments.source, arguments.target, settings, config, overwrite=arguments.overwrite, advance=advance
            )
        except (KeyboardInterrupt, SystemExit):
            if last is not None and not arguments.quiet:
                kept = f"{last.done} of {last.total} lines are kept in {arguments.target}.partial"
                note(f"{kept}; the same command goes on from there")
            raise
    if not arguments.quiet:
        note(_summary(done))
    return 0


def _summary(done: BatchProgress) -> str:
    parts = [f"{done.total} lines", f"{done.failed} of them errors"]
    if done.resumed:
        parts.append(f"{done.resumed} from a former run")
    parts.append(f"{done.tokens} tokens in {done.seconds:.1f} s")
    return ", ".join([*parts, f"{done.tokens / max(done.seconds, 1e-9):.0f} tok/s"])


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[BatchProgress], object]]:
    """A progress bar on standard error where that is a terminal; nothing in a pipe."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tok/s"),
        TextColumn("{task.fields[failed]} errors"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("lines", total=None, speed=0.0, failed=0)

        def show(progress: BatchProgress) -> None:
            speed = progress.tokens / max(progress.seconds, 1e-9)
            bar.update(task, completed=progress.done, total=progress.total, speed=speed, failed=progress.failed)

        yield show
