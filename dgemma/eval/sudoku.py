"""Sudoku with the deployed sampler: attempts, what changed between their steps, solve rates with intervals.

An attempt is one request of the engine, batched with others; whether it solves its puzzle the rules alone decide. Knows
no solver. Answer keys serve one purpose: to say of a digit that changed whether it had been right.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from dgemma.api import LLM
from dgemma.checkpoint.load import load_checkpoint
from dgemma.engine.streams import Stream
from dgemma.errors import RequestError
from dgemma.events import Committed, Draft, Event
from dgemma.train.sudoku.board import show, solves
from dgemma.train.sudoku.examples import BLANK

CELLS = 81
IN_FLIGHT = 96  # requests held at once: more than a batch takes, so that none runs half empty
AR: dict[str, Any] = {"mode": "ar", "temperature": 0.0}
_Z = 1.959963984540054  # 95 %


@dataclass(frozen=True)
class Changes:
    """How often a digit gave way to another one in the same cell, by which of the two was the solution's."""

    wrong_to_right: int = 0
    right_to_wrong: int = 0
    wrong_to_wrong: int = 0

    def __add__(self, other: Changes) -> Changes:
        return Changes(
            self.wrong_to_right + other.wrong_to_right,
            self.right_to_wrong + other.right_to_wrong,
            self.wrong_to_wrong + other.wrong_to_wrong,
        )


def count_changes(readings: Iterable[np.ndarray], solution: np.ndarray, cells: np.ndarray) -> Changes:
    """Changes from reading to reading (`[81]` each, 0: no digit there now) in the chosen `cells`.

    A cell's digit is compared with the last one that stood there, however many readings ago.
    """
    counts = np.zeros((2, 2), dtype=int)  # [was right, is right]
    last, truth = np.zeros(len(cells), dtype=int), solution[cells]
    for reading in readings:
        now = reading[cells]
        changed = (now > 0) & (last > 0) & (now != last)
        np.add.at(counts, ((last == truth)[changed].astype(int), (now == truth)[changed].astype(int)), 1)
        last = np.where(now > 0, now, last)
    return Changes(int(counts[0, 1]), int(counts[1, 0]), int(counts[0, 0]))


@dataclass(frozen=True)
class Attempt:
    """One answer to one puzzle. Boards are `[81]` int8, 0 where there is no digit.

    `predicted` holds the most likely digit of every cell after each step, `written` the digits that the step accepted
    and the next one read; both end with the answer. `steps` are denoising steps, 0 where tokens came one by one.
    """

    puzzle: np.ndarray
    answer: np.ndarray
    steps: int
    stop: str
    predicted: tuple[np.ndarray, ...] = field(repr=False)
    written: tuple[np.ndarray, ...] = field(repr=False)

    @property
    def solved(self) -> bool:
        """By the rules; no answer key."""
        return solves(self.answer, self.puzzle)

    @property
    def corrections(self) -> int:
        """How often, in a blank, the drafted digit was not the answer's and gave way to the answer's."""
        return self.changes(self.answer, self.predicted).wrong_to_right

    @property
    def withdrawn(self) -> int:
        """The same of digits that a step had accepted: it was sure enough to build on them."""
        return self.changes(self.answer, self.written).wrong_to_right

    def changes(self, solution: np.ndarray, readings: Iterable[np.ndarray]) -> Changes:
        """Of `predicted` or `written`, in the puzzle's blanks."""
        return count_changes(readings, solution, np.flatnonzero(self.puzzle == 0))


def digits(tokens: Sequence[int]) -> np.ndarray:
    """Digits of a canvas, `[81]` int8; 0 for any other token, and for those that an early end token cut off."""
    board = np.zeros(CELLS, dtype=np.int8)
    found = np.asarray(tokens[:CELLS], dtype=np.int64) - BLANK
    board[: len(found)] = np.where((found >= 1) & (found <= 9), found, 0)
    return board


def attempt_of(puzzle: np.ndarray, events: Iterable[Event]) -> Attempt:
    """The attempt that the events of one request tell; drafts are there only if the request was watched."""
    tokens: list[int] = []
    predicted, written = [], []
    steps, stop = 0, ""
    for event in events:
        if isinstance(event, Draft):
            predicted.append(digits(event.tokens))
            written.append(np.where(event.accepted, digits(event.canvas_tokens), 0).astype(np.int8))
        elif isinstance(event, Committed):
            tokens += event.tokens
            steps, stop = steps + event.steps, event.stop
    answer = digits(tokens)
    return Attempt(puzzle, answer, steps, stop, (*predicted, answer), (*written, answer))


