"""Weight formats: how a matrix is stored in fewer bits, and multiplied without being unpacked as a whole.

Knows matrices and which of a model's weights are meant; no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dgemma.errors import ConfigError
from dgemma.quant.fp8 import Fp8Dynamic
from dgemma.quant.int4wo import Int4WeightOnly
from dgemma.quant.int8dyn import Int8Dynamic
from dgemma.quant.int8wo import Int8WeightOnly
from dgemma.quant.protocol import Part, WeightFormat

FORMATS: Mapping[str, type[WeightFormat]] = MappingProxyType(
    {kind.name: kind for kind in (Int8WeightOnly, Int4WeightOnly, Int8Dynamic, Fp8Dynamic)}
)


def make_format(name: str, group: int | None = None, *, head: bool = False) -> WeightFormat:
    """The format of that name. `group` None takes its default; a `ConfigError` says what is allowed."""
    if name not in FORMATS:
        raise ConfigError(f"unknown weight format {name!r}; known: {', '.join(FORMATS)}")
    kind = FORMATS[name]
    if head and kind is not Int8Dynamic:
        raise ConfigError(f"the head can be of the format {Int8Dynamic.name}, not of {name}")
    if group is None:
        return Int8Dynamic(head=True) if head else kind()
    if group not in kind.groups or isinstance(group, bool):
        allowed = ", ".join(map(str, kind.groups))
        raise ConfigError(
            f"{name} takes a group of {allowed}; got {group!r}"
            if kind.groups
            else f"{name} has one scale a row and takes no group, got {group!r}"
        )
    return kind(group=group)


__all__ = ["FORMATS", "Part", "WeightFormat", "make_format"]
