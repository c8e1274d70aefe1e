"""A table from op name to function, one row per backend; what a backend lacks falls back to `reference`.

The dispatch rule: the device type of the first tensor argument picks the row. Inside `use(row)` that row serves every
device: so the kernels of a GPU can be tested on a CPU, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from torch import Tensor

from dgemma.kernels import cpu, cpu_training, native, reference, shaped
from dgemma.kernels.cpu_vocab import PackedHead
from dgemma.kernels.reference import DRAW_BLOCK, VocabStats, rope_frequencies, rope_tables
from dgemma.kernels.shaped import highest

_CPU: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "rms_norm": cpu_training.rms_norm,
        "linear": cpu.linear,
        "attention": cpu.attention,
        "canvas_attention": cpu.canvas_attention,
        "stored_attention": cpu.stored_attention,
        "gelu": cpu.gelu,
        "route": cpu.route,
        "experts": cpu.experts,
        "vocab": cpu.vocab,
    }
)
Row = Mapping[str, Callable[..., Any]]
TABLE: Mapping[str, Row] = MappingProxyType({"cpu": _CPU})
_NOTHING: Row = MappingProxyType({})
_used: ContextVar[Row | None] = ContextVar("row", default=None)


@cache
def _triton() -> Row:
    """The GPU's row; empty where triton is not installed."""
    if find_spec("triton") is None:
        return _NOTHING
    row: Row = import_module("dgemma.kernels.triton_table").ROW
    return row


def row_of(device_type: str) -> Row:
    """What a device type has of its own; everything else is `reference`."""
    used = _used.get()
    if used is not None:
        return used
    return _triton() if device_type == "cuda" else TABLE.get(device_type, _NOTHING)


@contextmanager
def use(row: Row) -> Iterator[None]:
    """For tests: `row` serves every device inside, in this thread or task."""
    token = _used.set(row)
    try:
        yield
    finally:
        _used.reset(token)


def find(op: str, device_type: str) -> Callable[..., Any]:
    """The function that runs `op` on a device type."""
    row = row_of(device_type)
    return row[op] if op in row else getattr(reference, op)


def _dispatch(op: str) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return find(op, x.device.type)(x, *args, **kwargs)

    call.__name__, call.__doc__ = op, getattr(reference, op).__doc__
    return call


rms_norm = _dispatch("rms_norm")
linear = _dispatch("linear")
rope = _dispatch("rope")
heads = _dispatch("heads")
attention = _dispatch("attention")
canvas_attention = _dispatch("canvas_attention")
stored_attention = _dispatch("stored_attention")
gelu = _dispatch("gelu")
geglu = _dispatch("geglu")
middle = _dispatch("middle")
close = _dispatch("close")
route = _dispatch("route")
choose = _dispatch("choose")
experts = _dispatch("experts")
softcap = _dispatch("softcap")
_plain_vocab = _dispatch("vocab")


def vocab(
    hidden: Tensor,
    embed: Tensor | PackedHead,
    cap: float,
    temperature: Tensor,
    uniforms: Tensor,
    draw_temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    top_p: Tensor | None = None,
) -> VocabStats:
    rows = hidden, embed, cap, temperature, uniforms, draw_temperature, top_k
    # Backends have a faster op for plain rows only: `shaped` serves all of them, with their own product.
    if bias is None and top_p is None:
        return _plain_vocab(*rows)
    return shaped.vocab(*rows, find("linear", hidden.device.type), bias, top_p)


vocab.__doc__ = reference.vocab.__doc__

__all__ = [
    "DRAW_BLOCK",
    "PackedHead",
    "VocabStats",
    "attention",
    "canvas_attention",
    "choose",
    "close",
    "experts",
    "find",
    "geglu",
    "gelu",
    "heads",
    "highest",
    "linear",
    "middle",
    "native",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "route",
    "row_of",
    "softcap",
    "stored_attention",
    "use",
    "vocab",
]
