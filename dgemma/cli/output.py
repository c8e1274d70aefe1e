"""What commands write: streams set up for pipes and odd locales, plain text, the summary line, errors.

Everything goes out through `write`, so that a closed or full output is told in one line, and a pipe that its
reader closed in none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Container
from types import TracebackType
from typing import Any, Protocol

from dgemma.errors import RequestError
from dgemma.trace import Moment
from dgemma.view import Progress, count_tokens


class Display(Protocol):
    """Shows a request as it runs. Left by an exception, it leaves what there is."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, moment: Moment, progress: Progress) -> None:
        """Take the next moment, which `progress` has observed."""


class Plain:
    """Text as it becomes final, nothing else. `printable` makes it safe for where it goes."""

    def __init__(self, printable: Callable[[str], str] = lambda text: text) -> None:
        self._printable = printable
        self._open_line = False

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open_line and not isinstance(error[1], OSError):
            write("\n")

    def show(self, moment: Moment, progress: Progress) -> None:
        if moment.text:
            write(self._printable(moment.text))
            self._open_line = not moment.text.endswith("\n")


class Silent:
    """Shows nothing: the result is printed afterwards."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, moment: Moment, progress: Progress) -> None:
        pass


def display_for(
    *,
    live: bool = True,
    quiet: bool = False,
    piece: Callable[[int], str],
    blank: Container[int],
    prompt: str = "",
    every_step: bool = False,
) -> Display:
    """The display that fits standard output: live in a terminal, plain in a pipe.

    `every_step` shows all of them, however fast they come.
    """
    if not sys.stdout.isatty():
        return Plain()
    from dgemma.cli.terminal import LiveView, console, printable

    screen = console()
    if live and not quiet and not screen.is_dumb_terminal:
        return LiveView(screen, piece, blank, prompt, **({"frame_s": 0.0} if every_step else {}))
    if prompt and not quiet:
        write(printable(prompt))
    return Plain(printable)


def summary(progress: Progress, seed: int) -> str:
    """One line about a finished request."""
    reasons = {"stop": "end of text", "length": "token limit", "abort": "stopped"}
    end = progress.finished
    parts = [reasons.get(end.reason, end.reason) if end else "interrupted"]
    parts.append(f"{count_tokens(progress)} in {progress.seconds:.1f} s")
    parts.append(f"{progress.tokens_per_second:.0f} tok/s")
    if progress.steps:
        steps = "+".join(map(str, progress.steps[:6])) + ("+…" if len(progress.steps) > 6 else "")
        parts += [f"{steps} steps", f"{progress.tokens_per_forward:.1f} tok/forward"]
    return " · ".join([*parts, f"seed {seed}"])


def summarise(line: str, quiet: bool = False) -> None:
    """Print a summary, subdued, to a person; a pipe gets none."""
    if quiet or not sys.stdout.isatty():
        return
    from dgemma.cli.terminal import console, plain

    screen = console()
    screen.print(plain(screen, line), style="dim")


def prepare_streams() -> None:
    """Pipes get UTF-8 whatever the locale is; a terminal gets its own encoding, with `?` for the rest."""
    if sys.stdout is None:
        raise RequestError("standard output is closed")
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a test's stand-in may lack it
    if reconfigure is None:
        return
    if sys.stdout.isatty():
        reconfigure(errors="replace")
    else:
        reconfigure(encoding="utf-8", errors="strict")


def write(text: str) -> None:
    """Text to standard output, at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RequestError(f"standard output cannot be written: {error.strerror}") from None


def write_json(value: Any) -> None:
    """One JSON object on one line."""
    write(json.dumps(value, ensure_ascii=False) + "\n")


def flush() -> None:
    write("")


def complain(message: str) -> None:
    """`dgemma: error: ...` on standard error, in one line."""
    note(f"dgemma: error: {' '.join(message.split())}")


def note(line: str) -> None:
    """A line on standard error, if there is one to write to."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def abandon_stdout() -> None:
    """Whatever is still buffered goes nowhere, so that the interpreter's last flush cannot fail aloud."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
