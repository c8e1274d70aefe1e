"""The GPU benchmark: random weights of the released shape, made on the device, measured part by part in one command.

Every part is kept the moment it is done, in `gpu.json` and `gpu.svg` of a folder; run again, only what is missing is
measured. A part that fails is reported and costs no other part. `tiny` runs all of it on a CPU, kernels interpreted,
to show that it works: its times mean nothing and the report says so.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.bench import gpu_parts, gpu_tune
from dgemma.bench.gpu_model import RELEASED, TINY, quantise, random_weights
from dgemma.bench.gpu_peer import peer_of
from dgemma.bench.gpu_report import chart
from dgemma.bench.gpu_roof import Ceilings, answer_ms, encode_roof, milliseconds, step_roof
from dgemma.bench.machine import Machine
from dgemma.bench.runs import Ours, weight_bytes
from dgemma.config import EngineConfig, ModelConfig
from dgemma.engine import Engine
from dgemma.errors import DgemmaError, RequestError
from dgemma.kernels import tuning
from dgemma.model import DiffusionGemma

FORMATS: Mapping[str, str | None] = {"bf16": None, "fp8": "fp8", "int4": "int4wo"}
STATE, CHART, OUTPUTS = "gpu.json", "gpu.svg", "reference.pt"
Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """`steps`: of a canvas, the first of them first. `seconds`: no part begins later; what is left is named."""

    formats: tuple[str, ...] = tuple(FORMATS)
    steps: tuple[int, ...] = (16, 12, 20, 24)
    canvases: int = 4
    prompt_tokens: int = 1024
    tokens: int = 64
    """Of an autoregressive answer."""
    repeats: int = 5
    seed: int = 0
    peer: bool = True
    tiny: bool = False

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise RequestError(f"formats must be some of {', '.join(FORMATS)}; got {name}")
        for name in ("canvases", "prompt_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.tokens < 2 or not self.steps or min(self.steps) < 2:
            raise RequestError("an autoregressive answer has at least 2 tokens, a canvas at least 2 steps")

    @property
    def config(self) -> ModelConfig:
        return TINY if self.tiny else RELEASED

    @property
    def width(self) -> int:
        return 16 if self.tiny else self.config.canvas_length


def tiny_settings(**changes: Any) -> GpuSettings:
    values: dict[str, Any] = {"steps": (2,), "canvases": 2, "prompt_tokens": 20, "tokens": 2, "repeats": 2}
    return GpuSettings(**{**values, **changes, "tiny": True})


@dataclass
class GpuRun:
    """The parts in order, and what is known so far."""

    folder: Path
    settings: GpuSettings
    seconds: float = 450.0
    say: Say = lambda text: None
    state: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Measure what is missing; everything known, as JSON has it."""
        self._device = torch.device("cpu" if self.settings.tiny else "cuda")
        if not self.settings.tiny and not torch.cuda.is_available():
            raise RequestError("this benchmark needs a CUDA device; --tiny runs it on a CPU to show that it works")
        self._begun = time.monotonic()
        self._row = triton_row()
        generator = torch.Generator().manual_seed(self.settings.seed)
        vocab, config = self.settings.config.vocab_size, self.settings
        self._prompt = torch.randint(3, vocab, (config.prompt_tokens,), generator=generator).tolist()
        self._canvas = torch.randint(0, vocab, (config.width,), generator=generator).tolist()
        self._open()
        self._part("ceilings", lambda: gpu_parts.measure_ceilings(self._device, config.tiny)[1])
        for name in config.formats:
            self._format(name)
        return self.state

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "device": Machine.of(self._device, torch.bfloat16).device,
        }
        path = self.folder / STATE
        self.state = json.loads(path.read_text()) if path.is_file() else {}
        if self.state and any(self.state.get(key) != value for key, value in about.items()):
            raise RequestError(f"{path} holds a measurement of other settings or another device; name another folder")
        self.state = {
            **about, "machine": asdict(Machine.of(self._device, torch.bfloat16)), "triton": sorted(self._row),
            "parts": self.state.get("parts", {}), "failed": {}, "left": [],
        }  # fmt: skip

    # -- parts ------------------------------------------------------------------------------

    def _part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """One part: kept when it is done, named when it fails or when time is up."""
        if name in self.state["parts"]:
            return
        if time.monotonic() - self._begun > self.seconds:
            self.state["left"].append(name)
            return self._save()
        self.say(name)
        begun = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # whatever goes wrong in one part, the others are worth having
            self.state["failed"][name] = _reason(error)
        else:
            self.state["parts"][name] = {**found, "took": time.monotonic() - begun}
        self._save()

    def _save(self) -> None:
        for path, text in (
            (self.folder / STATE, json.dumps(self.state, indent=1) + "\n"),
            (self.folder / CHART, chart(self.state)),
        ):
            new = path.with_suffix(".new")
            new.write_text(text, encoding="utf-8")
            new.replace(path)  # cut at any moment, there is a whole file

    def _format(self, name: str) -> None:
        """All parts of one format on one set of weights, which are gone afterwards."""
        parts = list(self._parts(name))
        if all(part in self.state["parts"] for part, _ in parts):
            return
        holder = _Holder(partial(self._build, name))
        for part, measure in parts:
            self._part(part, partial(_with_model, measure, holder))
        holder.forget()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, name: str) -> DiffusionGemma:
        self.say(f"{name}: random weights")
        model = random_weights(self.settings.config, self._device, torch.bfloat16, self.settings.seed)
        if name == "bf16" or not (self.folder / OUTPUTS).is_file():
            self._reference(model)
        kind = FORMATS[name]
        if kind is not None:
            quantise(model, kind, self.say)
        return model

    def _reference(self, model: DiffusionGemma) -> None:
        """What the reference kernels say of the plain weights: every path is compared with it."""
        self.say("reference kernels, bf16")
        with kernels.use({}):
            torch.save(gpu_parts.observe(model, self._prompt, self._canvas, None), self.folder / OUTPUTS)

    def _parts(self, name: str) -> Iterator[tuple[str, Callable[[DiffusionGemma], dict[str, Any]]]]:
        first = self.settings.steps[0]
        yield f"{name}.weights", self._weights
        yield f"{name}.blocks", partial(self._blocks, name)
        yield f"{name}.error", self._error
        yield f"{name}.work", self._work
        yield f"{name}.steps{first}", partial(self._answers, name, first)
        if not self.settings.tiny:  # a CPU records nothing
            yield f"{name}.unrecorded{first}", partial(self._answers, name, first, graph_rows=0)
        yield f"{name}.parts", partial(self._watched, name)
        yield f"{name}.ar", partial(self._tokens, name)
        for steps in self.settings.steps[1:]:
            yield f"{name}.steps{steps}", partial(self._answers, name, steps)
        if name == "bf16" and self.settings.peer:
            yield f"{name}.transformers", partial(self._peer, first)

    def _weights(self, model: DiffusionGemma) -> dict[str, Any]:
        return {"gigabytes": weight_bytes(model) / 1e9}

    def _blocks(self, name: str, model: DiffusionGemma) -> dict[str, Any]:
        """Ways to cut the kernels' work on this device; the best of them serve from here on, also in other programs."""
        if "experts" not in self._row:
            raise DgemmaError("triton is not installed")
        s, found, kept = self.settings, dict[str, Any](), list[tuple[str, tuning.Key, Any]]()
        for trial in gpu_tune.trials(model, self._row, s.width, s.prompt_tokens, name != "bf16"):
            self.say(f"{name}.blocks: {trial.about}")
            found[trial.about], best = gpu_tune.tune(trial, self._device, s.tiny)
            kept += best
        # The times of an interpreter are no reason to change anything.
        path = self.folder / "blocks.json" if s.tiny else tuning.user_file()
        tuning.keep(path, self.state["device"], kept)
        return {**found, "kept in": str(path)}

    def _timed(self) -> dict[str, Callable[..., Any]]:
        """The row that is timed: interpreted kernels would take minutes, and their times say nothing."""
        return {} if self.settings.tiny else self._row

    def _error(self, model: DiffusionGemma) -> dict[str, Any]:
        want: dict[str, Tensor] = torch.load(self.folder / OUTPUTS, weights_only=True)
        with kernels.use(self._row):
            return dict(gpu_parts.compare(gpu_parts.observe(model, self._prompt, self._canvas, want["soft"]), want))

    def _work(self, model: DiffusionGemma) -> dict[str, Any]:
        s = self.settings
        config = gpu_parts.fixed_config(s.steps[0], s.canvases, s.width, s.seed)
        return gpu_parts.check_work(model, self._row, self._prompt, config, s.canvases)

    def _answers(self, name: str, steps: int, model: DiffusionGemma, **engine: Any) -> dict[str, Any]:
        s = self.settings
        config = gpu_parts.fixed_config(steps, s.canvases, s.width, s.seed)
        with kernels.use(self._timed()):
            ours = Engine(model, replace(EngineConfig(prefix_cache_tokens=0), **engine))
            found = gpu_parts.time_answers(Ours(ours), self._prompt, config, s.canvases, s.repeats)
        found["recorded steps"] = ours.graphs.replayed if ours.graphs else 0
        ceilings = self._ceilings()
        least = answer_ms(s.config, FORMATS[name], ceilings, s.prompt_tokens, s.canvases, s.width, steps)
        return {**found, **_share(least, 1000 * found["seconds"]["median"], s.canvases * s.width)}

    def _watched(self, name: str, model: DiffusionGemma) -> dict[str, Any]:
        s = self.settings
        config = gpu_parts.fixed_config(s.steps[0], 2 if s.tiny else s.canvases, s.width, s.seed)
        with kernels.use(self._timed()):
            found = gpu_parts.watch_parts(model, self._prompt, config, 1 if s.tiny else 3)
        roof = step_roof(s.config, FORMATS[name], self._ceilings(), s.prompt_tokens, s.width)
        return {**found, "roofline of a step": {part: asdict(value) for part, value in roof.items()}}

    def _tokens(self, name: str, model: DiffusionGemma) -> dict[str, Any]:
        s = self.settings
        config = gpu_parts.fixed_config(s.steps[0], 1, s.width, s.seed)
        config = config.with_(mode="ar", temperature=0.0, max_new_tokens=s.tokens)
        with kernels.use(self._timed()):
            found = gpu_parts.time_tokens(model, self._prompt, config, s.repeats)
        one = milliseconds(encode_roof(s.config, FORMATS[name], self._ceilings(), s.prompt_tokens, 1, head=True))
        return {**found, **_share(one, 1000 / found["tokens_per_second"]["median"], 1)}

    def _peer(self, steps: int, model: DiffusionGemma) -> dict[str, Any]:
        """transformers on the same tensors; an own answer of two steps before is no part of the time."""
        s = self.settings
        peer = peer_of(model)
        config = gpu_parts.fixed_config(steps, s.canvases, s.width, s.seed)
        found = gpu_parts.time_answers(peer, self._prompt, config, s.canvases, s.repeats)
        return {**found, "version": peer.version, "settings": peer.settings}

    def _ceilings(self) -> Ceilings:
        found = self.state["parts"].get("ceilings")
        if found is None:
            raise DgemmaError("the ceilings are not known, so no share of them is")
        rates = {kind: found[kind]["flops_per_second"] for kind in ("bf16", "fp8") if "missing" not in found[kind]}
        return Ceilings(bandwidth=found["copy"]["bytes_per_second"], rates=rates)


class _Holder:
    """A model that is built when the first part asks for it; a failure is every part's, and not tried again."""

    def __init__(self, build: Callable[[], DiffusionGemma]) -> None:
        self._build: Callable[[], DiffusionGemma] | None = build
        self._model: DiffusionGemma | None = None
        self._error: Exception | None = None

    def get(self) -> DiffusionGemma:
        if self._build is not None:
            build, self._build = self._build, None
            try:
                self._model = build()
            except Exception as error:
                self._error = error
        if self._model is None:
            raise DgemmaError(f"no weights: {self._error}")
        return self._model

    def forget(self) -> None:
        self._model = None


def _with_model(measure: Callable[[DiffusionGemma], dict[str, Any]], holder: _Holder) -> dict[str, Any]:
    return measure(holder.get())


def triton_row() -> dict[str, Callable[..., Any]]:
    """The ops of a CUDA device, wherever they are to run; empty without triton."""
    return dict(kernels.row_of("cuda"))


def _share(least: float, took: float, tokens: int) -> dict[str, Any]:
    return {
        "roofline_ms": least,
        "roofline_tokens_per_second": 1000 * tokens / least,
        "share of roofline": least / took,
    }


def _reason(error: Exception) -> str:
    """What and where, in a line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"
