"""Measure speed, with a peer beside us on the same weights. Ratios travel between machines, milliseconds do not."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.cli.arguments import add_generation, add_loading, settings_of
from dgemma.cli.output import write, write_json
from dgemma.cli.running import load
from dgemma.errors import RequestError

if TYPE_CHECKING:
    from dgemma.bench.decode import DecodeReport

NAME = "bench"
HELP = "measure speed, beside transformers"
_PIPE_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    text = "Denoising, autoregression and transformers on the same weights, one prompt at a time, taking turns."
    decode = benchmarks.add_parser("decode", help="tokens per second and milliseconds per step", description=text)
    decode.add_argument("--prompts", type=int, default=3, metavar="N", help="how many of the 8 built-in prompts (3)")
    decode.add_argument("--repeats", type=int, default=3, metavar="R", help="runs of each, each with a seed (3)")
    decode.add_argument(
        "--fixed-steps", type=int, default=16, metavar="N", help="steps of the runs without early stop (16)"
    )
    decode.add_argument("--no-peer", action="store_true", help="measure dgemma alone")
    decode.add_argument("--medium", action="store_true", help="measure transformers at matmul precision medium, too")
    decode.add_argument("--json", metavar="FILE", help="write everything measured; - is standard output, no table")
    decode.add_argument("--plot", metavar="FILE", help="write a bar chart (.svg)")
    add_loading(decode)
    add_generation(decode)


def run(arguments: argparse.Namespace) -> int:
    from dgemma.bench.decode import DecodeSettings, run_decode
    from dgemma.bench.report import plot

    settings = DecodeSettings(
        prompts=arguments.prompts,
        repeats=arguments.repeats,
        fixed_steps=arguments.fixed_steps,
        peer=not arguments.no_peer,
        medium=arguments.medium,
    )
    if "mode" in arguments:
        raise RequestError("this benchmark measures both modes; it takes no --mode")
    for path in (arguments.json, arguments.plot):
        _check_place(path)
    if arguments.plot and Path(arguments.plot).suffix.lower() != ".svg":
        raise RequestError(f"--plot writes .svg, got {arguments.plot!r}")
    chosen = settings_of(arguments)
    llm = load(chosen)
    with _telling() as say:
        report = run_decode(llm, settings, chosen.generation, say)
    if arguments.json == "-":
        write_json(report.json())
    else:
        _show(report)
        if arguments.json:
            _save(arguments.json, json.dumps(report.json(), indent=1) + "\n")
    if arguments.plot:
        _save(arguments.plot, plot(report))
    return 0


def _check_place(path: str | None) -> None:
    """Before minutes of work: is there a folder to write to?"""
    if path and path != "-" and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise RequestError(f"{path!r} cannot be written: it is a folder, or its folder does not exist")


def _save(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path!r} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str], object]]:
    """A line in the terminal that says what is going on; nothing in a pipe."""
    if not sys.stdout.isatty():
        yield lambda text: None
        return
    from dgemma.cli.terminal import console

    with console().status("") as status:
        yield status.update


def _show(report: DecodeReport) -> None:
    from dgemma.bench.report import tables
    from dgemma.cli.terminal import console, plain, printable

    screen = console()
    if not screen.is_terminal:
        screen.width = _PIPE_WIDTH
    with screen.capture() as capture:
        for part in tables(report):
            screen.print(part)
    text = capture.get()
    write(text if screen.is_terminal else plain(screen, printable(text)))
