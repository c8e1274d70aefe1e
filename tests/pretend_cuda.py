"""A CUDA device that is not there: tensors that say they are on `cuda:0`, with numbers in the host's memory.

All code takes a device's path, with real numbers: Triton's kernels run in its interpreter, streams and events are
empty, a CUDA graph is a tape (`tape.py`). What a device refuses is refused here: ops of the host's and the device's
tensors together (but numbers, and indices), numpy, and results whose size depends on values while a graph is captured.
"""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tape
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map, tree_map_only
from triton.runtime.interpreter import GridExecutor

CUDA = torch.device("cuda:0")
CROSSING = {"copy_", "_to_copy", "index"}
"""Ops between devices, and those that take indices of the host."""
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar guard(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""
"""torch changes the current device around many ops; a CPU build does not know how."""


class OnDevice(torch.Tensor):
    """Says that it is on the device; `held` has the numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        with torch.inference_mode(False):  # a view of what was made outside the mode must not be the mode's
            made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=CUDA
            )
        made.held = held
        return made

    def __init__(self, held: torch.Tensor) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})

    def __getitem__(self, at: Any) -> Any:
        return super().__getitem__(indices(at))

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(indices(at), value)

    def __deepcopy__(self, memo: Any) -> OnDevice:
        return OnDevice(self.held.clone())

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def indices(at: Any) -> Any:
    """torch makes tensors of lists beside all modes."""
    if isinstance(at, tuple):
        return tuple(map(indices, at))
    return torch.tensor(at, dtype=torch.int64 if not at else None) if isinstance(at, list) else at


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An op on what the tensors hold."""
    name = op.overloadpacket.__name__
    there: dict[int, OnDevice] = {}
    host: list[torch.Tensor] = []
    target: list[torch.device] = []

    def held(value: Any) -> Any:
        if isinstance(value, torch.device):
            target.append(value)
            return torch.device("cpu")
        if isinstance(value, OnDevice):
            there[id(value.held)] = value
            return value.held
        if isinstance(value, torch.Tensor):
            host.append(value)
        return value

    args, kwargs = tree_map(held, (args, kwargs))
    mixed = [value for value in host if value.dim()]
    if name == "index_put_":
        mixed = [value for value in mixed if value is args[0] or value is args[2]]
    if there and mixed and name not in CROSSING:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = None
    out = op(*args, **kwargs)
    if target:
        onto = target[0].type == "cuda"
    else:
        onto = id(args[0]) in there if name == "copy_" else bool(there)
    if not onto:
        return tree_map_only(torch.Tensor, lambda x: x.clone() if id(x) in there else x, out)
    known = set(map(id, host))
    return tree_map_only(
        torch.Tensor, lambda x: there[id(x)] if id(x) in there else OnDevice(x.clone() if id(x) in known else x), out
    )


class Pretending(TorchDispatchMode):
    """Sees what is made, and what is copied onto the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


class Generator(torch.Generator):
    """Of any device, drawing the host's numbers."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.place = torch.device(device)  # type: ignore[attr-defined]
        return made

    @property
    def device(self) -> torch.device:
        place: torch.device = self.place  # type: ignore[attr-defined]
        return place


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """A CUDA graph: a tape."""

    replay: Callable[[], None]


@contextmanager
def captured(graph: Graph, pool: Any = None) -> Iterator[None]:
    with tape.recording() as kept:
        yield
    graph.replay = kept.replay


def guard(folder: Path) -> None:
    """Once a process: the registration stays."""
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    root = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library), f"-I{root / 'include'}"]
    try:
        subprocess.run([*command, f"-L{root / 'lib'}", "-lc10"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C++ compiler")
    ctypes.CDLL(str(library))


@contextmanager
def pretended() -> Iterator[None]:
    """There is a device of compute capability 9.0. `guard` must have been called."""
    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: Stream(),
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "Event": Event,
        "graph_pool_handle": lambda: None,
        "CUDAGraph": Graph,
        "graph": captured,
    }
    launch, thread = GridExecutor.__call__, threading.Thread.run
    tensor = torch.tensor

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        def held(value: Any) -> Any:
            assert isinstance(value, OnDevice), f"{executor.fn.__name__} is given memory of the host"
            return value.held

        args, kwargs = tree_map_only(torch.Tensor, held, (args, kwargs))
        with _disable_current_modes():
            launch(executor, *args, **kwargs)

    def in_thread(self: threading.Thread) -> None:
        with Pretending():
            thread(self)

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """torch does this beside all modes."""
        return tensor(data, device="cpu", **kwargs).to(device or torch.get_default_device())

    def taken(data: Any, *, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not isinstance(data, torch.Tensor):
            return made(data, device=device, dtype=dtype)
        return data.to(device or data.device, dtype or data.dtype)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in cuda.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(GridExecutor, "__call__", launched)
        patch.setattr(threading.Thread, "run", in_thread)
        patch.setattr(torch, "tensor", made)
        patch.setattr(torch, "as_tensor", taken)
        patch.setattr(torch, "Generator", Generator)
        # `Module.to` must not put what is held here into a parameter of the host.
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        with Pretending():
            yield
