"""Sudoku for the trainer: `[BOS, 81 cells]` is the prompt, the 81 digits of the solution are the canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dgemma.train.attend import Layout
from dgemma.train.objective import Batch
from dgemma.train.sudoku.board import random_symmetry
from dgemma.train.sudoku.puzzles import add_givens

PAD, EOS, BOS = 0, 1, 2
BLANK = 3
"""Token of a blank; the digit d is `BLANK + d`."""


def prompt_ids(puzzle: np.ndarray) -> list[int]:
    """Token ids of a puzzle `[81]`, with the begin-of-sequence token."""
    return [BOS, *(BLANK + puzzle.astype(int)).tolist()]


@dataclass(frozen=True)
class SudokuBatches:
    """Batches drawn from minimal puzzles `[M, 81]`: a random symmetry of one, made easier by more givens.

    Half of the puzzles keep at most four extra givens, the rest gets a total drawn evenly up to `most_givens`.
    Each puzzle's solution is corrupted `draws` times.
    """

    puzzles: np.ndarray
    solutions: np.ndarray
    boards: int
    draws: int
    seed: int
    most_givens: int = 46

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        ids = np.empty((self.boards, 163), dtype=np.int64)
        for row in range(self.boards):
            index = int(rng.integers(len(self.puzzles)))
            cells, digits = random_symmetry(rng)
            puzzle, solution = digits[self.puzzles[index][cells]], digits[self.solutions[index][cells]]
            fewest = int((puzzle > 0).sum())
            givens = int(rng.integers(fewest, (fewest + 4 if rng.integers(2) else self.most_givens) + 1))
            ids[row, :82] = prompt_ids(add_givens(puzzle, solution, givens, rng))
            ids[row, 82:] = BLANK + solution
        valid = np.zeros(ids.shape, dtype=bool)
        valid[:, 82:] = True
        layout = Layout(torch.full((self.boards,), 82), 163, 81, 81, self.draws)
        return Batch(torch.from_numpy(ids), torch.from_numpy(valid), layout)

    def source_name(self, step: int) -> str:
        return "sudoku"
