"""A CUDA graph without a device: what a recording does is kept op by op, and a replay runs those ops again on the very
same memory, with the very same numbers. Python is not asked again, so a number that should have changed does not.

What a CUDA graph cannot hold fails while it is recorded: asking for a value (`.item()`, a tensor as a condition),
results whose size depends on values, and tensors made of numbers of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

try:
    from triton.runtime.interpreter import GridExecutor
except ImportError:
    GridExecutor = None

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique_dim", "_unique2"}
COPIES = {"copy_", "_to_copy", "to"}


def tensors(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """Ops as they are run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Callable[..., Any], Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        places = {place.type for place in (*args, *kwargs.values()) if isinstance(place, torch.device)}
        places |= {tensor.device.type for tensor in tensors(args, kwargs) if tensor.dim() or name in COPIES}
        if name in WAITS or len(places) > 1 or (name in ("index", "index_put", "index_put_") and bools(args)):
            raise AssertionError(f"{name} waits for the device")
        if name == "lift_fresh" and tensors(args)[0].dim():
            raise AssertionError("a tensor of the host's numbers cannot be part of a recording")
        out = func(*args, **kwargs)
        made = tensors(out)
        own = {tensor.untyped_storage().data_ptr() for tensor in tensors(args, kwargs)}
        writes = any(arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments)
        fresh = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in own]
        # A view needs no replay: its base is written, if at all, by another op.
        if writes or fresh:
            empty = name.startswith(("empty", "new_empty"))
            self.ops.append((func, args, kwargs, [] if writes or empty else made))
        return out

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, made in self.ops:
                out = func(*args, **kwargs)
                for old, new in zip(made, tensors(out) if made else [], strict=True):
                    old.copy_(new)


def bools(args: Any) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors(args[1]))


@contextmanager
def recording() -> Iterator[Tape]:
    """All ops and launches of this thread."""
    kept = Tape()
    launch = None if GridExecutor is None else GridExecutor.__call__

    def taped(executor: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            assert launch is not None
            launch(executor, *args, **kwargs)
        kept.ops.append((lambda *a, **k: launch(executor, *a, **k), args, kwargs, []))

    if GridExecutor is not None:
        GridExecutor.__call__ = taped
    try:
        with kept:
            yield kept
    finally:
        if GridExecutor is not None:
            GridExecutor.__call__ = launch


def tape(run: Callable[[], None]) -> Callable[[], None]:
    """A `graphs.Record`."""
    with recording() as kept:
        run()
    return kept.replay
