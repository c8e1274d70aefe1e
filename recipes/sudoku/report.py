"""Measure the Sudoku model on the held-out sets: prints a table, writes report.json and the card into its folder.

    python recipes/sudoku/report.py                          # dgemma/models/sudoku, all of it
    python recipes/sudoku/report.py --ar runs/sudoku-ar/model   # with an autoregressive twin beside it
    python recipes/sudoku/report.py FOLDER --puzzles 20      # a smoke version

Everything runs through the engine that users get, with the checkpoint's own settings. Puzzle i of a set has seed i.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from build_data import GRADES, HASHES, Puzzles, check_hashes, facts
from card import model_card
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from dgemma.api import LLM
from dgemma.bench.machine import Machine
from dgemma.eval.sudoku import AR, Attempt, Rate, attempts, check_model, retry, score, without_signal


def solve(llm: LLM, chosen: Puzzles, step: Callable[[], object], **settings: Any) -> tuple[list[Attempt], float]:
    """One attempt at each puzzle, and the seconds it took."""
    tried, began = [], time.perf_counter()
    for attempt in attempts(llm, chosen.puzzles, range(len(chosen.puzzles)), **settings):
        tried.append(attempt)
        step()
    return tried, time.perf_counter() - began


def measure(llm: LLM, sets: dict[str, Puzzles], args: argparse.Namespace, bar: Progress) -> dict[str, Any]:
    """Every figure of every set."""
    twin, cut = LLM.load(args.ar) if args.ar else None, without_signal(llm) if args.few else None
    if twin:
        check_model(twin)
    rows = {}
    for name, chosen in sets.items():
        few, size = chosen.take(np.arange(min(args.few, len(chosen.puzzles)))), len(chosen.puzzles)
        task = bar.add_task(name, total=size)
        tried, seconds = solve(llm, chosen, lambda task=task: bar.advance(task))
        rows[name] = score(tried, chosen.solutions) | {"puzzles_per_second": size / seconds}
        open_ = sum(not attempt.solved for attempt in tried)
        task = bar.add_task(f"{name}, again", total=open_ * (args.attempts - 1))
        again = retry(llm, tried, range(size), args.attempts, lambda task=task: bar.advance(task))
        rows[name]["verified"] = {
            "attempts": args.attempts,
            "solved": Rate(sum(t[-1].solved for t in again), size).json(),
        }
        if cut and few.puzzles.size:
            task = bar.add_task(f"{name}, without signal", total=len(few.puzzles))
            told = score(tried[: len(few.puzzles)], few.solutions)
            untold = score(solve(cut, few, lambda task=task: bar.advance(task))[0], few.solutions)
            rows[name]["without_signal"] = {
                "solved": untold["solved"],
                "steps": untold["steps"],
                "with": told["solved"],
            }
        if twin and few.puzzles.size:
            task = bar.add_task(f"{name}, autoregressive", total=len(few.puzzles))
            one_by_one = solve(twin, few, lambda task=task: bar.advance(task), **AR)[0]
            rows[name]["autoregressive"] = score(one_by_one, few.solutions)
    return rows


def training(runs: Sequence[Path], machine: str) -> dict[str, Any] | None:
    """What the runs took together, from their metrics; a resumed run repeats some steps, of which the last counts."""
    rows, seconds = [], 0.0
    for run in runs:
        if (run / "metrics.jsonl").is_file():
            records = {row["step"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
            rows += [records[step] for step in sorted(records)]
            seconds += rows[-1]["seconds"]
    if not rows:
        return None
    return {
        "machine": machine,
        "steps": len(rows),
        "boards_a_step": rows[-1]["rows"],
        "canvas_tokens": sum(row["tokens"] for row in rows),
        "hours": seconds / 3600,
        "canvas_loss_last_50": float(np.mean([row["canvas"] for row in rows[-50:]])),
    }


def table(rows: dict[str, Any]) -> Table:
    """The sets side by side."""
    shown = Table("", *rows, title="held-out puzzles by givens", header_style="bold")

    def line(name: str, value: Callable[[dict[str, Any]], str]) -> None:
        shown.add_row(name, *(value(row) for row in rows.values()))

    line("solved, single attempt", lambda row: percent(row["solved"]))
    line("denoising steps, mean", lambda row: f"{row['steps']['mean']:.1f}")
    line("median / 90 %", lambda row: f"{row['steps']['median']:.0f} / {row['steps']['p90']:.0f}")
    line("stopped by the rule", lambda row: f"{row['stopped_by_rule']['share']:.1%}")
    for kind, what in (("predicted", "drafted"), ("written", "accepted")):
        line(f"{what}: wrong to right", lambda row, kind=kind: f"{row[kind]['wrong_to_right']:,}")
        line(f"{what}: right to wrong", lambda row, kind=kind: f"{row[kind]['right_to_wrong']:,}")
        line(f"{what}: wrong to wrong", lambda row, kind=kind: f"{row[kind]['wrong_to_wrong']:,}")
    first = next(iter(rows.values()))
    line(f"verified best of {first['verified']['attempts']}", lambda row: percent(row["verified"]["solved"]))
    if "without_signal" in first:
        count = first["without_signal"]["solved"]["of"]
        line(f"first {count}: as it is", lambda row: percent(row["without_signal"]["with"]))
        line(f"first {count}: no self-conditioning", lambda row: percent(row["without_signal"]["solved"]))
    if "autoregressive" in first:
        count = first["autoregressive"]["solved"]["of"]
        line(f"first {count}: autoregressive twin, greedy", lambda row: percent(row["autoregressive"]["solved"]))
    line("puzzles a second", lambda row: f"{row['puzzles_per_second']:.1f}")
    return shown


def percent(rate: dict[str, Any]) -> str:
    """`97.3 % (96.1-98.1)`: a share with its 95 % interval."""
    low, high = rate["interval"]
    return f"{100 * rate['share']:.1f} % ({100 * low:.1f}-{100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("dgemma/models/sudoku"))
    parser.add_argument("--data", type=Path, default=Path("build/sudoku"))
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("runs/sudoku"), Path("runs/sudoku-2")])
    parser.add_argument("--ar", type=Path, help="the checkpoint folder of an autoregressive twin")
    parser.add_argument("--puzzles", type=int, help="of each set, the first ones (all)")
    parser.add_argument("--attempts", type=int, default=4, help="of verified best-of-n (4)")
    parser.add_argument(
        "--few",
        type=int,
        default=200,
        metavar="N",
        help="of each set, for the twin and without self-conditioning (200)",
    )
    parser.add_argument("--trained-on", default="", metavar="WORDS", help="the machine that trained it, for the card")
    args = parser.parse_args()

    console, llm = Console(width=None if sys.stdout.isatty() else 120), LLM.load(args.folder)
    check_model(llm)
    sets = {path.stem: Puzzles.load(path) for path in (args.data / f"{name}.npz" for name in all_names())}
    check_hashes(facts(sets), HASHES)
    train = sets.pop("train")
    used = {name: rows.take(np.arange(len(rows.puzzles))[: args.puzzles]) for name, rows in sets.items()}
    columns = ("{task.description:<28}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        rows = measure(llm, used, args, bar)
    console.print(table(rows))
    curve = args.data / "curve.json"
    weights = args.folder / "model.safetensors"
    report = {
        "model": {
            "name": args.folder.resolve().name,
            "parameters": sum(p.numel() for p in llm.engine.runner.model.parameters()),
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "generation": llm.generation.to_hf(),
        },
        "machine": asdict(Machine.of(llm.device, llm.dtype)),
        "seeds": "puzzle i of a set has seed i; attempt k is choice k - 1 of that seed",
        "data": facts({"train": train, **used}),
        "sets": rows,
        "training": training(args.runs, args.trained_on),
        "curve": json.loads(curve.read_text()) if curve.exists() else None,
    }
    (args.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.folder / "README.md").write_text(model_card(report))
    console.print(f"{args.folder}/report.json, {args.folder}/README.md")


def all_names() -> list[str]:
    return ["train", *(grade.name for grade in GRADES)]


if __name__ == "__main__":
    main()
