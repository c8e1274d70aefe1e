"""`dgemma bench gpu`: arguments -> `dgemma.bench.gpu`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dgemma.cli.report import Outcome, add_output, deliver, telling
from dgemma.errors import DgemmaError

NAME = "gpu"
HELP = "random weights of the released shape on one GPU, against its roofline"
DESCRIPTION = (
    "Writes gpu.json and gpu.svg into a folder after every part; the same command again measures what is missing. "
    "The fastest block sizes go into the user's cache, where generate and serve find them. "
    "With --tiny on a CPU, to show that it works."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="for gpu.json, gpu.svg and what a later run needs")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, kernels interpreted")
    parser.add_argument("--formats", metavar="F,F", help="some of bf16, fp8, int4 (all)")
    parser.add_argument("--steps", metavar="N,N", help="steps of a canvas (16,12,20,24)")
    parser.add_argument("--repeats", type=int, metavar="R", help="answers of each kind (5)")
    parser.add_argument("--seconds", type=float, default=450.0, metavar="S", help="begin no part later than this (450)")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.tiny:
        # Triton looks at this when it is first imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from dgemma.bench.gpu import GpuRun, GpuSettings, tiny_settings
    from dgemma.bench.gpu_report import tables

    given = {"repeats": arguments.repeats, "peer": False if arguments.no_peer else None}
    given["formats"] = tuple(arguments.formats.split(",")) if arguments.formats else None
    given["steps"] = _numbers(arguments.steps) if arguments.steps else None
    chosen = {name: value for name, value in given.items() if value is not None}
    settings = tiny_settings(**chosen) if arguments.tiny else GpuSettings(**chosen)
    with telling() as say:
        state = GpuRun(Path(arguments.folder), settings, arguments.seconds, say).run()
    deliver(arguments, Outcome(state, tables(state)))
    if state["failed"]:
        raise DgemmaError("; ".join(f"{part} failed: {reason}" for part, reason in state["failed"].items()))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise DgemmaError(f"--steps takes whole numbers with commas between, got {text!r}") from None
