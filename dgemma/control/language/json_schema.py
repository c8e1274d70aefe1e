"""A JSON Schema as a regular expression of the texts that `json.dumps` could write for its values.

Every text that the expression allows is valid; not every valid text is allowed: properties come in the order of the
schema and none that it does not name (but for maps), with one space behind comma and colon. What can only be checked
and not written this way is refused by name. `None` stands for "no value".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma.control.language.json_merge import ANNOTATIONS, apart, kinds_of, merged
from dgemma.control.language.json_text import CHARACTER, number, pattern, repeat, string, union, value, whole
from dgemma.errors import RequestError

DEPTH = 3
"""How often a reference may stand inside itself, and how deep "any object" is nested."""
_MOST = 200_000
# A value without a schema is a scalar, or a flat array or object: deeper ones have thousands of states each.
_ANY_DEPTH = 1
_REFUSED = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef", "additionalItems",
)  # fmt: skip
_TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
Schema = Mapping[str, Any] | bool


def schema_regex(schema: Schema, depth: int = DEPTH) -> str:
    """`RequestError` for a schema that is none, is not supported, or has no value."""
    made = _Builder(schema, depth).build(schema)
    if made is None:
        raise RequestError("the schema allows no value")
    return made


def json_object_regex(depth: int = DEPTH) -> str:
    """Any JSON object, nested to at most `depth` objects or arrays."""
    made = _Builder(True, depth).any_object(depth)
    assert made is not None
    return made


class _Builder:
    def __init__(self, root: Schema, depth: int) -> None:
        self._root, self._depth = root, depth
        self._open: list[str] = []

    def build(self, schema: Schema) -> str | None:
        made = self._build(schema)
        if made is not None and len(made) > _MOST:
            raise RequestError(f"the schema's regular expression has more than {_MOST} characters; nest it less deeply")
        return made

    def _build(self, schema: Schema) -> str | None:
        if isinstance(schema, bool):
            return self._any(_ANY_DEPTH) if schema else None
        if not isinstance(schema, Mapping):
            raise RequestError(f"a schema must be an object or a boolean, got {schema!r}")
        if "$id" in schema and schema is not self._root:
            raise RequestError("the schema keyword '$id' inside a schema is not supported: it moves references")
        for name in _REFUSED:
            if name in schema:
                raise RequestError(f"the schema keyword {name!r} is not supported")
        if "$ref" in schema:
            return self._reference(schema)
        if "allOf" in schema:
            return self.build(merged(_listed(schema, "allOf"), schema, self._resolve))
        for name in ("anyOf", "oneOf"):
            if name in schema:
                return self._choice(schema, name)
        if "enum" in schema or "const" in schema:
            return self._constants(schema)
        return union([self._typed(kind, schema) for kind in kinds_of(schema, _TYPES)])

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str | None:
        match kind:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return string(schema)
            case "integer" | "number":
                return number(schema, kind == "integer")
            case "boolean":
                return "(?:true|false)"
            case _:
                return "null"

    def _resolve(self, name: Any) -> Schema:
        if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
            raise RequestError(f"$ref must point into the schema itself (# or #/...), got {name!r}")
        found: Any = self._root
        for part in name[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~").replace("%25", "%")
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise RequestError(f"$ref {name!r} points to nothing in the schema") from None
        if not isinstance(found, Mapping | bool):
            raise RequestError(f"$ref {name!r} does not point to a schema")
        return found

    def _reference(self, schema: Mapping[str, Any]) -> str | None:
        name = schema["$ref"]
        target = self._resolve(name)
        if self._open.count(name) > self._depth:
            return None
        rest = {key: part for key, part in schema.items() if key not in ("$ref", "$defs", "definitions")}
        self._open.append(name)
        made = self.build(merged([target], rest, self._resolve) if kinds_matter(rest) else target)
        self._open.pop()
        return made

    def _choice(self, schema: Mapping[str, Any], name: str) -> str | None:
        options = _listed(schema, name)
        rest = {key: part for key, part in schema.items() if key != name}
        if name == "oneOf":
            full = [self._flat(option) for option in options]
            for right in range(len(full)):
                for left in range(right):
                    if not apart(full[left], full[right], self._resolve):
                        raise RequestError(
                            f"oneOf: its schemas {left} and {right} may hold for one value at once; use anyOf, or give "
                            "them different types or a property with different constants"
                        )
        plain = not kinds_matter(rest)
        return union([self.build(option if plain else merged([option], rest, self._resolve)) for option in options])

    def _flat(self, option: Schema) -> Schema:
        seen = 0
        while isinstance(option, Mapping) and "$ref" in option and seen < 16:
            option, seen = self._resolve(option["$ref"]), seen + 1
        return option

    def _constants(self, schema: Mapping[str, Any]) -> str | None:
        values = _listed(schema, "enum") if "enum" in schema else [schema["const"]]
        if "const" in schema:
            values = [one for one in values if value(one) == value(schema["const"])]
        rest = {key: part for key, part in schema.items() if key not in ("enum", "const")}
        if kinds_matter(rest):
            made = self.build(rest)
            values = [one for one in values if made is not None and re.fullmatch(made, _dumped(one))]
        return union([value(one) for one in values])

    def _object(self, schema: Mapping[str, Any]) -> str | None:
        named = schema.get("properties", {})
        if not isinstance(named, Mapping):
            raise RequestError(f"properties must be an object, got {named!r}")
        more, patterns = schema.get("additionalProperties", True), schema.get("patternProperties", {})
        required = [str(name) for name in _listed(schema, "required", empty=True)]
        low, high = whole(schema, "minProperties", 0), whole(schema, "maxProperties", None)
        assert low is not None
        if not named and not required:
            return self._map(schema, more, patterns, low, high)
        for name in {*named, *required}:
            if any(re.search(one, name) for one in patterns):
                raise RequestError(f"the property {name!r} is also named by patternProperties; that is not supported")
        if "propertyNames" in schema:
            raise RequestError("propertyNames beside properties is not supported")
        parts: list[tuple[str, bool]] = []
        for name in [*named, *(name for name in required if name not in named)]:
            made = self.build(named.get(name, more))
            if made is not None:
                parts.append((f"{value(name)}: {made}", name in required))
            elif name in required:
                return None
        count = sum(needed for _, needed in parts)
        if len(parts) < low or (high is not None and high < count):
            return None
        for place, (text, needed) in enumerate(parts):  # too few required: the first others are, too
            if count < low and not needed:
                parts[place], count = (text, True), count + 1
        if high is not None and high < len(parts):  # too many in all: only the required ones
            parts = [part for part in parts if part[1]]
        return rf"\{{{_sequence(parts)}\}}"

    def _map(
        self, schema: Mapping[str, Any], more: Schema, patterns: Mapping[str, Schema], low: int, high: int | None
    ) -> str | None:
        """An object whose properties have no names of their own."""
        if len(patterns) > 1:
            raise RequestError(f"patternProperties may have one pattern, got {len(patterns)}")
        if low > 1:
            raise RequestError(f"minProperties of an object without named properties may be at most 1, got {low}")
        names = schema.get("propertyNames", True)
        if patterns and names is not True:
            raise RequestError("propertyNames beside patternProperties is not supported")
        key: str | None = f'"{CHARACTER}*"'
        for one, of in patterns.items():
            key, more = f'"{pattern(one)}"', of
        if names is not True:
            key = None if names is False else self.build({**names, "type": "string"})
        inner = None if key is None or high == 0 else self.build(more)
        if inner is None:
            return None if low else r"\{\}"
        entry, rest = f"{key}: {inner}", "*" if high is None else repeat(0, high - 1)
        filled = rf"{entry}(?:, {entry}){rest}"
        return rf"\{{{filled}\}}" if low else rf"\{{(?:{filled})?\}}"

    def _array(self, schema: Mapping[str, Any]) -> str | None:
        first = _listed(schema, "prefixItems", empty=True)
        items = schema.get("items", True)
        if isinstance(items, list):
            raise RequestError("items must be one schema; for a tuple use prefixItems")
        low, high = whole(schema, "minItems", 0), whole(schema, "maxItems", None)
        assert low is not None
        if high is not None and high < low:
            return None
        if schema.get("uniqueItems") and high not in (0, 1):
            raise RequestError("uniqueItems is not supported (but for arrays of at most one item)")
        head: list[str] = []
        for place, one in enumerate(first if high is None else first[:high]):
            made = self.build(one)
            if made is None:
                if place < low:
                    return None
                return self._items(head, None, low, place)
            head.append(made)
        return self._items(head, None if high is not None and high <= len(head) else self.build(items), low, high)

    def _items(self, head: list[str], rest: str | None, low: int, high: int | None) -> str | None:
        if rest is None and low > len(head):
            return None
        parts = [(text, True) for text in head]
        if rest is None:
            # All of the head is written, though a shorter one would be valid, too.
            return rf"\[{_sequence(parts)}\]"
        least, most = max(0, low - len(head)), None if high is None else high - len(head)
        if head:
            return rf"\[{_sequence(parts)}(?:, {rest}){repeat(least, most)}\]"
        if most == 0:
            return r"\[\]"
        more = f"{rest}(?:, {rest}){repeat(max(0, least - 1), None if most is None else most - 1)}"
        return rf"\[{more}\]" if least else rf"\[(?:{more})?\]"

    def _any(self, depth: int) -> str | None:
        scalars: list[str | None] = [string({}), number({}, False), "true", "false", "null"]
        if not depth:
            return union(scalars)
        inner = self._any(depth - 1)
        assert inner is not None
        return union([*scalars, self._items([], inner, 0, None), self.any_object(depth)])

    def any_object(self, depth: int) -> str | None:
        inner = self._any(depth - 1)
        assert inner is not None
        entry = f'"{CHARACTER}*": {inner}'
        return rf"\{{(?:{entry}(?:, {entry})*)?\}}"


def kinds_matter(schema: Mapping[str, Any]) -> bool:
    """Whether anything but annotations is in it."""
    return bool(set(schema) - ANNOTATIONS)


def _sequence(parts: Sequence[tuple[str, bool]]) -> str:
    """Texts in their order with `, ` between those that are there; each with whether it must be."""
    first = next((place for place, (_, needed) in enumerate(parts) if needed), None)
    if first is not None:
        before = "".join(f"(?:{text}, )?" for text, _ in parts[:first])
        return before + parts[first][0] + "".join(_then(part) for part in parts[first + 1 :])
    made = union([text + "".join(_then(part) for part in parts[place + 1 :]) for place, (text, _) in enumerate(parts)])
    return "" if made is None else f"(?:{made})?"


def _then(part: tuple[str, bool]) -> str:
    return f", {part[0]}" if part[1] else f"(?:, {part[0]})?"


def _listed(schema: Mapping[str, Any], name: str, empty: bool = False) -> list[Any]:
    given = schema.get(name, [])
    if not isinstance(given, list | tuple) or not (given or empty):
        raise RequestError(f"{name} must be a list{'' if empty else ' of at least one'}, got {given!r}")
    return list(given)


def _dumped(constant: Any) -> str:
    return json.dumps(constant, ensure_ascii=False)
