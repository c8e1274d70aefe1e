"""How the cost of our engine grows: with the prompt, the number of canvases, the batch, and the vocabulary.

All on fixed steps without early stop. The sweep over vocabularies runs random models of the checkpoint's shape.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dgemma.api import LLM
from dgemma.bench.decode import prompts_of
from dgemma.bench.machine import Machine, synchronise
from dgemma.bench.models import random_model
from dgemma.config import GenerationConfig
from dgemma.engine import Engine, Request, validate
from dgemma.engine.request import max_canvas
from dgemma.errors import RequestError

FORMAT, VERSION = "dgemma-bench-scaling", 1
SWEEPS = ("prompt", "again", "canvases", "batch", "narrow", "answer", "vocabulary")


@dataclass(frozen=True, kw_only=True)
class ScalingSettings:
    """What to vary, and over which values; what a sweep does not vary is `prompt_tokens` and one canvas.

    `again` takes the prompts of `prompt` again, after they were encoded; `batch` takes whole canvases, `narrow` ones
    of `narrow_width`; `answer` asks for so many tokens, and the engine takes a narrow canvas for a short answer.
    """

    sweeps: tuple[str, ...] = SWEEPS
    prompts: tuple[int, ...] = (16, 64, 256, 1024)
    canvases: tuple[int, ...] = (1, 2, 4)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    answers: tuple[int, ...] = (16, 64, 256)
    vocabularies: tuple[int, ...] = (2048, 8192, 32_768, 131_072)
    narrow_width: int = 32
    prompt_tokens: int = 128
    canvas: int | None = None
    steps: int = 6
    repeats: int = 3

    def __post_init__(self) -> None:
        for name in ("narrow_width", "prompt_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.steps < 2:
            raise RequestError(f"steps must be at least 2, got {self.steps}")
        if not self.sweeps or any(sweep not in SWEEPS for sweep in self.sweeps):
            raise RequestError(f"sweeps must be some of {', '.join(SWEEPS)}; got {', '.join(self.sweeps) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of a sweep: medians. `relative` compares tokens per second with those of the sweep's first value.

    `ms_per_step` is of a whole pass, every canvas of the batch in it, `ms_prompt` of all ticks
    up to the first drafts of a batch's prompts.
    """

    sweep: str
    value: int
    rows: int
    tokens: int
    seconds: float
    ms_prompt: float
    ms_per_step: float
    tokens_per_second: float
    relative: float


@dataclass(frozen=True, kw_only=True)
class ScalingReport:
    """Everything measured."""

    model: str
    machine: Machine
    settings: ScalingSettings
    canvas: int
    points: tuple[Point, ...]
    skipped: tuple[str, ...]
    """Values that this model cannot take, each with its reason."""

    def sweep(self, name: str) -> list[Point]:
        return [point for point in self.points if point.sweep == name]

    def json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


@dataclass(frozen=True)
class _Job:
    """Requests that run together on an engine."""

    value: int
    engine: Callable[[], Engine]
    requests: tuple[Request, ...]


def run_scaling(llm: LLM, settings: ScalingSettings, say: Callable[[str], object] = lambda text: None) -> ScalingReport:
    """Measure our engine alone; one sweep after another, the values of a sweep taking turns."""
    canvas = settings.canvas or llm.config.canvas_length
    points, skipped = list[Point](), list[str]()
    for sweep in settings.sweeps:
        jobs = []
        for job in _jobs(sweep, llm, settings, canvas):
            try:
                for request in job.requests:
                    validate(request, llm.config)
                jobs.append(job)
            except RequestError as error:
                skipped.append(f"{sweep} {job.value}: {error}")
        # Models of other vocabularies are made one at a time; the rest alternates.
        groups = [[job] for job in jobs] if sweep == "vocabulary" else [jobs]
        found = [point for group in groups for point in _measure(sweep, group, settings.repeats, say)]
        points += [replace(p, relative=p.tokens_per_second / found[0].tokens_per_second) for p in found]
    return ScalingReport(
        model=llm.name,
        machine=Machine.of(llm.device, llm.dtype),
        settings=settings,
        canvas=canvas,
        points=tuple(points),
        skipped=tuple(skipped),
    )


