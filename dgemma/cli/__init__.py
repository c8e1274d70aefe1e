"""The `dgemma` command: arguments to settings to one call of the library. One file a command, no logic."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from dgemma import __version__
from dgemma.cli import (
    batch,
    bench,
    calibrate,
    chat,
    edit,
    generate,
    infill,
    info,
    quantize,
    replay,
    score,
    serve,
    sudoku,
    train,
)
from dgemma.cli.arguments import Parser
from dgemma.cli.output import abandon_stdout, complain, flush, prepare_streams
from dgemma.errors import DgemmaError

COMMANDS = (
    generate, chat, infill, edit, serve, batch, score, info, replay, sudoku, train, calibrate, quantize, bench,
)  # fmt: skip
OK, USAGE, INTERRUPTED, TERMINATED = 0, 2, 130, 143
ENGINE_THREAD = "dgemma-engine"
_PATIENCE_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Exit status 0: done; 2: an error of the user's, told in one line; 130: ctrl-C."""
    if argv is not None:
        return _run(argv)
    signal.signal(signal.SIGTERM, _terminate)
    status = _run(sys.argv[1:])
    for thread in threading.enumerate():
        if thread.name == ENGINE_THREAD:
            thread.join(_PATIENCE_S)
            if thread.is_alive():
                # Python would wait for its forward pass, which a person who pressed ctrl-C would not.
                abandon_stdout()
                os._exit(status)
    return status


def _run(argv: Sequence[str]) -> int:
    try:
        prepare_streams()
        try:
            arguments = _parser().parse_args(argv)
            status = int(arguments.run(arguments))
        except SystemExit as stop:  # --help and --version leave this way
            status = stop.code if isinstance(stop.code, int) else OK
        flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has what it wanted
        abandon_stdout()
        return OK
    except DgemmaError as error:
        complain(str(error))
        abandon_stdout()
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dgemma",
        description="Run block-diffusion language models of the DiffusionGemma class.",
        epilog="dgemma COMMAND --help tells more. Settings may also stand in DGEMMA_* variables and in "
        "~/.config/dgemma/config.toml.",
    )
    parser.add_argument("--version", action="version", version=f"dgemma {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        own = commands.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception it unwinds, so that the terminal gets its cursor back.
    sys.exit(TERMINATED)
