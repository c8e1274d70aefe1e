"""Block sizes that were measured on the device at hand, kept in the user's cache; without them the shipped ones serve.

An entry belongs to a device's name, a version of Triton, the text of a kernel's file, and a key: the shapes of the
model and the type of its numbers, never how many rows a call has. So no result depends on who shares a batch; but a
machine with a table may differ in last bits from one without. Knows no kernel, needs no triton.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

Blocks = TypeVar("Blocks")
"""A frozen dataclass of positive whole numbers."""
Key = tuple[int | str, ...]
_KIND = "dgemma block sizes 1"
_tried: ContextVar[tuple[str, Any, set[Key]] | None] = ContextVar("tried", default=None)


def blocks(kernel: str, key: Key, default: Blocks) -> Blocks:
    """What was found for the current device, or `default`. `kernel` is a file's name: `triton_{kernel}.py`."""
    tried = _tried.get()
    if tried is not None and tried[0] == kernel:
        tried[2].add(key)
        chosen: Blocks = tried[1]
        return chosen
    if not torch.cuda.is_initialized():
        return default
    return _found(device_name(torch.cuda.current_device()), kernel, key, default)


@contextmanager
def trying(kernel: str, candidate: Any) -> Iterator[set[Key]]:
    """Inside, every call of the kernel takes `candidate`. Yields the keys that were asked for meanwhile."""
    asked: set[Key] = set()
    token = _tried.set((kernel, candidate, asked))
    try:
        yield asked
    finally:
        _tried.reset(token)


def user_file() -> Path:
    """Where the table lies: beside what else is built once a machine."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dgemma" / "blocks.json"


@cache
def device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def keep(path: Path, device: str, found: Sequence[tuple[str, Key, Any]]) -> None:
    """Add kernels, keys and their blocks to a table, or begin one; nobody ever reads half of it. Raises OSError."""
    table = {**_read(path), **{_entry(device, kernel, key): asdict(best) for kernel, key, best in found}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
        json.dump({"kind": _KIND, "blocks": table}, file, indent=1)
    os.replace(file.name, path)
    _table.cache_clear()
    _found.cache_clear()


@cache
def _found(device: str, kernel: str, key: Key, default: Any) -> Any:
    entry = _table().get(_entry(device, kernel, key))
    if entry is None:
        return default
    known = {field.name for field in fields(default)}
    good = isinstance(entry, dict) and set(entry) == known and all(type(n) is int and n > 0 for n in entry.values())
    if good:
        return replace(default, **entry)
    warnings.warn(f"{user_file()}: {entry!r} are no block sizes of {kernel}; the shipped ones serve", stacklevel=4)
    return default


@cache
def _table() -> Mapping[str, Any]:
    try:
        return _read(user_file())
    except RuntimeError:  # nobody's home is known
        return {}


def _read(path: Path) -> dict[str, Any]:
    """The entries of a file; none, and a warning, of one that is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] == _KIND:
            return dict(content["blocks"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):  # unreadable, no JSON, or JSON of somebody else
        pass
    warnings.warn(f"{path} is no table of block sizes and is ignored", stacklevel=5)
    return {}


@cache
def _entry(device: str, kernel: str, key: Key) -> str:
    text = Path(__file__).with_name(f"triton_{kernel}.py").read_bytes()
    about = (
        device,
        f"triton {import_module('triton').__version__}",
        f"{kernel} {hashlib.sha256(text).hexdigest()[:8]}",
    )
    return " | ".join((*about, ", ".join(map(str, key))))
