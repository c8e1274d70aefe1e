"""What two JSON Schemas ask together, and whether they can both hold for one value. Writes no expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dgemma.errors import RequestError

Schema = Mapping[str, Any] | bool
Resolve = Callable[[Any], Schema]
_ALL = frozenset(("object", "array", "string", "integer", "number", "boolean", "null"))
_IMPLIED = {
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
        "maxProperties",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "deprecated", "readOnly",
     "writeOnly", "discriminator", "$defs", "definitions")
)  # fmt: skip
_HIGHEST = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_LOWEST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


def kinds_of(schema: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """The types that its values are written with: those it names, else the one its keywords are about, else any.

    Without `type`, values of other types would be valid, too; who writes `minLength` wants a string.
    """
    if "type" in schema:
        given = schema["type"] if isinstance(schema["type"], list | tuple) else [schema["type"]]
        for kind in given:
            if kind not in known:
                raise RequestError(f"type must be one of {', '.join(known)}; got {kind!r}")
        return [kind for kind in given if not (kind == "integer" and "number" in given)]
    implied = [kind for kind, names in _IMPLIED.items() if any(name in schema for name in names)]
    return implied or [kind for kind in known if kind != "integer"]


def merged(parts: Sequence[Schema], rest: Mapping[str, Any], resolve: Resolve, depth: int = 0) -> Schema:
    """One schema that asks what all of `parts` and `rest` (less its own `allOf`) ask."""
    if depth > 16:
        raise RequestError("allOf and $ref are nested more than 16 deep")
    made: dict[str, Any] = {key: part for key, part in rest.items() if key not in ("allOf", "$ref")}
    for part in parts:
        if part is False:
            return False
        if part is True:
            continue
        if not isinstance(part, Mapping):
            raise RequestError(f"a schema must be an object or a boolean, got {part!r}")
        inner = [*([resolve(part["$ref"])] if "$ref" in part else []), *part.get("allOf", [])]
        flat = merged(inner, part, resolve, depth + 1) if inner else part
        if isinstance(flat, bool):
            if not flat:
                return False
            continue
        _same_names(made, flat)
        for key, value in flat.items():
            made[key] = _both(key, made[key], value) if key in made else value
    return made


def _same_names(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    for one, other in ((left, right), (right, left)):
        if "items" in one and "prefixItems" in other and one.get("prefixItems") != other["prefixItems"]:
            raise RequestError("allOf: items beside a schema with other prefixItems is not supported")
        if one.get("additionalProperties", True) is not True and not (
            set(other.get("properties", {})) <= set(one.get("properties", {}))
        ):
            raise RequestError("allOf: additionalProperties beside a schema with other properties is not supported")


def _both(key: str, left: Any, right: Any) -> Any:
    if key in ANNOTATIONS or left == right:
        return left
    if key in _HIGHEST:
        return max(left, right)
    if key in _LOWEST:
        return min(left, right)
    if key == "required":
        return [*left, *(name for name in right if name not in left)]
    if key == "properties":
        return {
            **left,
            **{name: {"allOf": [left[name], part]} if name in left else part for name, part in right.items()},
        }
    if key in ("items", "additionalProperties", "propertyNames"):
        return {"allOf": [left, right]}
    if key == "enum":
        return [value for value in left if value in right]
    if key == "type":
        return _common(left, right)
    raise RequestError(f"allOf: two schemas with different {key!r} cannot be merged")


def _common(left: Any, right: Any) -> list[str]:
    lists = [kinds if isinstance(kinds, list | tuple) else [kinds] for kinds in (left, right)]
    mine, own = (set(kinds) | ({"integer"} if "number" in kinds else set()) for kinds in lists)
    both = mine & own
    return sorted(both - ({"integer"} if "number" in both else set()))


def apart(left: Schema, right: Schema, resolve: Resolve) -> bool:
    """Whether no value can be valid under both; False where that is not plain to see."""
    if left is False or right is False:
        return True
    if left is True or right is True:
        return False
    if not _types(left) & _types(right):
        return True
    first, second = _values(left), _values(right)
    if first is not None and second is not None:
        return not any(_same(one, other) for one in first for other in second)
    shared = set(left.get("required", [])) & set(right.get("required", []))
    if _types(left) == _types(right) == {"object"}:
        for name in shared:
            inner = [_resolved(schema.get("properties", {}).get(name, True), resolve) for schema in (left, right)]
            if apart(inner[0], inner[1], resolve):
                return True
    return False


def _resolved(schema: Schema, resolve: Resolve) -> Schema:
    return resolve(schema["$ref"]) if isinstance(schema, Mapping) and "$ref" in schema else schema


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types its values may have, with "number" for a whole number, too; all if it does not say."""
    values = _values(schema)
    if values is not None:
        return frozenset(_type(value) for value in values)
    given = schema.get("type", sorted(_ALL))
    kinds = [given] if isinstance(given, str) else given
    return frozenset("number" if kind == "integer" else kind for kind in kinds)


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else list(schema["enum"]) if "enum" in schema else None


def _type(value: Any) -> str:
    kinds = ((bool, "boolean"), (int | float, "number"), (str, "string"), (Mapping, "object"), (type(None), "null"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def _same(left: Any, right: Any) -> bool:
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)
