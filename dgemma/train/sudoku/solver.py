"""A solver for making puzzles, never for answering them: the model's answers do not touch this file."""

from __future__ import annotations

import numpy as np

from dgemma.train.sudoku.board import BOX, COLUMN, ROW

_ALL = 0b111_111_111
_PEERS_ROW, _PEERS_COLUMN, _PEERS_BOX = ROW.tolist(), COLUMN.tolist(), BOX.tolist()
_COUNT = [bin(mask).count("1") for mask in range(_ALL + 1)]


def solutions(board: np.ndarray, limit: int = 2, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Up to `limit` solutions of `board [81]`, by depth-first search at the cell with the fewest candidates.

    With `rng`, digits are tried in random order (so an empty board gives a random solved grid).
    """
    cells: list[int] = board.tolist()
    rows, columns, boxes = [_ALL] * 9, [_ALL] * 9, [_ALL] * 9
    blanks = []
    for at, digit in enumerate(cells):
        if digit:
            bit = 1 << (digit - 1)
            rows[_PEERS_ROW[at]] &= ~bit
            columns[_PEERS_COLUMN[at]] &= ~bit
            boxes[_PEERS_BOX[at]] &= ~bit
        else:
            blanks.append(at)
    found: list[np.ndarray] = []
    _search(cells, blanks, rows, columns, boxes, limit, found, rng)
    return found


def _search(
    cells: list[int],
    blanks: list[int],
    rows: list[int],
    columns: list[int],
    boxes: list[int],
    limit: int,
    found: list[np.ndarray],
    rng: np.random.Generator | None,
) -> None:
    if not blanks:
        found.append(np.array(cells, dtype=np.int8))
        return
    best, fewest, options = 0, 10, 0
    for index, at in enumerate(blanks):
        mask = rows[_PEERS_ROW[at]] & columns[_PEERS_COLUMN[at]] & boxes[_PEERS_BOX[at]]
        count = _COUNT[mask]
        if count < fewest:
            best, fewest, options = index, count, mask
            if count <= 1:
                break
    if not fewest:
        return
    at = blanks[best]
    blanks[best] = blanks[-1]
    blanks.pop()
    r, c, b = _PEERS_ROW[at], _PEERS_COLUMN[at], _PEERS_BOX[at]
    digits = [digit for digit in range(1, 10) if options >> (digit - 1) & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        bit = 1 << (digit - 1)
        rows[r] ^= bit
        columns[c] ^= bit
        boxes[b] ^= bit
        cells[at] = digit
        _search(cells, blanks, rows, columns, boxes, limit, found, rng)
        rows[r] ^= bit
        columns[c] ^= bit
        boxes[b] ^= bit
        if len(found) >= limit:
            break
    cells[at] = 0
    blanks.append(at)
    blanks[best], blanks[-1] = blanks[-1], blanks[best]
