"""A small grammar notation, written out to a bounded depth as a regular expression.

    answer: sum "\\n"
    sum: number (" + " sum)?        # rules may stand inside themselves
    number: /[0-9]{1,3}/ | "(" sum ")"

A line is a rule, its name first; a line that begins with a space or `|` goes on with the one before. The first rule is
the whole answer. `"text"` (escapes as in JSON), `/regex/`, names, `( )`, `|`, `?`, `*`, `+`, `{2,5}`, and `#` comments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType

from dgemma.control.language.json_text import literal, union
from dgemma.errors import RequestError

DEPTH = 4
"""How often a rule may stand inside itself; where it would go deeper, that alternative is not there."""
_MOST = 200_000
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|/(?P<regex>(?:[^/\\]|\\.)+)/|(?P<name>[A-Za-z_]\w*)|(?P<sign>[()|]))"""
    r"""(?P<times>[*+?]|\{[0-9]+(?:,[0-9]*)?\})?"""
)
_TIMES = re.compile(r"[*+?]|\{[0-9]+(?:,[0-9]*)?\}")


def grammar_regex(text: str, depth: int = DEPTH) -> str:
    """`RequestError` names the rule and what is wrong with it."""
    rules = _rules(text)
    made = _Grammar(rules, depth).rule(next(iter(rules)))
    if made is None:
        raise RequestError(f"the grammar allows no text within a depth of {depth}: every way goes on for ever")
    return made


def _rules(text: str) -> Mapping[str, str]:
    if not isinstance(text, str):
        raise RequestError(f"a grammar is a text, got {type(text).__name__}")
    rules: dict[str, str] = {}
    last = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = _without_comment(line)
        if not line.strip():
            continue
        found = re.match(r"([A-Za-z_]\w*)\s*:(.*)$", line)
        if found and not line[0].isspace():
            last = found[1]
            if last in rules:
                raise RequestError(f"the grammar's line {number} defines the rule {last!r} again")
            rules[last] = found[2]
        elif last and (line[0].isspace() or line[0] == "|"):
            rules[last] += " " + line.strip()
        else:
            raise RequestError(f"the grammar's line {number} is no rule (name: ...): {line[:60]!r}")
    if not rules:
        raise RequestError("the grammar has no rule")
    return MappingProxyType(rules)


def _without_comment(line: str) -> str:
    kept = re.match(r"""(?:"(?:[^"\\]|\\.)*"|/(?:[^/\\]|\\.)+/|[^"/#]|["/])*""", line)
    return kept.group() if kept else line


class _Grammar:
    def __init__(self, rules: Mapping[str, str], depth: int) -> None:
        self._rules, self._depth = rules, depth
        self._open: list[str] = []

    def rule(self, name: str) -> str | None:
        """The expression of a rule, None where it is too deep in itself."""
        if name not in self._rules:
            raise RequestError(f"the grammar has no rule {name!r}; it has {', '.join(self._rules)}")
        if self._open.count(name) > self._depth:
            return None
        self._open.append(name)
        made, rest = self._alternatives(self._rules[name])
        self._open.pop()
        if rest.strip():
            raise self._fault(name, rest)
        if made is not None and len(made) > _MOST:
            raise RequestError(
                f"the grammar's rule {name!r} has more than {_MOST} characters when written out; make its depth "
                f"({self._depth}) or its recursion smaller"
            )
        return made

    def _fault(self, name: str, rest: str) -> RequestError:
        return RequestError(f"the grammar's rule {name!r} cannot be read from {rest.strip()[:40]!r} on")

    def _alternatives(self, text: str) -> tuple[str | None, str]:
        """Read up to a closing parenthesis or the end: the expression, and what is left."""
        options: list[str | None] = []
        parts: list[str | None] = []
        while text.strip():
            found = _TOKEN.match(text)
            if not found or found["sign"] == ")":
                break
            text = text[found.end() :]
            times = found["times"] or ""
            if found["sign"] == "|":
                if times:
                    raise self._fault(self._open[-1], "|" + times)
                options.append(_joined(parts))
                parts = []
                continue
            if found["sign"] == "(":
                inner, text = self._alternatives(text)
                if not text.strip().startswith(")"):
                    raise self._fault(self._open[-1], "(" + text)
                text = text.strip()[1:]
                after = _TIMES.match(text)
                times, text = (after.group(), text[after.end() :]) if after else ("", text)
            else:
                inner = self._single(found)
            parts.append(_times(inner, times))
        options.append(_joined(parts))
        return union(options), text

    def _single(self, found: re.Match[str]) -> str | None:
        if found["name"]:
            return self.rule(found["name"])
        if found["regex"]:
            return f"(?:{found['regex']})".replace(r"\/", "/")
        try:
            return literal(json.loads(found["text"]))
        except ValueError:
            raise self._fault(self._open[-1], found["text"]) from None


def _joined(parts: list[str | None]) -> str | None:
    kept = [part for part in parts if part is not None]
    return "".join(kept) if len(kept) == len(parts) else None


def _times(inner: str | None, times: str) -> str | None:
    if not times:
        return inner
    if inner is None:
        return "" if times in "*?" or times.startswith(("{0,", "{0}")) else None
    return f"(?:{inner}){times}"
