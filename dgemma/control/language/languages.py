"""What callers constrain an answer by (a regular expression, choices, a JSON Schema, a grammar), and its automata.

Knows a vocabulary's bytes; no engine and no HTTP.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, TypeVar

from dgemma.config import GenerationConfig
from dgemma.control.language.automaton import TokenEdges, compile_tokens
from dgemma.control.language.grammar import grammar_regex
from dgemma.control.language.json_schema import json_object_regex, schema_regex
from dgemma.control.language.json_text import literal
from dgemma.control.language.machine import Machine
from dgemma.control.language.regex import compile_regex
from dgemma.control.language.vocabulary import Vocabulary
from dgemma.errors import RequestError

_K = TypeVar("_K")
_V = TypeVar("_V")
KEPT = 32
"""Compiled automata that a `Compiler` keeps."""
LANGUAGES = ("schema", "regex", "choices", "grammar")
ANY_OBJECT = "object"
"""As a schema: any JSON object."""


def expression(
    *, schema: Any = None, regex: str | None = None, choices: Sequence[str] | None = None, grammar: str | None = None
) -> str | None:
    """The regular expression of the one that is given, None if none is.

    `schema` is a JSON Schema (or its text), a pydantic model, or "object" for any JSON object.
    """
    given = {"schema": schema, "regex": regex, "choices": choices, "grammar": grammar}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise RequestError(f"an answer can have one of schema, regex, choices and grammar; got {' and '.join(named)}")
    if schema is not None:
        return _schema(schema)
    if regex is not None:
        return _unanchored(regex)
    if choices is not None:
        return _choices(choices)
    return None if grammar is None else grammar_regex(grammar)


def reader(schema: Any) -> Callable[[str], Any] | None:
    """What makes a value of an answer that fits `schema`: an object of a pydantic model, or what JSON says."""
    if schema is None:
        return None
    read: Callable[[str], Any] = getattr(schema, "model_validate_json", json.loads)
    return read


def _schema(schema: Any) -> str:
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if schema == ANY_OBJECT:
        return json_object_regex()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise RequestError(f"the schema is not JSON: {error}") from None
    return schema_regex(schema)


def _unanchored(regex: str) -> str:
    """An answer is always matched as a whole, so anchors around it say nothing."""
    if not isinstance(regex, str):
        raise RequestError(f"regex must be a string, got {type(regex).__name__}")
    if regex.startswith("^") and regex.endswith("$") and not regex.endswith(r"\$") and "|" not in regex:
        return regex[1:-1]
    return regex


def _choices(choices: Sequence[str]) -> str:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise RequestError(f"choices must be a list of at least one text, got {choices!r}")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise RequestError(f"a choice must be a text that is not empty, got {choice!r}")
    return "|".join(literal(choice) for choice in dict.fromkeys(choices))


class Compiler:
    """Automata of one vocabulary, the last few of them kept. Any thread may use it."""

    def __init__(self, pieces: Callable[[], Sequence[bytes | None]], size: int, keep: int = KEPT) -> None:
        """`pieces` gives the bytes of each token when the first automaton is asked for; `size` is the model's V."""
        self._pieces, self._size, self._keep = pieces, size, keep
        self._vocabulary: Vocabulary | None = None
        self._edges: OrderedDict[str, TokenEdges] = OrderedDict()
        self._machines: OrderedDict[tuple[str, frozenset[int], int, frozenset[int]], Machine] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._edges)

    def constraint(self, config: GenerationConfig, language: Mapping[str, Any]) -> Machine | None:
        """The constraint of the one language that is given (see `expression`), None if none is."""
        pattern = expression(**language)
        if pattern is None:
            return None
        if config.mode != "diffusion":  # before anything is compiled in vain
            raise RequestError(f'a constraint acts on a canvas and needs mode "diffusion", got mode "{config.mode}"')
        return replace(self.machine(pattern, config), reader=reader(language.get("schema")))

    def machine(self, pattern: str, config: GenerationConfig) -> Machine:
        """The constraint for a request with these settings; `RequestError` if it can have no answer."""
        made = self._machine(pattern, frozenset(config.stop_tokens), config.pad_token, config.banned)
        made.check(config)
        return made

    def _machine(self, pattern: str, stops: frozenset[int], pad: int, banned: frozenset[int]) -> Machine:
        key = pattern, stops, pad, banned
        with self._lock:
            if key in self._machines:
                self._machines.move_to_end(key)
                return self._machines[key]
        made = Machine.of(self.edges(pattern), stops, pad, banned)
        with self._lock:
            _remember(self._machines, key, made, self._keep)
        return made

    def edges(self, pattern: str) -> TokenEdges:
        """The automaton of the text that `pattern` allows."""
        with self._lock:
            if pattern in self._edges:
                self._edges.move_to_end(pattern)
                return self._edges[pattern]
            if self._vocabulary is None:
                self._vocabulary = Vocabulary.of(self._pieces(), self._size)
        edges = compile_tokens(compile_regex(pattern), self._vocabulary)
        with self._lock:
            _remember(self._edges, pattern, edges, self._keep)
        return edges


def _remember(kept: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> None:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
