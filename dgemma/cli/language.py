"""Arguments for what the whole answer must fit: a JSON Schema, a regular expression, choices or a grammar."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dgemma.errors import RequestError


def add_language(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("constraint (one of them)")
    group.add_argument("--schema", metavar="FILE", help="a JSON Schema; `object` is any JSON object")
    group.add_argument("--regex", metavar="REGEX", help="a regular expression that the whole answer matches")
    group.add_argument("--choices", metavar="A,B", help="texts of which the answer is one")
    group.add_argument("--grammar", metavar="FILE", help="a grammar in the notation of docs/constraints.md")


def language_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The language as `LLM.request` takes it; empty if none is asked for."""
    found: dict[str, Any] = {}
    if arguments.schema is not None:
        found["schema"] = arguments.schema if arguments.schema == "object" else _read(arguments.schema, "schema")
    if arguments.regex is not None:
        found["regex"] = arguments.regex
    if arguments.choices is not None:
        found["choices"] = [choice for choice in arguments.choices.split(",") if choice]
    if arguments.grammar is not None:
        found["grammar"] = _read(arguments.grammar, "grammar")
    return found


def _read(name: str, what: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise RequestError(f"the {what} {name!r} cannot be read: {error}") from None
