"""Solve Sudoku puzzles by denoising the board: one live in the terminal, or a file of them in batches."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli.arguments import add_loading, add_screen, settings_of, text_of
from dgemma.cli.output import note, write, write_json
from dgemma.cli.running import load
from dgemma.errors import DataError, RequestError
from dgemma.events import Draft, Event
from dgemma.settings import OPTIONS

if TYPE_CHECKING:
    import numpy as np

    from dgemma.api import LLM
    from dgemma.cli.sudoku_board import BoardView
    from dgemma.eval.sudoku import Attempt

NAME = "sudoku"
HELP = "solve Sudoku puzzles, with a live view of the board"
MODEL = "sudoku"
GROUP = 192  # puzzles of a file that are answered before the first is printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] [PUZZLE]"
    parser.add_argument(
        "puzzle", metavar="PUZZLE", nargs="?", help="81 cells, . or 0 for a blank; - or nothing reads standard input"
    )
    parser.add_argument("--file", metavar="FILE", help="solve a file, one puzzle a line; - is standard input")
    add_loading(parser)
    add_screen(parser)
    parser.add_argument("--json", action="store_true", help="a JSON object a puzzle")
    group = parser.add_argument_group("solving")
    for name in ("seed", "steps"):
        option = OPTIONS[name]
        group.add_argument(f"--{name}", type=option.parse, default=argparse.SUPPRESS, metavar="N", help=option.help)
    group.add_argument(
        "--attempts", type=int, default=1, metavar="N", help="try up to N times until the answer obeys the rules (1)"
    )


def run(arguments: argparse.Namespace) -> int:
    # Only flags: a model or a number of steps that variables and files choose was chosen for text.
    settings = replace(settings_of(arguments), model=vars(arguments).get("model", MODEL))
    chosen = {field: settings.generation[field] for field in _given(arguments)}
    if arguments.attempts < 1:
        raise RequestError(f"--attempts must be at least 1, got {arguments.attempts}")
    if arguments.file is not None and arguments.puzzle is not None:
        raise RequestError("give a PUZZLE or --file, not both")
    if arguments.file is None:
        from dgemma.train.sudoku.board import parse

        puzzle = parse(text_of(arguments.puzzle, "puzzle"))
        _one(_model(settings), puzzle, chosen, arguments)
        return 0
    puzzles, bad = _read(arguments.file)
    if puzzles:
        _many(_model(settings), puzzles, chosen, arguments)
    return 2 if bad else 0


def _given(arguments: argparse.Namespace) -> list[str]:
    return [OPTIONS[name].field for name in ("seed", "steps") if name in arguments]


def _model(settings: Any) -> LLM:
    llm = load(settings)
    from dgemma.eval.sudoku import check_model

    check_model(llm)
    return llm


@dataclass(frozen=True)
class Result:
    """What came of a puzzle: all attempts made, of which the last counts. The rules say whether it solves."""

    tried: Sequence[Attempt]
    allowed: int

    @property
    def last(self) -> Attempt:
        return self.tried[-1]

    @property
    def steps(self) -> int:
        """Of all attempts."""
        return sum(attempt.steps for attempt in self.tried)

    @property
    def fault(self) -> str | None:
        from dgemma.train.sudoku.board import fault

        return fault(self.last.answer, self.last.puzzle)

    def json(self) -> dict[str, Any]:
        from dgemma.train.sudoku.board import show

        last = self.last
        row = {"puzzle": show(last.puzzle), "solution": show(last.answer), "solved": last.solved}
        row |= {"steps": self.steps, "corrections": last.corrections}
        return row | ({"attempts": len(self.tried)} if self.allowed > 1 else {})

    def line(self) -> str:
        """The answer; behind a wrong one, why it is wrong."""
        from dgemma.train.sudoku.board import show

        return show(self.last.answer) + (f" # not solved: {self.fault}" if self.fault else "")

    def message(self) -> str:
        """For a person."""
        parts = [f"not solved: {self.fault}" if self.fault else "solved"]
        count = self.last.corrections
        parts += [
            f"{self.steps} steps",
            f"{count} correction{'s' * (count != 1)} ({self.last.withdrawn} of accepted digits)",
        ]
        if self.allowed > 1:
            parts.append(f"{len(self.tried)} of at most {self.allowed} attempts, checked by the rules")
        return ", ".join(parts)


def _one(llm: LLM, puzzle: np.ndarray, chosen: dict[str, Any], arguments: argparse.Namespace) -> None:
    from dgemma.eval.sudoku import attempt_of
    from dgemma.train.sudoku.board import show

    plain = arguments.json or arguments.quiet or not sys.stdout.isatty()
    tried: list[Attempt] = []
    with _view(puzzle, live=not plain and not arguments.no_live) as view:
        for choice in range(arguments.attempts):
            if tried and tried[-1].solved:
                break
            label = f"attempt {choice + 1}/{arguments.attempts}" if arguments.attempts > 1 else ""
            events = llm.stream(show(puzzle), **{"max_new_tokens": 81, "choice": choice} | chosen)
            # Closing the stream aborts the request, should a ctrl-C come.
            with contextlib.closing(events):  # type: ignore[type-var]
                tried.append(attempt_of(puzzle, _shown(events, view, label)))
    _print(Result(tried, arguments.attempts), arguments.json, plain)


@contextlib.contextmanager
def _view(puzzle: np.ndarray, live: bool) -> Iterator[BoardView | None]:
    if live:
        from dgemma.cli.sudoku_board import BoardView
        from dgemma.cli.terminal import console

        screen = console()
        if not screen.is_dumb_terminal:
            with BoardView(screen, puzzle) as view:
                yield view
            return
    yield None


def _shown(events: Iterator[Event], view: BoardView | None, label: str) -> Iterator[Event]:
    from dgemma.eval.sudoku import digits

    for event in events:
        if view and isinstance(event, Draft):
            view.show(event, digits(event.tokens), label)
        yield event


def _print(result: Result, json: bool, plain: bool) -> None:
    if json:
        write_json(result.json())
    elif plain:
        write(result.line() + "\n")
    else:
        from dgemma.cli.sudoku_board import final_styles, grid
        from dgemma.cli.terminal import console

        screen, last = console(), result.last
        screen.print(grid(screen, last.answer, final_styles(last.puzzle, last.answer)))
        screen.print(result.message(), style="red" if result.fault else "bold")


def _read(name: str) -> tuple[list[np.ndarray], bool]:
    """The puzzles of a file, and whether lines were bad (each is told). Empty lines and `# ...` are skipped."""
    from dgemma.train.sudoku.board import parse

    if name == "-" and sys.stdin is None:
        raise RequestError("standard input is closed")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise RequestError(f"the file {name!r} cannot be read: {error.strerror}") from None
    puzzles, bad = [], False
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        try:
            puzzles += [parse(text)] if text else []
        except DataError as error:
            note(f"dgemma: error: {'standard input' if name == '-' else name}, line {number}: {error}")
            bad = True
    if not puzzles and not bad:
        raise RequestError(f"there is no puzzle in {'standard input' if name == '-' else repr(name)}")
    return puzzles, bad


def _many(llm: LLM, puzzles: Sequence[np.ndarray], chosen: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Every puzzle gets the answer that it would get alone."""
    from dgemma.eval.sudoku import attempts, retry

    chosen = dict(chosen)
    seed, solved = chosen.pop("seed", llm.generation.seed), 0
    with _progress(len(puzzles)) as step:
        for start in range(0, len(puzzles), GROUP):
            group = puzzles[start : start + GROUP]
            first = []
            for attempt in attempts(llm, group, [seed] * len(group), **chosen):
                first.append(attempt)
                step()
            for tried in retry(llm, first, [seed] * len(group), arguments.attempts, lambda: None, **chosen):
                result = Result(tried, arguments.attempts)
                solved += result.last.solved
                _print(result, arguments.json, plain=True)
    if not arguments.quiet:
        note(f"{solved} of {len(puzzles)} puzzles solved")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on standard error, where a person looks at it and the answers go elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("solving", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