def _jobs(sweep: str, llm: LLM, settings: ScalingSettings, canvas: int) -> Iterator[_Job]:
    def engine() -> Engine:
        return llm.engine

    fixed = llm.generation.with_(
        max_new_tokens=canvas, canvas_length=canvas, max_denoising_steps=settings.steps, stability_threshold=None,
        confidence_threshold=None, stop_tokens=(), mode="diffusion",
    )  # fmt: skip
    if sweep in ("prompt", "again"):
        for tokens in settings.prompts:
            yield _Job(tokens, engine, _requests(llm, 1, tokens, fixed, reuse=sweep == "again"))
    elif sweep == "canvases":
        for count in settings.canvases:
            long = fixed.with_(max_new_tokens=count * canvas)
            yield _Job(count, engine, _requests(llm, 1, settings.prompt_tokens, long))
    elif sweep in ("batch", "narrow"):
        width = canvas if sweep == "batch" else min(settings.narrow_width, max_canvas(llm.config))
        for count in settings.batches:
            config = fixed.with_(max_new_tokens=width, canvas_length=width)
            yield _Job(count, engine, _requests(llm, count, settings.prompt_tokens, config))
    elif sweep == "answer":
        for tokens in settings.answers:
            config = fixed.with_(max_new_tokens=tokens, narrow="short")
            yield _Job(tokens, engine, _requests(llm, 1, settings.prompt_tokens, config))
    else:
        for vocab in settings.vocabularies:
            yield _Job(vocab, _other_vocabulary(llm, vocab), _requests(llm, 1, settings.prompt_tokens, fixed, vocab))


def _other_vocabulary(llm: LLM, vocab: int) -> Callable[[], Engine]:
    config = replace(llm.config, vocab_size=vocab)
    return lambda: Engine(random_model(config, 0, llm.dtype).to(llm.device))


def _requests(
    llm: LLM, count: int, tokens: int, config: GenerationConfig, vocab: int | None = None, reuse: bool = False
) -> tuple[Request, ...]:
    prompts = itertools.cycle(prompts_of(llm, 8, tokens))
    limit = vocab or llm.config.vocab_size
    return tuple(
        Request(
            prompt=tuple(token % limit for token in prompt), config=config.with_(seed=config.seed + number), reuse=reuse
        )
        for number, prompt in zip(range(count), prompts, strict=False)
    )


def _measure(sweep: str, jobs: Sequence[_Job], repeats: int, say: Callable[[str], object]) -> list[Point]:
    engines = {job.value: job.engine() for job in jobs}
    taken: dict[int, list[tuple[float, float, list[float]]]] = {job.value: [] for job in jobs}
    for count in range(repeats + 1):  # the first round warms up
        for job in jobs if count % 2 == 0 else jobs[::-1]:
            say(f"{sweep} {job.value}, round {count} of {repeats}" if count else f"{sweep} {job.value}, warming up")
            timed = _run(engines[job.value], job.requests)
            if count:
                taken[job.value].append(timed)
    return [_point(sweep, job, taken[job.value]) for job in jobs]


def _run(engine: Engine, requests: Sequence[Request]) -> tuple[float, float, list[float]]:
    """Seconds of all requests together, of their prompts' passes, and of each pure denoising tick."""
    steps, prompt = list[float](), 0.0
    for request in requests:
        engine.add(request)
    begin = engine.counters.denoise_passes
    begun = now = time.perf_counter()
    while engine.has_work:
        was = engine.counters
        engine.tick()
        synchronise(engine.runner.device)
        before, now = now, time.perf_counter()
        if was.denoise_passes > begin and engine.counters.encode_passes == was.encode_passes:
            steps.append(now - before)
        elif not steps:
            prompt += now - before
    return now - begun, prompt, steps


def _point(sweep: str, job: _Job, taken: Sequence[tuple[float, float, list[float]]]) -> Point:
    seconds = statistics.median(total for total, _, _ in taken)
    tokens = sum(request.config.max_new_tokens for request in job.requests)
    step = statistics.median(step for _, _, steps in taken for step in steps)
    return Point(
        sweep=sweep,
        value=job.value,
        rows=len(job.requests) * (job.requests[0].config.canvas_length or 0),
        tokens=tokens,
        seconds=seconds,
        ms_prompt=1000 * statistics.median(prompt for _, prompt, _ in taken),
        ms_per_step=1000 * step,
        tokens_per_second=tokens / seconds,
        relative=1.0,
    )
