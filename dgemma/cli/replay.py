"""Play a recorded request again, as it looked. Needs no model: the trace holds the text of its tokens.

It comes from a file, from a server (http://.../v1/traces/ID), or out of a saved stream with drafts.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Generator, Iterator

from dgemma.cli.output import display_for, summarise, summary
from dgemma.cli.running import play
from dgemma.cli.trace_source import open_trace
from dgemma.errors import RequestError
from dgemma.trace import Moment, TraceReader
from dgemma.view import Progress, paced

NAME = "replay"
HELP = "play a recorded trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", metavar="TRACE", help="a trace file, the URL of a trace, or a stream saved from a server; - is a pipe"
    )
    parser.add_argument("--choice", type=int, default=0, metavar="N", help="which answer of a stream, from 0 (0)")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="times as fast as it was (1.0)")
    parser.add_argument("--step", action="store_true", help="one step at a time: a key goes on, q leaves")


def run(arguments: argparse.Namespace) -> int:
    if not (arguments.speed > 0 and math.isfinite(arguments.speed)):
        raise RequestError(f"--speed must be a number more than 0, got {arguments.speed}")
    if arguments.step and not (sys.stdout.isatty() and sys.stdin is not None and sys.stdin.isatty()):
        raise RequestError("--step needs a terminal")
    if arguments.step and arguments.trace == "-":
        raise RequestError("--step reads keys from standard input, so the trace cannot come from there")
    reader = open_trace(arguments.trace, arguments.choice)
    header = reader.header
    display = display_for(
        piece=reader.piece, blank=frozenset(header.blank), prompt=header.prompt, every_step=arguments.step
    )
    if arguments.step:
        moments = _paged(reader)
    else:
        moments = paced(reader, arguments.speed if sys.stdout.isatty() else math.inf)
    progress = Progress()
    with _keys_at_once() if arguments.step else contextlib.nullcontext():
        play(moments, display, progress)
    summarise(summary(progress, header.seed))
    return 0


def _paged(moments: TraceReader) -> Generator[Moment]:
    """Moments one by one, a key press between them."""
    for moment in moments:
        yield moment
        if _read_key() == "q":
            return


@contextlib.contextmanager
def _keys_at_once() -> Iterator[None]:
    """Keys arrive unseen and without Enter. Ctrl-C stays ctrl-C."""
    import termios
    import tty

    kept = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, kept)


def _read_key() -> str:
    """Wait for a key; the end of input is a q."""
    return os.read(sys.stdin.fileno(), 16).decode(errors="replace").lower() or "q"
