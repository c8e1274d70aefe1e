"""Makes the puzzles of the Sudoku recipe, into build/sudoku/. Resumes after ctrl-C, and uses every core.

    python recipes/sudoku/build_data.py            # about two minutes on two cores

Puzzle i of the training set is a function of the seed (0, i), of the held-out set of (1, i): a second run makes the
same arrays, whatever the number of processes. `heldout.json` beside this file holds their hashes. Needs no model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dgemma.train.sudoku.board import canonical  # noqa: E402
from dgemma.train.sudoku.puzzles import add_givens, minimal_puzzle  # noqa: E402

PART = 100  # puzzles that one task makes: what an interruption can cost
HASHES = Path(__file__).with_name("heldout.json")


@dataclass(frozen=True)
class Puzzles:
    """`puzzles` and `solutions` `[M, 81]` int8."""

    puzzles: np.ndarray
    solutions: np.ndarray

    @staticmethod
    def load(path: Path) -> Puzzles:
        with np.load(path) as file:
            return Puzzles(file["puzzles"], file["solutions"])

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        part = path.with_suffix(".tmp")
        with part.open("wb") as file:
            np.savez_compressed(file, puzzles=self.puzzles, solutions=self.solutions)
        part.replace(path)

    def take(self, rows: np.ndarray) -> Puzzles:
        return Puzzles(self.puzzles[rows], self.solutions[rows])

    @property
    def sha256(self) -> str:
        """Of the arrays' bytes, so that it does not depend on how the file was packed."""
        return hashlib.sha256(self.puzzles.tobytes() + self.solutions.tobytes()).hexdigest()

    @property
    def givens(self) -> np.ndarray:
        """How many cells of each puzzle are given."""
        return (self.puzzles > 0).sum(axis=1)


@dataclass(frozen=True)
class Grade:
    """A held-out set: totals of givens spread evenly from `fewest` to `most`; without them puzzles stay minimal."""

    name: str
    fewest: int = 0
    most: int = 0


GRADES = (Grade("36-46", 36, 46), Grade("26-32", 26, 32), Grade("minimal"))


def make_part(seed: int, start: int, stop: int) -> Puzzles:
    """Minimal puzzles number `start` to `stop` of a seed."""
    pairs = [minimal_puzzle(np.random.default_rng((seed, index))) for index in range(start, stop)]
    puzzles, solutions = zip(*pairs, strict=True)
    return Puzzles(np.array(puzzles, dtype=np.int8), np.array(solutions, dtype=np.int8))


def _make_and_save(job: tuple[int, int, int, Path]) -> int:
    seed, start, stop, path = job
    if not path.exists():
        make_part(seed, start, stop).save(path)
    return stop - start


def make(pool: ProcessPoolExecutor, seed: int, count: int, folder: Path, step: Callable[[int], None]) -> Puzzles:
    """All `count` puzzles of a seed; parts that an earlier run left in `folder` are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [(start, min(start + PART, count)) for start in range(0, count, PART)]
    paths = [folder / f"seed{seed}-{start}-{stop}.npz" for start, stop in bounds]
    for done in pool.map(_make_and_save, [(seed, *bound, path) for bound, path in zip(bounds, paths, strict=True)]):
        step(done)
    parts = [Puzzles.load(path) for path in paths]
    return Puzzles(np.concatenate([p.puzzles for p in parts]), np.concatenate([p.solutions for p in parts]))


def canonical_forms(pool: ProcessPoolExecutor, solutions: np.ndarray, step: Callable[[int], None]) -> list[bytes]:
    """One per solution, the same for solutions that are images of each other."""
    forms = []
    for form in pool.map(canonical, solutions, chunksize=16):
        forms.append(form)
        step(1)
    return forms


def graded(minimal: Puzzles, grade: Grade, seed: int) -> Puzzles:
    """The puzzles with more givens, as `grade` says; puzzle i depends on (seed, i) alone."""
    if not grade.most:
        return minimal
    span = grade.most - grade.fewest + 1
    puzzles = [
        add_givens(puzzle, solution, grade.fewest + row % span, np.random.default_rng((seed, row)))
        for row, (puzzle, solution) in enumerate(zip(minimal.puzzles, minimal.solutions, strict=True))
    ]
    return Puzzles(np.array(puzzles), minimal.solutions)


def histogram(sets: dict[str, Puzzles]) -> Table:
    """How many puzzles of each set have how many givens."""
    counts = {name: np.bincount(rows.givens, minlength=82) for name, rows in sets.items()}
    table = Table("givens", *sets, title="puzzles by number of givens", header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for givens in np.flatnonzero(sum(counts.values())):
        table.add_row(str(givens), *(str(count[givens] or "") for count in counts.values()))
    table.add_section()
    table.add_row("all", *(str(len(rows.puzzles)) for rows in sets.values()))
    return table


def facts(sets: dict[str, Puzzles]) -> dict[str, Any]:
    """Size, hash and histogram of every set."""
    rows = {}
    for name, chosen in sets.items():
        values, counts = np.unique(chosen.givens, return_counts=True)
        givens = {str(v): int(c) for v, c in zip(values, counts, strict=True)}
        rows[name] = {"puzzles": len(chosen.puzzles), "sha256": chosen.sha256, "givens": givens}
    return rows


def check_hashes(found: dict[str, Any], path: Path) -> None:
    """The file beside this script fixes the held-out sets; SystemExit where they came out otherwise."""
    known = json.loads(path.read_text())
    wrong = [name for name, row in known.items() if found.get(name, {}).get("sha256") != row["sha256"]]
    if wrong:
        raise SystemExit(f"{path}: these sets are others than they were: {', '.join(wrong)}")


def build(args: argparse.Namespace, console: Console) -> None:
    total = args.train + args.held_out
    bar = Progress("{task.description:<26}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    with bar, ProcessPoolExecutor(args.processes) as pool:
        making = bar.add_task("minimal puzzles", total=total)
        comparing = bar.add_task("canonical forms", total=total)
        parts, made = args.out / "parts", partial(bar.advance, making)
        train, held = make(pool, 0, args.train, parts, made), make(pool, 1, args.held_out, parts, made)
        seen = set(canonical_forms(pool, train.solutions, partial(bar.advance, comparing)))
        forms = canonical_forms(pool, held.solutions, partial(bar.advance, comparing))
    new = np.array([form not in seen for form in forms])
    console.print(f"held-out solutions that are images of a training solution: {(~new).sum()} (dropped)")
    held = held.take(np.flatnonzero(new))
    sets = {"train": train} | {grade.name: graded(held, grade, 2 + n) for n, grade in enumerate(GRADES)}
    for name, rows in sets.items():
        rows.save(args.out / f"{name}.npz")
    console.print(histogram(sets))
    found = facts(sets)
    standard = (args.train, args.held_out) == (8000, 1000)
    if standard and HASHES.exists():
        check_hashes(found, HASHES)
        console.print(f"the hashes are those of {HASHES.relative_to(ROOT)}")
    elif standard:
        HASHES.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/sudoku"))
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    build(parser.parse_args(None if argv is None else list(argv)), Console())


if __name__ == "__main__":
    main()
