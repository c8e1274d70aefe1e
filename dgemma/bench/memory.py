"""Memory of a side, seen from outside: a child imports, loads and runs, the parent reads what the system says of it.

Ours and transformers have a process each. Knows `/proc`, so it works on Linux only.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgemma.api import LLM
from dgemma.bench.child import TUNED, Child
from dgemma.bench.decode import prompts_of
from dgemma.bench.machine import Machine
from dgemma.checkpoint.files import find_folder
from dgemma.config import GenerationConfig
from dgemma.engine import Request, validate
from dgemma.errors import DgemmaError, RequestError

FORMAT, VERSION = "dgemma-bench-memory", 1
_EVERY_S = 0.01
_ALLOWED_FACTOR, _ALLOWED_MB = 1.15, 64.0


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """`canvases` are written one after another, of `steps` steps each, behind a prompt of `prompt_tokens`."""

    canvases: int = 4
    steps: int = 2
    prompt_tokens: int = 128
    canvas: int | None = None
    peer: bool = True
    peer_model: str | None = None
    tuned: bool = False

    def __post_init__(self) -> None:
        for name in ("canvases", "steps", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One side's resident memory in MB, one stage after another.

    `imported`: its libraries, before weights. `loaded`: weights too, as far as loading touches them. `warm`: after
    the prompt and a canvas of one position, so that all weights have been used and no canvas has been held. `peak`
    is the highest of the run of whole canvases, `ended` what stays. `weights` is what the side keeps as weights,
    `file` the weight files.
    """

    side: str
    imported: float
    loaded: float
    load_peak: float
    warm: float
    peak: float
    ended: float
    weights: float
    file: float
    threads: int
    settings: dict[str, str]

    @property
    def extra(self) -> float:
        """What a canvas takes beyond the weights: the peak above the warm process."""
        return max(0.0, self.peak - self.warm)

    @property
    def allowed(self) -> float:
        """What a side that keeps its weights as they are stored may take: 1.15 x file + 64 MB + its imports."""
        return _ALLOWED_FACTOR * self.file + _ALLOWED_MB + self.imported


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Everything measured."""

    model: str
    machine: Machine
    settings: MemorySettings
    canvas: int
    vocab: int
    sides: tuple[Footprint, ...]

    def json(self) -> dict[str, Any]:
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for side, facts in zip(self.sides, data["sides"], strict=True):
            facts |= {"extra": side.extra, "allowed": side.allowed, "within_allowed": side.peak <= side.allowed}
        return data


def run_memory(llm: LLM, settings: MemorySettings, say: Callable[[str], object] = lambda text: None) -> MemoryReport:
    """Measure. `llm` tells what to load; the measured processes load it themselves."""
    if not Path("/proc/self/status").exists():
        raise DgemmaError("memory is read from /proc, which this system lacks")
    canvas = settings.canvas or llm.config.canvas_length
    machine = Machine.of(llm.device, llm.dtype)
    (prompt,) = prompts_of(llm, 1, settings.prompt_tokens)
    config = llm.generation.with_(
        max_new_tokens=canvas * settings.canvases, canvas_length=canvas, max_denoising_steps=settings.steps,
        stability_threshold=None, confidence_threshold=None, stop_tokens=(), mode="diffusion",
    )  # fmt: skip
    validate(Request(prompt=tuple(prompt), config=config, reuse=False), llm.config)
    plan: list[tuple[str, str, Path, bool]] = [("dgemma", "dgemma", llm.folder, False)]
    if settings.peer:
        folder = find_folder(settings.peer_model)[0] if settings.peer_model else llm.folder
        plan.append(("transformers", "transformers", folder, False))
        if settings.tuned:
            plan.append(("transformers (medium, tuned)", "transformers", folder, True))
    sides = []
    for name, kind, folder, tuned in plan:
        say(f"{name} in a process of its own")
        sides.append(_footprint(name, kind, folder, tuned, machine, prompt, config))
    return MemoryReport(
        model=llm.name,
        machine=machine,
        settings=settings,
        canvas=canvas,
        vocab=llm.config.vocab_size,
        sides=tuple(sides),
    )


def _footprint(
    name: str,
    kind: str,
    folder: Path,
    tuned: bool,
    machine: Machine,
    prompt: Sequence[int],
    config: GenerationConfig,
) -> Footprint:
    narrow = config.with_(max_new_tokens=1, canvas_length=1)
    with Child(TUNED if tuned else None) as child:
        child.call("start", side=kind, threads=machine.threads)
        imported = _rss(child.pid)
        with Watch(child.pid) as load:
            facts = child.call(
                "load", folder=str(folder), dtype=machine.dtype, width=config.canvas_length or 1, medium=tuned
            )
        loaded = _rss(child.pid)
        child.call("run", prompt=list(prompt), config=asdict(narrow))
        warm = _rss(child.pid)
        with Watch(child.pid) as run:
            child.call("run", prompt=list(prompt), config=asdict(config))
        return Footprint(
            side=name,
            imported=imported,
            loaded=loaded,
            load_peak=load.peak,
            warm=warm,
            peak=run.peak,
            ended=_rss(child.pid),
            weights=facts["nbytes"] / 1e6,
            file=sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
            threads=machine.threads,
            settings=facts["settings"],
        )


class Watch:
    """The peak of another process's resident memory while this is entered, in MB.

    The system's own high-water mark where it can be reset, so that nothing is missed; samples every 10 ms elsewhere.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.peak = 0.0

    def __enter__(self) -> Watch:
        self._marked = False
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._pid}/clear_refs").write_text("5")
            self._marked = True
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._marked:
            self.peak = max(self.peak, _status(self._pid, "VmHWM"))

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, _rss(self._pid))
            if self._over.wait(_EVERY_S):
                return


def _rss(pid: int) -> float:
    return _status(pid, "VmRSS")


def _status(pid: int, name: str) -> float:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 / 1e6 if found else 0.0
