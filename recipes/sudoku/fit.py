"""Fit the sampler settings of a Sudoku checkpoint: solve fresh puzzles under a grid of settings and print a table.

The puzzles are made for this alone (seed (9, i)): neither the training nor the held-out sets are touched.

    python recipes/sudoku/fit.py sudoku --bounds 0.01 0.1 --t 0.4:0.8 0.6:1.0 --json build/sudoku/fit.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from build_data import GRADES, Puzzles, graded, make_part
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dgemma.api import LLM
from dgemma.eval.sudoku import attempts, score

SEED = 9


def grid(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for bound, span, confident, stable, steps in itertools.product(
        args.bounds, args.t, args.confidence, args.stability, args.steps
    ):
        low, high = map(float, span.split(":"))
        row = {"entropy_bound": bound, "t_min": low, "t_max": high, "confidence_threshold": confident}
        rows.append(row | {"stability_threshold": stable, "max_denoising_steps": steps})
    return rows


def measure(llm: LLM, sets: dict[str, Puzzles], setting: dict[str, Any], step: Any) -> dict[str, Any]:
    """Solve rate and mean steps of each set under one setting."""
    row: dict[str, Any] = {"setting": setting}
    for name, chosen in sets.items():
        tried = []
        for attempt in attempts(llm, chosen.puzzles, range(len(chosen.puzzles)), **setting):
            tried.append(attempt)
            step()
        row[name] = score(tried, chosen.solutions)
    return row


def table(rows: list[dict[str, Any]], names: list[str]) -> Table:
    shown = Table("bound", "T", "confidence", "stability", "cap", *names, title="solved (steps)")
    for row in rows:
        s = row["setting"]
        cells = [f"{row[name]['solved']['share']:.1%} ({row[name]['steps']['mean']:.1f})" for name in names]
        span = f"{s['t_max']:g} to {s['t_min']:g}"
        fixed = [s["entropy_bound"], span, s["confidence_threshold"], s["stability_threshold"]]
        shown.add_row(*map(str, fixed), str(s["max_denoising_steps"]), *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="sudoku")
    parser.add_argument("--puzzles", type=int, default=100, help="of each set")
    parser.add_argument("--sets", nargs="+", default=["26-32", "minimal"], choices=[grade.name for grade in GRADES])
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.01])
    parser.add_argument("--t", nargs="+", default=["0.4:0.8"], help="t_min:t_max pairs")
    parser.add_argument("--confidence", type=float, nargs="+", default=[0.005])
    parser.add_argument("--stability", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, nargs="+", default=[48])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    llm, settings = LLM.load(args.model), grid(args)
    minimal = make_part(SEED, 0, args.puzzles)
    sets = {grade.name: graded(minimal, grade, SEED) for grade in GRADES if grade.name in args.sets}
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows = []
    with Progress(console=console, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("solving", total=len(settings) * len(sets) * args.puzzles)
        for setting in settings:
            rows.append(measure(llm, sets, setting, lambda: bar.advance(task)))
    console.print(table(rows, list(sets)))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, default=np.ndarray.tolist) + "\n")


if __name__ == "__main__":
    main()
