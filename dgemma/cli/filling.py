"""The common part of `infill` and `edit`: run a search, show the steps of the fill that it chose."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Generator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dgemma.cli.output import Plain, display_for, summarise, write
from dgemma.cli.running import busy, play
from dgemma.settings import Settings
from dgemma.trace import Moment
from dgemma.view import Progress, moments

if TYPE_CHECKING:
    from dgemma.api import LLM
    from dgemma.engine.infilling import Candidate, Filling, Infilled

_FRAME_S = 0.04


def add_search(parser: argparse.ArgumentParser) -> None:
    """Flags of the search itself."""
    group = parser.add_argument_group("search")
    group.add_argument("--prompt", default="", metavar="TEXT", help="what stands before the text; not printed")
    group.add_argument(
        "--candidates", type=int, default=argparse.SUPPRESS, metavar="N", help="choices of lengths at once (default 12)"
    )
    group.add_argument("--truncate", action="store_true", help="allow holes that do not see all the text behind them")


def search_options(arguments: argparse.Namespace, settings: Settings, *names: str) -> dict[str, Any]:
    """What the library's call takes, of a command line; `names` are of the command itself."""
    given = vars(arguments)
    chosen = {name: given[name] for name in ("prompt", "candidates", "truncate", *names) if name in given}
    # A budget of the environment or the file is meant for answers; only a flag was meant for this.
    generation = {
        name: value for name, value in settings.generation.items() if name != "max_new_tokens" or name in given
    }
    return generation | chosen


def search(llm: LLM, filling: Filling) -> Infilled:
    """Run it. In a terminal something turns meanwhile."""
    from dgemma.engine.infilling import run

    lengths = len(filling.requests())
    with busy(f"trying {lengths} lengths …" if lengths > 1 else "writing …"):
        return run(llm.worker, filling)


def show(llm: LLM, filled: Infilled, before: str, arguments: argparse.Namespace) -> None:
    """The chosen fill as it came to be, in a terminal; the text alone in a pipe."""
    live = sys.stdout.isatty() and not arguments.no_live and not arguments.quiet
    display = display_for(
        live=live,
        quiet=arguments.quiet,
        piece=functools.cache(llm.tokenizer.piece),
        blank=llm.generation.blank_tokens,
        prompt=before,
    )
    if isinstance(display, Plain):
        write(filled.text + "\n" * (not filled.text.endswith("\n")))
    else:
        play(_steps(llm, filled.candidates[0]), display, Progress())


def _steps(llm: LLM, candidate: Candidate) -> Generator[Moment]:
    """The kept events at a pace that can be followed: they happened while others were tried, too."""
    with contextlib.closing(moments(iter(candidate.events), llm.tokenizer, llm.generation.stop_tokens)) as steps:
        for moment in steps:
            time.sleep(_FRAME_S)
            yield moment


def summary(filled: Infilled, seconds: float) -> str:
    """One line about a finished search."""
    best = filled.candidates[0]
    count = len(filled.candidates)
    parts = [f"best of {count}" if count > 1 else "1 try", "+".join(map(str, best.lengths)) + " tokens"]
    parts += [f"{filled.logprob:.1f} nats", f"{sum(best.steps)} steps", f"{seconds:.1f} s", f"seed {filled.seed}"]
    notes = ["cut into several canvases"] * filled.truncated
    notes += [f"not shown to the model: {', '.join(filled.ignored)}"] * bool(filled.ignored)
    return " · ".join([*parts, *notes])


def told(filled: Infilled, arguments: argparse.Namespace, seconds: float) -> None:
    summarise(summary(filled, seconds), arguments.quiet)


def candidates_of(filled: Infilled) -> list[dict[str, Any]]:
    """For `--json`: every candidate without its events."""
    return [
        {name: value for name, value in asdict(one).items() if name not in ("events", "token_ids")}
        for one in filled.candidates
    ]
