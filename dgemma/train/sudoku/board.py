"""Boards and their rules. A board is 81 digits in reading order, 0 for a blank; nothing here searches."""

from __future__ import annotations

import itertools

import numpy as np

from dgemma.errors import DataError

ROW = np.arange(81) // 9
COLUMN = np.arange(81) % 9
BOX = ROW // 3 * 3 + COLUMN // 3
UNITS: list[tuple[str, np.ndarray]] = [
    (f"{name} {index + 1}", np.flatnonzero(where == index))
    for name, where in (("row", ROW), ("column", COLUMN), ("box", BOX))
    for index in range(9)
]


def parse(text: str) -> np.ndarray:
    """81 characters, digits with `.` or `0` for blanks (white space is skipped) -> `[81]` int8.

    Raises `DataError` for another length or character, for a digit that stands twice in a row, column or box, and for
    a blank in which no digit can stand or a digit that has no place left in one.
    """
    symbols = "".join(text.split())
    if len(symbols) != 81:
        raise DataError(f"a puzzle has 81 cells, got {len(symbols)} characters: {symbols[:90]!r}")
    for at, symbol in enumerate(symbols):
        if symbol not in ".0123456789":
            raise DataError(f"cell {at + 1}: a cell is 1-9, or . or 0 for a blank; got {symbol!r}")
    board = np.array([0 if symbol == "." else int(symbol) for symbol in symbols], dtype=np.int8)
    if clash := conflict(board) or dead_end(board):
        raise DataError(f"the puzzle contradicts itself: {clash}")
    return board


def show(board: np.ndarray) -> str:
    """The 81-character form, `.` for blanks."""
    return "".join(str(digit) if digit else "." for digit in board)


def conflict(board: np.ndarray) -> str | None:
    """Which digit stands twice in which unit, in words; None for a board without conflict."""
    for name, cells in UNITS:
        digits = board[cells]
        for digit in range(1, 10):
            if (digits == digit).sum() > 1:
                return f"{digit} stands twice in {name}"
    return None


def dead_end(board: np.ndarray) -> str | None:
    """Which blank has no digit left, or which digit has no place left in a unit; None where one look finds neither."""
    open_ = np.zeros((81, 10), dtype=bool)
    for at in np.flatnonzero(board == 0).tolist():
        peers = (ROW[at] == ROW) | (COLUMN[at] == COLUMN) | (BOX[at] == BOX)
        open_[at] = ~np.isin(np.arange(10), board[peers])
        if not open_[at].any():
            return f"no digit is left for {place(at)}"
    for name, cells in UNITS:
        for digit in range(1, 10):
            if digit not in board[cells] and not open_[cells, digit].any():
                return f"{digit} has no place left in {name}"
    return None


def place(cell: int) -> str:
    """A cell `0..80` in words."""
    return f"row {ROW[cell] + 1}, column {COLUMN[cell] + 1}"


def solves(solution: np.ndarray, puzzle: np.ndarray) -> bool:
    """Whether `solution` is complete, breaks no rule and keeps every given. Needs no answer key."""
    return fault(solution, puzzle) is None


def fault(solution: np.ndarray, puzzle: np.ndarray) -> str | None:
    """Why `solution` does not solve `puzzle` (`[81]` each), in words; None if it does."""
    for at in np.flatnonzero((solution < 1) | (solution > 9)).tolist():
        return f"{place(at)} is empty"
    for at in np.flatnonzero((puzzle > 0) & (solution != puzzle)).tolist():
        return f"the given {puzzle[at]} in {place(at)} became {solution[at]}"
    return conflict(solution)


_ORDERS = np.array(list(itertools.permutations(range(3))))


def random_symmetry(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One of the 2 * 6^8 * 9! symmetries: `cells [81]` (new board = old[cells]) and `digits [10]` (0 stays 0)."""
    cells = (_lines(rng)[:, None] * 9 + _lines(rng)).reshape(9, 9)
    if rng.integers(2):
        cells = cells.T
    return cells.reshape(81), np.concatenate([[0], 1 + rng.permutation(9)]).astype(np.int8)


def _lines(rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([3 * band + rng.permutation(3) for band in rng.permutation(3)])


# Every order of the nine columns that keeps stacks together.
_COLUMNS = np.array(
    [
        np.concatenate([3 * stack + np.array(order) for stack, order in zip(stacks, orders, strict=True)])
        for stacks in itertools.permutations(range(3))
        for orders in itertools.product(itertools.permutations(range(3)), repeat=3)
    ]
)

_PLACES = 10 ** np.arange(8, -1, -1)


def canonical(solution: np.ndarray) -> bytes:
    """The same 81 bytes for all solved grids that symmetries turn into each other, and for no others.

    The smallest reading over transposition, every choice of first row and every order of columns: relabelling makes
    the first row 1..9, and the order of the other rows follows from their first digits.
    """
    best = b"~"
    square = solution.reshape(9, 9).astype(np.int64)
    for grid in (square, square.T):
        for first in range(9):
            names = np.empty((len(_COLUMNS), 10), dtype=np.int64)
            np.put_along_axis(names, grid[first][_COLUMNS], np.arange(1, 10)[None], axis=1)
            # Row `first` leads; its band comes first, rows sorted by their first digit, then bands likewise.
            heads = np.take_along_axis(names, grid[:, _COLUMNS[:, 0]].T, axis=1).reshape(-1, 3, 3)
            rows = np.argsort(heads, axis=2) + 3 * np.arange(3)[:, None]
            order = np.argsort(heads.min(axis=2), axis=1)
            picked = np.take_along_axis(rows, order[:, :, None], axis=1).reshape(-1, 9)
            # The second row decides for nearly all orders; only those that share the smallest one are written out.
            second = np.take_along_axis(names, grid[picked[:, 1:2], _COLUMNS], axis=1) @ _PLACES
            least = np.flatnonzero(second == second.min())
            whole = grid[picked[least][:, :, None], _COLUMNS[least][:, None, :]].reshape(len(least), 81)
            named = np.take_along_axis(names[least], whole, axis=1).astype(np.uint8)
            best = min(best, *(row.tobytes() for row in named))
    return best
