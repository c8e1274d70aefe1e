"""Decoding one prompt at a time: denoising, autoregression and the peer on the same weights, taking turns.

Three kinds of runs. `fixed`: one canvas of a fixed number of steps, no early stop, no end tokens, so both sides do
the same work. `own`: the checkpoint's own sampler settings, stop rule and end tokens. `ar`: the encoder of the same
weights, greedy, with the token budget of `own` (ours only: the peer has no such mode).
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dgemma.api import LLM
from dgemma.bench.machine import Machine, Memory, MemoryMeter
from dgemma.bench.peer import MediumPeer, Peer
from dgemma.bench.runs import Ours, Run, Side
from dgemma.config import GenerationConfig
from dgemma.engine import Request, validate
from dgemma.errors import DgemmaError, RequestError

FORMAT, VERSION = "dgemma-bench-decode", 1
PROMPTS = (
    "Once upon a time",
    "Deep in the forest, there lived a little fox named",
    "It was a dark night",
    "One morning, a cheerful girl named Lily found a key. She",
    "There was once a young bear",
    "In a small village near the river, there lived a baker who",
    "The king looked out of the window and",
    "Far away, behind the tall hills",
)


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """What to measure. `medium` adds the peer at matmul precision "medium", without which MKL serves it."""

    prompts: int = 3
    repeats: int = 3
    fixed_steps: int = 16
    peer: bool = True
    medium: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("prompts", 1, len(PROMPTS)), ("repeats", 1, 1000), ("fixed_steps", 2, 1000)):
            if not low <= getattr(self, name) <= high:
                raise RequestError(f"{name.replace('_', '-')} must be in {low}..{high}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side at one kind of run: medians over its runs; counts are totals over its runs.

    `ms_per_step` is of denoising steps but each canvas's first, None where there are none. Memory is that of the
    whole process in an untimed run, which holds the weights of both sides; `extra_mb` is how much that run added.
    """

    side: str
    kind: str
    runs: int
    tokens: int
    denoise_passes: int
    canvases: int
    tokens_per_second: float
    tokens_per_forward: float
    seconds: float
    cpu_seconds: float
    ms_per_step: float | None
    ms_per_prompt: float
    peak_rss_mb: float
    extra_mb: float | None

    @property
    def steps_per_canvas(self) -> float | None:
        return self.denoise_passes / self.canvases if self.canvases else None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster `fast` is than `slow`: median, lowest and highest over pairs of one prompt and seed."""

    name: str
    fast: str
    slow: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """Everything measured, with what it depends on. `runs` are the single measurements behind the rows."""

    created: str
    model: str
    parameters: int
    machine: Machine
    peer: str | None
    settings: DecodeSettings
    generation: GenerationConfig
    canvas: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    agreement: float | None
    """Largest difference of the two sides' encoder states of the first prompt, relative to their largest value."""
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    runs: tuple[dict[str, Any], ...]

    def row(self, side: str, kind: str) -> Row | None:
        return next((row for row in self.rows if (row.side, row.kind) == (side, kind)), None)

    def json(self) -> dict[str, Any]:
        data = asdict(self)
        for row, facts in zip(self.rows, data["rows"], strict=True):
            facts["steps_per_canvas"] = row.steps_per_canvas
        return {"format": FORMAT, "version": VERSION, **data}


@dataclass(frozen=True)
class _Timed:
    side: str
    kind: str
    prompt: int
    seed: int
    run: Run


