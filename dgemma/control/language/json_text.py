"""JSON strings and numbers as regular expressions: lengths, patterns, formats, ranges.

Every expression may allow less than the keyword does, never more. `None` stands for nothing at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from dgemma.errors import RequestError

_FORBIDDEN = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x9F), (0xD800, 0xDFFF))
_PLAIN = r'[^"\\\x00-\x1F\x7F-\x9F]'  # a character that stands for itself in a JSON string
CHARACTER = rf'(?:{_PLAIN}|\\["\\/bfnrt])'
DIGITS = 15  # of a whole number at most, so that every reader takes it exactly
_FRACTION = r"\.[0-9]{0,5}[1-9]"
_LONG, _SHORT = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])", "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_MONTH_DAY = f"(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_DATE = f"[12][0-9]{{3}}-{_MONTH_DAY}"
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:Z|[+-](?:0[0-9]|1[0-3]):[0-5][0-9])"
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,3}}\.[a-z]{{2,6}}"
FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "date": _DATE,
        "time": _TIME,
        "date-time": f"{_DATE}T{_TIME}",
        "duration": "P[1-9][0-9]{0,2}D",
        "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
        "email": rf"[a-z0-9]{{1,16}}(?:[._-][a-z0-9]{{1,16}}){{0,3}}@{_HOST}",
        "hostname": _HOST,
        "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
        "ipv6": "(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
        "uri": rf"https?://{_HOST}(?:/[A-Za-z0-9._~-]{{1,20}}){{0,5}}",
    }
)


def literal(text: str) -> str:
    """The expression that matches `text` alone."""
    return "".join("\\" + c if c in r"\.+*?()|[]{}^$" else c for c in text)


def value(constant: Any) -> str:
    """The expression of one JSON value as `json.dumps` writes it."""
    try:
        return literal(json.dumps(constant, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(f"the schema names a value that JSON cannot write: {error}") from None


def repeat(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def string(schema: Mapping[str, Any]) -> str | None:
    """A string with `minLength`, `maxLength`, `pattern` or `format`."""
    low, high = whole(schema, "minLength", 0), whole(schema, "maxLength", None)
    given = [name for name in ("pattern", "format") if name in schema] + (
        ["minLength/maxLength"] if low or high is not None else []
    )
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} of one string cannot be combined; give one of them")
    if "pattern" in schema:
        return f'"{pattern(schema["pattern"])}"'
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise RequestError(f"format must be one of {', '.join(FORMATS)}; got {schema['format']!r}")
        return f'"{FORMATS[schema["format"]]}"'
    assert low is not None
    if high is not None and high < low:
        return None
    return f'"{CHARACTER}{"*" if not low and high is None else repeat(low, high)}"'


def whole(schema: Mapping[str, Any], name: str, default: int | None) -> int | None:
    """A keyword that counts something."""
    given = schema.get(name, default)
    if given is default:
        return default
    if isinstance(given, bool) or not isinstance(given, int | float) or given != int(given) or given < 0:
        raise RequestError(f"{name} must be a whole number of at least 0, got {given!r}")
    return int(given)


def number(schema: Mapping[str, Any], integer: bool) -> str | None:
    """A number with its bounds; whole numbers have at most 15 digits, fractions at most 6 and no exponent."""
    step = schema.get("multipleOf", 1)
    if step != 1 or isinstance(step, bool):
        raise RequestError(f"multipleOf may only be 1, got {step!r}")
    low, high = -(Fraction(10) ** DIGITS), Fraction(10) ** DIGITS
    ends = {"minimum": False, "exclusiveMinimum": True, "maximum": False, "exclusiveMaximum": True}
    open_low = open_high = True
    for name, open_ in ends.items():
        if name not in schema:
            continue
        bound = schema[name]
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            raise RequestError(f"{name} must be a number, got {bound!r}")
        exact = Fraction(str(bound))
        if name.endswith("inimum") and (exact > low or (exact == low and open_)):
            low, open_low = exact, open_
        if name.endswith("aximum") and (exact < high or (exact == high and open_)):
            high, open_high = exact, open_
    first = math.floor(low) + 1 if open_low else math.ceil(low)
    last = math.ceil(high) - 1 if open_high else math.floor(high)
    parts = [_integers(first, last)]
    if not integer and "multipleOf" not in schema:
        above, below = _fractions(low, high), _fractions(-high, -low)
        parts += [above, None if below is None else "-" + below]
    return union(parts)


def _integers(first: int, last: int) -> str | None:
    """Whole numbers from `first` to `last`."""
    positive = digits(max(0, first), last) if last >= 0 else None
    negative = digits(max(1, -last), -first) if first < 0 else None
    return union([positive, None if negative is None else f"-{negative}"])


def _fractions(low: Fraction, high: Fraction) -> str | None:
    """Numbers of at least 0 between `low` and `high` that are not whole, most of them."""
    first, last = max(0, math.ceil(low)), math.floor(high) - 1
    if first <= last:
        return f"{digits(first, last)}{_FRACTION}"
    low = max(low, Fraction(0))
    for places in range(1, 7):
        scale = 10**places
        begin, end = math.floor(low * scale) + 1, math.ceil(high * scale) - 1
        base = begin // scale
        end = min(end, (base + 1) * scale - 1)
        if begin <= end and begin % scale:
            return rf"{base}\.{_same_length(f'{begin % scale:0{places}}', f'{end % scale:0{places}}')}"
    return None


def digits(first: int, last: int) -> str | None:
    """Whole numbers from `first >= 0` to `last`, without leading zeros."""
    parts: list[str | None] = []
    while first <= last:
        size = len(str(first))
        end = min(last, 10**size - 1)
        parts.append(_same_length(str(first), str(end)))
        first = end + 1
    # Whole decades that follow each other are one expression: [1-9][0-9]{0,14}.
    return union(_decades(parts))


def _decades(parts: list[str | None]) -> list[str | None]:
    whole = {("[1-9]" if size == 1 else f"[1-9]{_any(size - 1)}"): size for size in range(1, DIGITS + 1)}
    sizes = [whole[part] for part in parts if part in whole]
    if len(sizes) < 2:
        return parts
    least, most = sizes[0] - 1, sizes[-1] - 1
    return [part for part in parts if part not in whole] + [f"[1-9][0-9]{repeat(least, most)}"]


def _same_length(low: str, high: str) -> str:
    if low == high:
        return low
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return _span(low[0], high[0]) + _any(rest)
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    parts: list[str | None] = []
    first, last = int(low[0]), int(high[0])
    if low[1:] != "0" * rest:
        parts.append(low[0] + _same_length(low[1:], "9" * rest))
        first += 1
    tail = None
    if high[1:] != "9" * rest:
        tail = high[0] + _same_length("0" * rest, high[1:])
        last -= 1
    if first <= last:
        parts.append(_span(str(first), str(last)) + _any(rest))
    made = union([*parts, tail])
    assert made is not None
    return made


def _span(low: str, high: str) -> str:
    return low if low == high else f"[{low}-{high}]"


def _any(count: int) -> str:
    return "" if not count else "[0-9]" if count == 1 else f"[0-9]{{{count}}}"


def union(parts: list[str | None]) -> str | None:
    """Any of the expressions."""
    kept = list(dict.fromkeys(part for part in parts if part is not None))
    return None if not kept else kept[0] if len(kept) == 1 else f"(?:{'|'.join(kept)})"


def pattern(text: str) -> str:
    """The characters between the quotes of a JSON string that `pattern` allows; a part of them if it asks for escapes.

    ECMA's syntax without look-around, back-references, word boundaries and flags.
    """
    if not isinstance(text, str):
        raise RequestError(f"pattern must be a string, got {text!r}")
    try:
        re.compile(text)
    except re.error as error:
        raise RequestError(f"pattern {text!r} is not a regular expression: {error}") from None
    body = text.removeprefix("^")
    ended = body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2 == 1
    inner = _Pattern(text, body[:-1] if ended else body)
    made = inner.read()
    if inner.split and (body != text or ended):
        raise RequestError(f"pattern {text!r}: anchors beside an alternation; write ^(?:..)$")
    return f"{'' if body != text else CHARACTER + '*'}(?:{made}){'' if ended else CHARACTER + '*'}"


class _Pattern:
    """One reading of a pattern."""

    _SETS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
        {"d": ((48, 57),), "w": ((48, 57), (65, 90), (95, 95), (97, 122)), "s": ((32, 32),)}
    )
    # What \S and \W leave out is all that any reader takes for a space or a word character below U+0080.
    _OUT: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
        {
            "D": ((48, 57), (0x80, 0x10FFFF)),
            "W": ((48, 57), (65, 90), (95, 95), (97, 122), (0x80, 0x10FFFF)),
            "S": ((9, 13), (32, 32), (0x80, 0x10FFFF)),
        }
    )
    _CONTROL: Mapping[str, str] = MappingProxyType({"n": "\n", "t": "\t", "r": "\r", "f": "\f"})

    def __init__(self, whole: str, body: str) -> None:
        self.whole, self.body, self.at, self.depth, self.split = whole, body, 0, 0, False

    def read(self) -> str:
        out = []
        while self.at < len(self.body):
            c = self._next()
            if c == "\\":
                out.append(self._escape())
            elif c == "[":
                out.append(self._class())
            elif c == "(":
                out.append(self._open())
            elif c in "^$":
                raise self._no(f"the anchor {c} inside")
            elif c == ".":
                out.append(_PLAIN)
            elif c in "*+?":
                out.append(c + self._lazy())
            elif c == "{" and (found := re.match(r"[0-9]+(,[0-9]*)?\}", self.body[self.at :])):
                self.at += found.end()
                out.append("{" + found.group() + self._lazy())
            elif c in "|)":
                self.depth -= c == ")"
                self.split |= c == "|" and not self.depth
                out.append(c)
            else:
                out.append(self._literal(c))
        return "".join(out)

    def _next(self) -> str:
        if self.at >= len(self.body):
            raise self._no("an end that comes too early")
        self.at += 1
        return self.body[self.at - 1]

    def _lazy(self) -> str:
        """A lazy quantifier allows the same texts."""
        if self.body[self.at : self.at + 1] == "?":
            self.at += 1
        if self.body[self.at : self.at + 1] == "+":
            raise self._no("a possessive quantifier")
        return ""

    def _open(self) -> str:
        self.depth += 1
        rest = self.body[self.at :]
        if rest.startswith("?"):
            found = re.match(r"\?(:|P?<[A-Za-z_]\w*>)", rest)
            if not found:
                raise self._no(f"({rest[:3]}")
            self.at += found.end()
        return "(?:"

    def _escape(self) -> str:
        c = self._next()
        if c in self._SETS:
            return _class(list(self._SETS[c]))
        if c in self._OUT:
            return _class(_inverse(list(self._OUT[c])))
        return self._literal(self._character(c))

    def _character(self, c: str) -> str:
        if c in self._CONTROL:
            return self._CONTROL[c]
        if c in "ux":
            size = 4 if c == "u" else 2
            digits, self.at = self.body[self.at : self.at + size], self.at + size
            if not re.fullmatch(f"[0-9A-Fa-f]{{{size}}}", digits):
                raise self._no(f"\\{c}{digits}")
            return chr(int(digits, 16))
        if c.isalnum():
            raise self._no(f"\\{c}")
        return c

    def _literal(self, c: str) -> str:
        try:
            inner = json.dumps(c, ensure_ascii=False)[1:-1]
            inner.encode()
        except UnicodeEncodeError:
            raise self._no(f"the surrogate {c!r}") from None
        if inner.startswith("\\u") or 0x7F <= ord(c) <= 0x9F:
            raise self._no(f"the control character {c!r}")
        return literal(inner) if len(inner) == 1 else f"(?:{literal(inner)})"

    def _class(self) -> str:
        negated = self.body[self.at : self.at + 1] == "^"
        self.at += negated
        spans: list[tuple[int, int]] = []
        first = True
        while (c := self._next()) != "]" or first:
            first = False
            if c == "\\":
                c = self._next()
                if c in self._SETS or c in self._OUT:
                    out = c in self._OUT
                    if out and negated:
                        raise self._no(f"\\{c} in a negated class")
                    # Negated, more must be left out than \s stands for in one reader.
                    own = list(self._SETS[c]) if not out else _inverse(list(self._OUT[c]))
                    spans += [(9, 13), (32, 32), (0x80, 0x10FFFF)] if negated and c == "s" else own
                    continue
                c = "\b" if c == "b" else self._character(c)
            low = high = ord(c)
            if self.body[self.at : self.at + 1] == "-" and self.body[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                end = self._next()
                high = ord(self._character(self._next()) if end == "\\" else end)
            spans.append((low, high))
        made = _class(_inverse(spans) if negated else spans)
        if not made:
            raise self._no("a class without a character that stands for itself in a JSON string")
        return made

    def _no(self, what: str) -> RequestError:
        return RequestError(f"pattern {self.whole!r}: {what} is not supported")


def _inverse(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out, at = [], 0
    for low, high in sorted(spans):
        if at < low:
            out.append((at, low - 1))
        at = max(at, high + 1)
    return [*out, (at, 0x10FFFF)] if at <= 0x10FFFF else out


def _class(spans: list[tuple[int, int]]) -> str:
    """A class of the characters in `spans` that stand for themselves in a JSON string."""
    allowed = _inverse([*_inverse(spans), *_FORBIDDEN])
    inner = "".join(_shown(low) if low == high else f"{_shown(low)}-{_shown(high)}" for low, high in allowed)
    return f"[{inner}]" if inner else ""


def _shown(code: int) -> str:
    c = chr(code)
    return "\\" + c if c in r"\]^[-&~" else c
