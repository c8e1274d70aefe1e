"""A table from op name to function, one row per backend; what a backend lacks falls back to `reference`.

The dispatch rule: the device type of the first tensor argument picks the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        "gelu": cpu.gelu,
        "route": cpu.route,
        "experts": cpu.experts,
        "vocab": cpu.vocab,
    }
)
TABLE: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType({"cpu": _CPU})


def find(op: str, device_type: str) -> Callable[..., Any]:
    """The function that runs `op` on a device type."""
    backend = TABLE.get(device_type, MappingProxyType({}))
    return backend[op] if op in backend else getattr(reference, op)


def _dispatch(op: str) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return find(op, x.device.type)(x, *args, **kwargs)

    call.__name__, call.__doc__ = op, getattr(reference, op).__doc__
    return call


rms_norm = _dispatch("rms_norm")
linear = _dispatch("linear")
rope = _dispatch("rope")
attention = _dispatch("attention")
gelu = _dispatch("gelu")
route = _dispatch("route")
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
    "experts",
    "find",
    "gelu",
    "highest",
    "linear",
    "native",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "route",
    "softcap",
    "vocab",
]
