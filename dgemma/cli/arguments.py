"""Arguments that commands share: every setting as a flag, the prompt from an argument or a pipe."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from dgemma.errors import RequestError
from dgemma.settings import GENERATION, LOADING, Option, Settings, resolve


class Parser(argparse.ArgumentParser):
    """argparse whose faults are `RequestError`s: one line, like every other error. No abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")


def add_loading(parser: argparse.ArgumentParser, but: tuple[str, ...] = ()) -> None:
    """Flags for which model to load and how."""
    _add(parser.add_argument_group("model"), (option for option in LOADING if option.name not in but))


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Flags for every generation parameter; what is not given stays as the checkpoint has it."""
    _add(parser.add_argument_group("generation (default: what the model's checkpoint says)"), GENERATION)


def add_screen(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--no-live", action="store_true", help="no live canvas, only what is final")
    group.add_argument("--quiet", "-q", action="store_true", help="the text and nothing else")


def _add(group: Any, options: Iterable[Option]) -> None:
    for option in options:
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else _METAVARS[option.kind]
        group.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=_parser_of(option),
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=option.help.replace("%", "%%"),
        )


_METAVARS = {int: "N", float: "X", str: "NAME"}


def _parser_of(option: Option) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except RequestError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings of a command line, merged with environment and file."""
    names = {option.name for option in (*LOADING, *GENERATION)}
    return resolve({name: value for name, value in vars(arguments).items() if name in names})


def text_of(argument: str | None, what: str) -> str:
    """The text of an argument; of standard input where the argument is `-`, or is missing and input is piped.

    One newline at the end of piped input is dropped, as a shell's `$(...)` does.
    """
    if argument is not None and argument != "-":
        text = _utf8_argument(argument, what)
    elif argument is None and (sys.stdin is None or sys.stdin.isatty()):
        raise RequestError(f"there is no {what}: give it as an argument, or pipe it in")
    elif sys.stdin is None:
        raise RequestError("standard input is closed")
    else:
        text = decode(sys.stdin.buffer.read()).removesuffix("\n").removesuffix("\r")
    if not text:
        raise RequestError(f"the {what} is empty")
    return text


def decode(data: bytes, start: int = 0) -> str:
    """Piped bytes as text; `start` is where in the input they begin, for the error message."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"standard input is not UTF-8: byte 0x{data[error.start]:02x} at offset {start + error.start}"
        ) from None


def _utf8_argument(argument: str, what: str) -> str:
    """An argument that the locale could not decode is read as UTF-8, whatever the locale says."""
    try:
        argument.encode("utf-8")
        return argument
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode("utf-8")
        except UnicodeError:
            raise RequestError(f"the {what} is not UTF-8: {os.fsencode(argument)!r}") from None
