"""What a measurement leaves: tables on the screen, JSON and a chart in files. Knows no benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli.output import write, write_json
from dgemma.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

_PIPE_WIDTH = 120

Say = Callable[[str], object]


@dataclass(frozen=True)
class Outcome:
    """What was measured: everything as JSON has it, what the screen shows, and an SVG for who asks for it."""

    data: Any
    parts: Iterable[RenderableType]
    chart: Callable[[], str] | None = None


def add_output(parser: argparse.ArgumentParser, plot: bool = False) -> None:
    """`--json` and, where there is a chart, `--plot`."""
    parser.add_argument("--json", metavar="FILE", help="write everything measured; - is standard output, no table")
    if plot:
        parser.add_argument("--plot", metavar="FILE", help="write a chart (.svg)")


def check_output(arguments: argparse.Namespace) -> None:
    """A `RequestError` before minutes of work, not after them: is there a folder to write to?"""
    json_file, plot = getattr(arguments, "json", None), getattr(arguments, "plot", None)
    for path in (json_file, plot):
        if path and path != "-" and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise RequestError(f"{path!r} cannot be written: it is a folder, or its folder does not exist")
    if plot and Path(plot).suffix.lower() != ".svg":
        raise RequestError(f"--plot writes .svg, got {plot!r}")


def deliver(arguments: argparse.Namespace, outcome: Outcome) -> None:
    """JSON, tables, or both, and the chart; as `add_output`'s flags say."""
    if arguments.json == "-":
        write_json(outcome.data)
    else:
        _show(outcome.parts)
        if arguments.json:
            _save(arguments.json, json.dumps(outcome.data, indent=1) + "\n")
    if outcome.chart and arguments.plot:
        _save(arguments.plot, outcome.chart())


@contextlib.contextmanager
def telling() -> Iterator[Say]:
    """A line in the terminal that says what is going on; nothing in a pipe."""
    if not sys.stdout.isatty():
        yield lambda text: None
        return
    from dgemma.cli.terminal import console

    with console().status("") as status:
        yield status.update


def _save(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path!r} cannot be written: {error.strerror}") from None


def _show(parts: Iterable[RenderableType]) -> None:
    from dgemma.cli.terminal import console, plain, printable

    screen = console()
    if not screen.is_terminal:
        screen.width = _PIPE_WIDTH
    with screen.capture() as capture:
        for part in parts:
            screen.print(part)
    text = capture.get()
    write(text if screen.is_terminal else plain(screen, printable(text)))
