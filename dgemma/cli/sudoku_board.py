"""A Sudoku board in a terminal: drawn while it is denoised, and as it is left at the end. Knows drafts, no model."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from dgemma.events import Draft
from dgemma.train.sudoku.board import UNITS
from dgemma.view import HEAT_COLOURS, heat

FRAME_S = 0.1
"""The least time that a step is seen: a puzzle of four steps would else be over before anybody looks."""
_LINES = (tuple("┌─┬┐"), tuple("├─┼┤"), tuple("└─┴┘"), "│", "·")
_ASCII = (tuple("+-++"), tuple("+-++"), tuple("+-++"), "|", ".")
_GIVEN, _SURE, _FLASH, _WRONG = Style(bold=True), Style(), Style(reverse=True), Style(color="red", reverse=True)


class BoardView:
    """A context manager: enter it, `show` every draft with its digits, leave it. It clears what it drew."""

    def __init__(self, console: Console, puzzle: np.ndarray, frame_s: float = FRAME_S) -> None:
        self._console, self._puzzle, self._frame_s = console, puzzle, frame_s
        self._before, self._drawn = puzzle, 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> BoardView:
        self._live.start()
        self._draw(Text("all cells are noise", "dim"), grid(self._console, self._puzzle, [_GIVEN] * 81))
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, draft: Draft, digits: np.ndarray, attempt: str = "") -> None:
        """Draw a step: `digits [81]` are the draft's most likely ones. A cell that changed since the last flashes."""
        styles = cell_styles(self._puzzle, draft, digits, self._before)
        settled = sum(draft.accepted)
        parts = [attempt] * bool(attempt) + [f"step {draft.step}/{draft.max_steps}", f"{settled} of 81 cells accepted"]
        self._draw(Text(" - ".join(parts), "dim"), grid(self._console, digits, styles))
        self._before = digits

    def _draw(self, head: Text, board: Text) -> None:
        time.sleep(max(0.0, self._drawn + self._frame_s - time.monotonic()))
        self._live.update(Group(head, board), refresh=True)
        self._drawn = time.monotonic()


def cell_styles(puzzle: np.ndarray, draft: Draft, digits: np.ndarray, before: np.ndarray) -> list[Style]:
    """Givens bold; other cells by their entropy, dim while not accepted; reversed where the digit is another one."""
    styles = []
    for at in range(81):
        if puzzle[at]:
            styles.append(_GIVEN)
            continue
        warmth = heat(draft.entropy[at])
        style = Style(color=HEAT_COLOURS[warmth - 1] if warmth else None, dim=not draft.accepted[at] or None)
        changed = before[at] and digits[at] != before[at]
        styles.append(style + _FLASH if changed else style)
    return styles


def final_styles(puzzle: np.ndarray, answer: np.ndarray) -> list[Style]:
    """Givens bold; red are cells that break a rule, and givens that were changed."""
    wrong = (puzzle > 0) & (answer != puzzle)
    for _, cells in UNITS:
        seen = answer[cells]
        wrong[cells] |= (seen > 0) & (np.bincount(seen, minlength=10)[seen] > 1)
    return [_WRONG if wrong[at] else _GIVEN if puzzle[at] else _SURE for at in range(81)]


def grid(console: Console, board: np.ndarray, styles: Sequence[Style]) -> Text:
    """`board [81]` as nine lines in boxes, each cell in its style; blanks are dots. ASCII where the terminal is."""
    top, middle, bottom, side, blank = _LINES if "utf" in console.encoding.lower() else _ASCII
    text = Text(no_wrap=True)
    for row in range(9):
        if row % 3 == 0:
            text.append(_rule(middle if row else top), "dim")
        for column in range(9):
            at = 9 * row + column
            text.append("" if column % 3 else f"{side} ", "dim")
            text.append(str(board[at]) if board[at] else blank, styles[at] if board[at] else "dim")
            text.append(" ")
        text.append(f"{side}\n", "dim")
    return text.append(_rule(bottom).rstrip("\n"), "dim")


def _rule(parts: Sequence[str]) -> str:
    left, line, cross, right = parts
    return left + cross.join([line * 7] * 3) + right + "\n"
