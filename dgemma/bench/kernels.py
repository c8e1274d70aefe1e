"""Milliseconds per part of a denoising step and of an encode pass, each beside the floor of that part.

The watch costs time itself, which the same step without it shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dgemma.api import LLM
from dgemma.bench.decode import prompts_of
from dgemma.bench.floor import Floor, Routing, encode_floor, step_floor
from dgemma.bench.machine import Machine
from dgemma.bench.parts import ALL_PARTS, Stopwatch, observe_routing, watching
from dgemma.bench.rates import Rates
from dgemma.bench.runs import Ours
from dgemma.config import GenerationConfig
from dgemma.engine import Engine, Request, validate
from dgemma.errors import RequestError

FORMAT, VERSION = "dgemma-bench-kernels", 1


@dataclass(frozen=True, kw_only=True)
class KernelsSettings:
    """What to measure: steps of one canvas behind a prompt of so many tokens."""

    steps: int = 8
    repeats: int = 3
    prompt_tokens: int = 128
    canvas: int | None = None

    def __post_init__(self) -> None:
        for name, low in (("steps", 2), ("repeats", 1), ("prompt_tokens", 1)):
            if getattr(self, name) < low:
                raise RequestError(f"{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One kind of pass: median milliseconds by part, on the watch, and of the whole, without it."""

    name: str
    ms: float
    parts: dict[str, float]
    floor: Floor

    @property
    def watched_ms(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class KernelsReport:
    """Everything measured."""

    model: str
    machine: Machine
    settings: KernelsSettings
    canvas: int
    passes: tuple[Pass, ...]

    def json(self) -> dict[str, Any]:
        passes = [{**asdict(one), "watched_ms": one.watched_ms, "floor": one.floor.json()} for one in self.passes]
        return {"format": FORMAT, "version": VERSION, **asdict(self), "passes": passes}


def run_kernels(llm: LLM, settings: KernelsSettings, say: Callable[[str], object] = lambda text: None) -> KernelsReport:
    """Measure our engine alone."""
    canvas = settings.canvas or llm.config.canvas_length
    (prompt,) = prompts_of(llm, 1, settings.prompt_tokens)
    config = llm.generation.with_(
        max_new_tokens=canvas, canvas_length=canvas, max_denoising_steps=settings.steps, stability_threshold=None,
        confidence_threshold=None, stop_tokens=(), mode="diffusion",
    )  # fmt: skip
    request = Request(prompt=tuple(prompt), config=config, reuse=False)
    validate(request, llm.config)
    say("the floor: rates of torch's primitives")
    rates = Rates(llm.device, llm.dtype)
    routing = observe_routing(lambda: Ours(llm.engine).run(prompt, config.with_(max_denoising_steps=2)), canvas)

    def floors() -> tuple[Floor, Floor]:
        step = step_floor(llm.config, rates, len(prompt), [canvas], routing)
        return step, encode_floor(llm.config, rates, 0, len(prompt), Routing())

    floors()
    plain, steps, encodes = _measure(llm.engine, request, settings.repeats, say)
    say("the floor again: the better of both counts")
    rates.again()
    step, encode = floors()
    return KernelsReport(
        model=llm.name,
        machine=Machine.of(llm.device, llm.dtype),
        settings=settings,
        canvas=canvas,
        passes=(
            Pass(name="denoising step", ms=plain[0], parts=_medians(steps), floor=step),
            Pass(name="encoding the prompt", ms=plain[1], parts=_medians(encodes), floor=encode),
        ),
    )


def _measure(
    engine: Engine, request: Request, repeats: int, say: Callable[[str], object]
) -> tuple[tuple[float, float], list[Mapping[str, float]], list[Mapping[str, float]]]:
    """Milliseconds of step and prompt without the watch; laps of steps and of prompts with it, taking turns."""
    ours, watch = Ours(engine), Stopwatch()
    steps: list[Mapping[str, float]] = []
    encodes: list[Mapping[str, float]] = []
    step_seconds: list[float] = []
    prompt_seconds: list[float] = []
    for count in range(repeats):
        say(f"round {count + 1} of {repeats}")
        run = ours.run(request.prompt, _seeded(request.config, count))
        step_seconds += run.step_seconds
        prompt_seconds.append(run.prompt_seconds)
        with watching(engine, watch):
            laps = _laps(engine, watch, replace(request, config=_seeded(request.config, count)))
        encodes.append(_of(laps[0], "encode"))
        # The first step has no self-conditioning.
        steps += [_of(lap, "", "denoise") for lap in laps[1:]]
    return (1000 * statistics.median(step_seconds), 1000 * statistics.median(prompt_seconds)), steps, encodes


def _laps(engine: Engine, watch: Stopwatch, request: Request) -> list[dict[tuple[str, str], float]]:
    """One for each denoising step of a canvas; the first holds the prompt's passes as well."""
    laps: list[dict[tuple[str, str], float]] = []
    engine.add(request)
    while engine.has_work:
        before = engine.counters.denoise_passes
        engine.tick()
        if engine.counters.denoise_passes > before:
            laps.append(watch.lap())
    return laps


def _of(lap: Mapping[tuple[str, str], float], *passes: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for (name, part), seconds in lap.items():
        if name in passes:
            found[part] = found.get(part, 0.0) + seconds
    return found


def _seeded(config: GenerationConfig, count: int) -> GenerationConfig:
    return config.with_(seed=config.seed + count)


def _medians(laps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: 1000 * statistics.median(lap.get(part, 0.0) for lap in laps) for part in ALL_PARTS}
