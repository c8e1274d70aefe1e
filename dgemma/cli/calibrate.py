"""Fit one temperature for each kind of question on half of the data, and report on the other half beside the encoder.

DATA.jsonl has a question a line: {"template": "A dog barks. Is it loud? [[answer]].", "kind": "yesno", "labels":
["Yes", "No"], "answer": "Yes"}. The temperatures go to calibration.json in the checkpoint's folder, where `LLM.decide`
and /v1/systemone find them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.cli.arguments import add_loading, settings_of
from dgemma.cli.output import write, write_json
from dgemma.cli.running import load

if TYPE_CHECKING:
    from dgemma.eval.calibration import Reliability
    from dgemma.eval.decisions import Report

NAME = "calibrate"
HELP = "fit the probabilities of decision reads to known answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a shipped name, a checkpoint folder, or a Hugging Face id")
    parser.add_argument("data", metavar="DATA.jsonl", help="questions with their answers; see docs/decisions.md")
    parser.add_argument("--out", metavar="FILE", help="write the temperatures here (default: the checkpoint's folder)")
    parser.add_argument("--draws", type=int, default=4, metavar="N", help="noise draws a question (4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise (0)")
    parser.add_argument("--fit-share", type=float, default=0.5, metavar="X", help="share of passages to fit on (0.5)")
    parser.add_argument("--plot", metavar="FILE", help="draw a reliability diagram of the other split (.png, .svg)")
    add_loading(parser, but=("model",))
    parser.add_argument("--json", action="store_true", help="one JSON object, with the bins")


def run(arguments: argparse.Namespace) -> int:
    from dgemma.control.decision import CALIBRATION
    from dgemma.eval.calibration import plot_reliability
    from dgemma.eval.decisions import fit, load_items, measure

    items = load_items(arguments.data)
    llm = load(settings_of(arguments))
    with _bar() as advance:
        measured = measure(llm, items, draws=arguments.draws, seed=arguments.seed, advance=advance)
    calibration, reports = fit(measured, share=arguments.fit_share)
    path = calibration.save(Path(arguments.out) if arguments.out else llm.folder / CALIBRATION)
    if arguments.plot:
        plot_reliability({one.kind: _curves(one) for one in reports}, arguments.plot)
    if arguments.json:
        write_json({"model": llm.name, "calibration": str(path), "kinds": [one.json() for one in reports]})
    else:
        write(_table(reports) + f"temperatures: {path}\n")
    return 0


def _curves(report: Report) -> dict[str, Reliability]:
    return {
        "denoiser": report.raw,
        f"denoiser, T {report.temperature:.2f}": report.calibrated,
        "encoder": report.encoder_raw,
        f"encoder, T {report.encoder_temperature:.2f}": report.encoder_calibrated,
    }


def _table(reports: list[Report]) -> str:
    """A row for each kind and reader: what the test split says before and after."""
    rows = [("kind", "reader", "fitted on", "tested on", "T", "accuracy", "ECE raw", "fitted", "NLL raw", "fitted")]
    for one in reports:
        readers = (
            ("denoiser", one.temperature, one.raw, one.calibrated),
            ("encoder", one.encoder_temperature, one.encoder_raw, one.encoder_calibrated),
        )
        for reader, temperature, raw, fitted in readers:
            counts = (str(one.fitted_on), str(raw.count))
            numbers = (f"{raw.ece:.3f}", f"{fitted.ece:.3f}", f"{raw.nll:.3f}", f"{fitted.nll:.3f}")
            rows.append((one.kind, reader, *counts, f"{temperature:.2f}", f"{fitted.accuracy:.1%}", *numbers))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line}\n" for line in lines)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar in a terminal, gone when done; nothing in a pipe."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.progress import Progress

    from dgemma.cli.terminal import console

    with Progress(console=console(), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
