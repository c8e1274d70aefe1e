"""How solving grows with training: solve rate and steps of every snapshot, into a JSON file and a figure.

    python recipes/sudoku/curve.py runs/sudoku runs/sudoku-2

Each snapshot is exported and asked the first puzzles of the held-out sets, with the settings of the shipped model. What
the JSON file already holds is not measured again, so this can run again while a model still trains.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from build_data import GRADES, Puzzles
from export import export, untrained
from rich.progress import track

from dgemma.api import LLM
from dgemma.eval.sudoku import attempts, score

COLOURS = {"36-46": "#007eba", "26-32": "#8353ff", "minimal": "#e8016c"}


def measure(snapshot: Path, data: Path, count: int) -> dict[str, Any]:
    """The scores of one snapshot on the first `count` puzzles of each held-out set."""
    with tempfile.TemporaryDirectory() as folder:
        export(snapshot, Path(folder) / "model")
        llm, row = LLM.load(Path(folder) / "model"), dict[str, Any]()
        for grade in GRADES:
            chosen = Puzzles.load(data / f"{grade.name}.npz")
            tried = list(attempts(llm, chosen.puzzles[:count], range(count)))
            row[grade.name] = score(tried, chosen.solutions[:count])
    return row


def step_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def draw(curve: dict[str, Any], path: Path) -> None:
    """Solve rates with their intervals, and mean steps, over the training steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted((int(step), row) for step, row in curve["snapshots"].items())
    figure, (rates, steps) = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    at = [step for step, _ in rows]
    for grade in GRADES:
        scores = [row[grade.name] for _, row in rows]
        colour, label = COLOURS[grade.name], f"{grade.name} givens" if grade.most else "minimal puzzles"
        rates.plot(at, [row["solved"]["share"] for row in scores], "o-", ms=3, color=colour, label=label)
        low, high = zip(*(row["solved"]["interval"] for row in scores), strict=True)
        rates.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
        steps.plot(at, [row["steps"]["mean"] for row in scores], "o-", ms=3, color=colour)
    rates.set(title="solved, single attempt", xlabel="training step", ylim=(0, 1.02))
    rates.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    steps.set(title="denoising steps a puzzle", xlabel="training step", ylim=(0, None))
    rates.legend(frameon=False, loc="best")
    for axis in (rates, steps):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="the folders of the run and of its continuations")
    parser.add_argument("--data", type=Path, default=Path("build/sudoku"))
    parser.add_argument("--json", type=Path, default=Path("build/sudoku/curve.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/sudoku.png"))
    parser.add_argument("--puzzles", type=int, default=200, help="of each set, the first ones")
    args = parser.parse_args()
    settings = {"puzzles": args.puzzles, "generation": untrained().generation.to_hf()}
    curve: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    if {name: curve.get(name) for name in settings} != settings:
        curve = settings | {"snapshots": {}}  # measured otherwise: begin again
    found, before = dict[str, Path](), 0
    for run in args.runs:
        own = {step_of(path): path for path in (*run.glob("snap-*.pt"), *run.glob("state/step-*"))}
        # States of a continuation count from its own beginning.
        found |= {str(before + step): path for step, path in own.items()}
        before += max(own, default=0)
    missing = sorted(found.keys() - curve["snapshots"].keys(), key=int)
    for step in track(missing, "snapshots"):
        curve["snapshots"][step] = measure(found[step], args.data, args.puzzles)
        args.json.write_text(json.dumps(curve, indent=1) + "\n")
    if curve["snapshots"]:
        draw(curve, args.figure)


if __name__ == "__main__":
    main()