def run_decode(
    llm: LLM,
    settings: DecodeSettings,
    overrides: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> DecodeReport:
    """Measure. `overrides` are generation parameters taken over the checkpoint's; `say` hears what is going on."""
    own = llm.generation.with_(**{**(overrides or {}), "mode": "diffusion"})
    canvas = own.canvas_length or llm.config.canvas_length
    # Whole canvases, because that is what the peer writes.
    own = own.with_(max_new_tokens=-(-own.max_new_tokens // canvas) * canvas)
    kinds = _kinds(own, canvas, settings)
    prompts = [llm.encode_prompt(text) for text in PROMPTS[: settings.prompts]]
    for prompt in prompts:
        validate(Request(prompt=tuple(prompt), config=own), llm.config)
    model = llm.engine.runner.model
    sides: list[Side] = [Ours(model)]
    version = None
    if settings.peer:
        say("loading transformers")
        peer = Peer(llm.folder, llm.config, llm.dtype, llm.device, canvas)
        version = f"transformers {peer.version}"
        sides += [peer, MediumPeer(peer)] if settings.medium else [peer]
    plan = [(side, kind) for kind in kinds for side in (sides[:1] if kind == "ar" else sides)]
    agreement = _agreement(sides, prompts[0]) if settings.peer else None
    machine = Machine.of(llm.device, llm.dtype)
    memory = _rehearse(plan, kinds, prompts[0], say)
    seeds = tuple(own.seed + repeat for repeat in range(settings.repeats))
    timed = _measure(plan, kinds, prompts, seeds, say)
    return DecodeReport(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=llm.name,
        parameters=sum(weight.numel() for weight in model.parameters()),
        machine=machine,
        peer=version,
        settings=settings,
        generation=own,
        canvas=canvas,
        prompts=PROMPTS[: settings.prompts],
        seeds=seeds,
        agreement=agreement,
        rows=tuple(_row(side.name, kind, timed, memory[side.name, kind]) for side, kind in plan),
        ratios=tuple(_ratios(timed, [side.name for side in sides])),
        runs=tuple(asdict(item) for item in timed),
    )


def _kinds(own: GenerationConfig, canvas: int, settings: DecodeSettings) -> dict[str, GenerationConfig]:
    fixed = own.with_(
        max_new_tokens=canvas, max_denoising_steps=settings.fixed_steps, stability_threshold=None,
        confidence_threshold=None, stop_tokens=(), sampler="entropy_bound", convention="hf", temperature=1.0, top_k=0,
    )  # fmt: skip
    return {"fixed": fixed, "own": own, "ar": own.with_(mode="ar", temperature=0.0)}


def _agreement(sides: Sequence[Side], prompt: Sequence[int]) -> float:
    ours, theirs = (side.encode(prompt) for side in sides[:2])
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _rehearse(
    plan: Sequence[tuple[Side, str]],
    kinds: Mapping[str, GenerationConfig],
    prompt: Sequence[int],
    say: Callable[[str], object],
) -> dict[tuple[str, str], Memory]:
    """One untimed run of everything: first calls import and allocate, and memory is measured here."""
    for side in dict.fromkeys(side for side, _ in plan):
        say(f"warming up {side.name}")
        side.run(prompt, kinds["fixed"].with_(max_denoising_steps=2))
    memory = {}
    for side, kind in plan:
        say(f"memory: {side.name}, {kind}")
        meter = MemoryMeter()
        side.run(prompt, kinds[kind])
        memory[side.name, kind] = meter.stop()
    return memory


def _measure(
    plan: Sequence[tuple[Side, str]],
    kinds: Mapping[str, GenerationConfig],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    say: Callable[[str], object],
) -> list[_Timed]:
    timed = []
    rounds = [(seed, number) for seed in seeds for number in range(len(prompts))]
    for count, (seed, number) in enumerate(rounds):
        # Every other round backwards: whoever goes first has the same luck as who goes last.
        for side, kind in plan if count % 2 == 0 else plan[::-1]:
            say(f"round {count + 1} of {len(rounds)}: {side.name}, {kind}")
            run = side.run(prompts[number], kinds[kind].with_(seed=seed))
            timed.append(_Timed(side.name, kind, number, seed, run))
        passes = {item.run.denoise_passes for item in timed if item.kind == "fixed"}
        if len(passes) != 1:
            raise DgemmaError(f"the sides took unequal numbers of steps in a fixed run: {sorted(passes)}")
    return timed


def _row(side: str, kind: str, timed: Sequence[_Timed], memory: Memory) -> Row:
    runs = [item.run for item in timed if (item.side, item.kind) == (side, kind)]
    steps = [seconds for run in runs for seconds in run.step_seconds]
    return Row(
        side=side,
        kind=kind,
        runs=len(runs),
        tokens=sum(run.tokens for run in runs),
        denoise_passes=sum(run.denoise_passes for run in runs),
        canvases=sum(run.canvases for run in runs),
        tokens_per_second=statistics.median(run.tokens_per_second for run in runs),
        tokens_per_forward=statistics.median(run.tokens_per_forward for run in runs),
        seconds=statistics.median(run.seconds for run in runs),
        cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
        ms_per_step=1000 * statistics.median(steps) if steps else None,
        ms_per_prompt=1000 * statistics.median(run.prompt_seconds for run in runs),
        peak_rss_mb=memory.peak_mb,
        extra_mb=memory.extra_mb,
    )


def _ratios(timed: Sequence[_Timed], sides: Sequence[str]) -> list[Ratio]:
    ours, peers = sides[0], sides[1:]

    def step(run: Run) -> float:
        return 1 / statistics.median(run.step_seconds)

    def prompt(run: Run) -> float:
        return 1 / run.prompt_seconds

    def cpu(run: Run) -> float:
        return 1 / run.cpu_seconds

    def rate(run: Run) -> float:
        return run.tokens_per_second

    ratios = []
    for peer in peers:
        ratios += [
            _ratio("denoising step", step, timed, (ours, "fixed"), (peer, "fixed")),
            _ratio("encoding the prompt", prompt, timed, (ours, "fixed"), (peer, "fixed")),
            _ratio("a canvas of equal steps", rate, timed, (ours, "fixed"), (peer, "fixed")),
            _ratio("a canvas of equal steps, CPU time", cpu, timed, (ours, "fixed"), (peer, "fixed")),
            _ratio("own settings, end to end", rate, timed, (ours, "own"), (peer, "own")),
        ]
    return [*ratios, _ratio("diffusion against autoregression", rate, timed, (ours, "own"), (ours, "ar"))]


def _ratio(
    name: str,
    speed: Callable[[Run], float],
    timed: Sequence[_Timed],
    fast: tuple[str, str],
    slow: tuple[str, str],
) -> Ratio:
    speeds = {
        (item.side, item.kind, item.prompt, item.seed): speed(item.run) for item in timed if _of(item, fast, slow)
    }
    pairs = [value / speeds[(*slow, *key[2:])] for key, value in speeds.items() if key[:2] == fast]
    return Ratio(
        name=name,
        fast=", ".join(fast),
        slow=", ".join(slow),
        value=statistics.median(pairs),
        low=min(pairs),
        high=max(pairs),
    )


def _of(item: _Timed, *wanted: tuple[str, str]) -> bool:
    return (item.side, item.kind) in wanted
