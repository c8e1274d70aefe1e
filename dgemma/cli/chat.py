"""Talk to a model. In a terminal the canvas is shown as it is denoised; piped lines are messages, too."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dgemma.cli.arguments import add_generation, add_loading, add_screen, decode, settings_of
from dgemma.cli.output import complain, display_for, note, summarise, summary, write
from dgemma.cli.running import load, play
from dgemma.errors import DgemmaError, RequestError
from dgemma.settings import OPTIONS, Settings
from dgemma.view import Progress, moments

if TYPE_CHECKING:
    from dgemma.api import LLM

NAME = "chat"
HELP = "talk to a model"
RELEASED = "google/diffusiongemma-26B-A4B-it"
COMMANDS = """\
/reset   forget the conversation
/seed N  use another seed from now on
/help    this list
/quit    leave (so does ctrl-D); ctrl-C stops an answer
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options]"
    add_loading(parser)
    add_generation(parser)
    add_screen(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    group.add_argument("--think", action="store_true", help="let the model think aloud, if its template can")


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    llm = load(settings)
    if llm.chat_template is None:
        raise RequestError(f"the model {llm.name!r} has no chat template; use `dgemma generate`")
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if not arguments.quiet:
        for line in _greeting(llm, at_terminal):
            (summarise if sys.stdout.isatty() else note)(line)
    Conversation(llm, settings, arguments).run(_typed() if at_terminal else _piped(), at_terminal)
    return 0


class Conversation:
    """The messages so far, and how to answer the next one."""

    def __init__(self, llm: LLM, settings: Settings, arguments: argparse.Namespace) -> None:
        self._llm = llm
        self._overrides: dict[str, Any] = dict(settings.generation)
        self._arguments = arguments
        self._template = {"enable_thinking": True} if arguments.think else {}
        self._piece = functools.cache(llm.tokenizer.piece)
        self._messages: list[dict[str, str]] = []
        self._reset()

    def run(self, lines: Iterator[str], at_terminal: bool) -> None:
        """Answer line after line. A terminal survives errors and ctrl-C in an answer; a pipe does not."""
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                self._take(line)
            except DgemmaError as error:
                if not at_terminal:
                    raise
                complain(str(error))
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                summarise("stopped; the conversation goes on without this turn")

    def _take(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line[1:] if line.startswith("//") else line)
        elif word == "/help":
            write(COMMANDS)
        elif word == "/reset":
            self._reset()
            summarise("the conversation is forgotten", self._arguments.quiet)
        elif word == "/seed":
            self._overrides["seed"] = OPTIONS["seed"].parse(rest.strip())
            summarise(f"the seed is {self._overrides['seed']}", self._arguments.quiet)
        else:
            raise RequestError(f"unknown command {word}; known: /reset, /seed N, /help, /quit")

    def _reset(self) -> None:
        system = self._arguments.system
        self._messages = [{"role": "system", "content": system}] if system else []

    def _answer(self, text: str) -> None:
        asked = [*self._messages, {"role": "user", "content": text}]
        config = self._llm.generation.with_(**self._overrides)
        events = self._llm.chat_stream(asked, template=self._template, **self._overrides)
        display = display_for(
            live=not self._arguments.no_live,
            quiet=self._arguments.quiet,
            piece=self._piece,
            blank=config.blank_tokens,
        )
        told = moments(events, self._llm.tokenizer, config.stop_tokens, split_thoughts=True)
        progress = Progress()
        play(told, display, progress)
        # Only a whole turn is remembered: an interrupt has left by now.
        self._messages = [*asked, {"role": "assistant", "content": progress.text}]
        summarise(summary(progress, config.seed), self._arguments.quiet)


def _greeting(llm: LLM, at_terminal: bool) -> list[str]:
    lines = [f"{llm.name} · {str(llm.dtype).removeprefix('torch.')} on {llm.device}"]
    if llm.demo:
        lines.append(
            "This is a small demo model: it shows how denoising works and knows next to nothing. "
            f"The released one: dgemma chat --model {RELEASED}"
        )
    return [*lines, "/help lists the commands, ctrl-D leaves."] if at_terminal else lines


def _typed() -> Iterator[str]:
    """Lines from a person, with the line editor and its history."""
    import readline

    readline.set_history_length(1000)
    while True:
        try:
            yield input("\n› " if "utf" in (sys.stdout.encoding or "").lower() else "\n> ")
        except EOFError:
            write("\n")
            return
        except UnicodeDecodeError:
            complain("that line is not text in this terminal's encoding")


def _piped() -> Iterator[str]:
    """Lines from a pipe."""
    if sys.stdin is None:
        raise RequestError("standard input is closed")
    start = 0
    for data in sys.stdin.buffer:
        yield decode(data, start).rstrip("\r\n")
        start += len(data)
