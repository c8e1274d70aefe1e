"""Puzzles with exactly one solution, of graded difficulty, and a file of them."""

from __future__ import annotations

import numpy as np

from dgemma.train.sudoku.solver import solutions


def minimal_puzzle(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random `(puzzle, solution)`, `[81]` each: unique, and no given can be left out (about 24 givens).

    Givens are taken away in random order while another digit in their place would leave no solution.
    """
    (solution,) = solutions(np.zeros(81, dtype=np.int8), limit=1, rng=rng)
    puzzle = solution.copy()
    for at in rng.permutation(81):
        puzzle[at] = 0
        if len(solutions(puzzle, limit=2)) > 1:
            puzzle[at] = solution[at]
    return puzzle, solution


def add_givens(puzzle: np.ndarray, solution: np.ndarray, givens: int, rng: np.random.Generator) -> np.ndarray:
    """The puzzle with digits of its solution filled in at random until it has `givens` of them (or more already)."""
    blanks = np.flatnonzero(puzzle == 0)
    more = max(0, givens - (81 - len(blanks)))
    easier = puzzle.copy()
    chosen = rng.choice(blanks, size=min(more, len(blanks)), replace=False)
    easier[chosen] = solution[chosen]
    return easier