def check_model(llm: LLM) -> None:
    """A `RequestError` unless the model's canvas is a board and its tokens are cells."""
    alphabet = list(range(BLANK, BLANK + 10))
    if llm.config.canvas_length != CELLS or llm.tokenizer.encode(".123456789") != alphabet:
        raise RequestError(f"the model {llm.name!r} was not made for Sudoku: its canvas is no board of 81 digits")


def attempts(
    llm: LLM, puzzles: Iterable[np.ndarray], seeds: Iterable[int], choice: int = 0, **overrides: Any
) -> Iterator[Attempt]:
    """One attempt at each puzzle, in order. They share batches, yet each is what it would be alone."""
    waiting: deque[tuple[np.ndarray, Stream]] = deque()
    with contextlib.ExitStack() as stack:
        for puzzle, seed in zip(puzzles, seeds, strict=False):
            request = llm.request(
                show(puzzle), watch=True, **{"max_new_tokens": CELLS, "seed": seed, "choice": choice} | overrides
            )
            waiting.append((puzzle, stack.enter_context(Stream(llm.worker, request))))
            if len(waiting) == IN_FLIGHT:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(puzzle: np.ndarray, stream: Stream) -> Attempt:
    return attempt_of(puzzle, stream.events())


def retry(
    llm: LLM, first: Sequence[Attempt], seeds: Sequence[int], tries: int, step: Callable[[], object], **overrides: Any
) -> list[list[Attempt]]:
    """Up to `tries` attempts at each puzzle, the given `first` included, until one obeys the rules.

    Verified best-of-n: nothing but `solves` decides whether to go on. `step` is called after every new attempt.
    """
    all_tries = [[attempt] for attempt in first]
    for choice in range(1, tries):
        open_ = [row for row, tried in enumerate(all_tries) if not tried[-1].solved]
        again = attempts(
            llm, [first[row].puzzle for row in open_], [seeds[row] for row in open_], choice=choice, **overrides
        )
        for row, attempt in zip(open_, again, strict=True):
            all_tries[row].append(attempt)
            step()
    return all_tries


@dataclass(frozen=True)
class Rate:
    """A share of `count` with its 95 % interval (Wilson 1927)."""

    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        if not self.count:
            return 0.0, 1.0
        n, p = self.count, self.share
        middle, half = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return max(0.0, (middle - half) / (1 + _Z**2 / n)), min(1.0, (middle + half) / (1 + _Z**2 / n))

    def json(self) -> dict[str, Any]:
        return {"hits": self.hits, "of": self.count, "share": self.share, "interval": list(self.interval)}


def score(tried: Sequence[Attempt], solutions: np.ndarray) -> dict[str, Any]:
    """What single attempts at a set come to: solve rate, steps, changes between steps. `solutions [M, 81]`."""
    steps = np.array([attempt.steps for attempt in tried])
    solved = np.array([attempt.solved for attempt in tried])
    pairs = list(zip(tried, solutions, strict=True))
    row: dict[str, Any] = {"solved": Rate(int(solved.sum()), len(tried)).json()}
    if not steps.any():
        return row  # one token after the other: there is nothing to go back to
    row["steps"] = {
        "mean": float(steps.mean()),
        "median": float(np.median(steps)),
        "p90": float(np.quantile(steps, 0.9)),
        "mean_solved": float(steps[solved].mean()) if solved.any() else None,
    }
    row["stopped_by_rule"] = Rate(sum(attempt.stop == "stable" for attempt in tried), len(tried)).json()
    for name in ("written", "predicted"):
        total = sum((attempt.changes(key, getattr(attempt, name)) for attempt, key in pairs), Changes())
        corrected = [bool(attempt.changes(key, getattr(attempt, name)).wrong_to_right) for attempt, key in pairs]
        row[name] = asdict(total) | {"puzzles_corrected": Rate(sum(corrected), len(tried)).json()}
        row[name]["solved_after_correction"] = int((solved & np.array(corrected)).sum())
    return row


def without_signal(llm: LLM) -> LLM:
    """The same weights with self-conditioning cut off: what a step predicts, the next one is not told."""
    checkpoint = load_checkpoint(llm.folder, device=llm.device, dtype=llm.dtype)
    down = checkpoint.model.self_conditioning.mlp.down_proj
    down.restore(torch.zeros(down.out_features, down.in_features, dtype=llm.dtype, device=llm.device))
    return LLM(checkpoint)
