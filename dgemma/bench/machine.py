"""What a measurement depends on and cannot choose: the machine, torch's settings, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dgemma import __version__

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts that belong beside every number. `load` is the load average of the last minute: others at work."""

    cpu: str
    cores: int
    usable_cores: int
    threads: int
    device: str
    dtype: str
    memory_mb: float
    load: float
    allocator: dict[str, str]
    python_version: str
    torch_version: str
    dgemma_version: str
    system: str

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype) -> Machine:
        affinity = getattr(os, "sched_getaffinity", None)
        return Machine(
            cpu=_cpu_model(),
            cores=os.cpu_count() or 1,
            usable_cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            dtype=str(dtype).removeprefix("torch."),
            memory_mb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6,
            load=os.getloadavg()[0],
            allocator={name: os.environ[name] for name in sorted(os.environ) if name.startswith("MALLOC_")},
            python_version=platform.python_version(),
            torch_version=torch.__version__,
            dgemma_version=__version__,
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
        )


def allocator() -> str:
    """glibc's allocator as the environment of this process sets it."""
    chosen = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("MALLOC_")]
    return " ".join(chosen) or "glibc default"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def synchronise(device: torch.device) -> None:
    """Wait for what the device still does; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Memory:
    """Resident memory of the whole process in MB: the peak, and how far that is above the start.

    `extra_mb` is None where the system cannot reset the peak; `peak_mb` is then that of the process's whole life.
    """

    peak_mb: float
    extra_mb: float | None


class MemoryMeter:
    """Resident memory between construction and `stop`."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier run freed must not hide what this one takes
        self._before: float | None = None
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # Linux: the peak starts again from now
            self._before = _status_mb("VmRSS")

    def stop(self) -> Memory:
        peak = _status_mb("VmHWM")
        if peak is None or self._before is None:
            unit = 1 if sys.platform == "darwin" else 1024
            return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, None)
        return Memory(peak, max(0.0, peak - self._before))


def _status_mb(name: str) -> float | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 / 1e6 if found else None
    return None
