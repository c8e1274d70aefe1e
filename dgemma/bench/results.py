"""What a decode benchmark found: runs, rows and ratios that follow from them, and the floor. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dgemma.bench.floor import Floor
from dgemma.bench.machine import Machine, Memory
from dgemma.bench.runs import Run
from dgemma.config import GenerationConfig
from dgemma.errors import RequestError

FORMAT, VERSION = "dgemma-bench-decode", 2
KINDS = ("fixed", "own", "ar")
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
    """What to measure.

    `medium` adds the peer at matmul precision "medium", without which MKL serves it; `tuned` adds it at "medium" and
    with a tuned allocator, in a process of its own. `prompt_tokens` repeats or cuts every prompt to that length.
    `peer_model` is the folder that the peer loads where it cannot read ours (quantised weights).
    """

    prompts: int = 3
    repeats: int = 3
    fixed_steps: int = 16
    kinds: tuple[str, ...] = KINDS
    prompt_tokens: int | None = None
    floor: bool = True
    peer: bool = True
    peer_model: str | None = None
    peer_dtype: str | None = None
    medium: bool = False
    tuned: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("prompts", 1, len(PROMPTS)), ("repeats", 1, 1000), ("fixed_steps", 2, 1000), ("prompt_tokens", 1, 10**6),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name.replace('_', '-')} must be in {low}..{high}, got {value}")
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise RequestError(f"kinds must be some of {', '.join(KINDS)}; got {', '.join(self.kinds) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side at one kind of run: medians over its runs; counts are totals over its runs.

    `ms_per_step` is of denoising steps but each canvas's first, None where there are none. Memory is that of the
    side's process in an untimed run (ours and the peer share one); `extra_mb` is how much that run added.
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
    peer_settings: dict[str, dict[str, str]]
    """Of each side of the peer: what it was set to."""
    settings: DecodeSettings
    generation: GenerationConfig
    canvas: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    agreement: float | None
    """Largest difference of the two sides' encoder states of the first prompt, relative to their largest value."""
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]
    floor: Floor | None
    """Of a denoising step of the fixed run, at the median prompt length; measured in the same process and run."""
    prompt_floor: Floor | None
    """Of encoding the median prompt."""
    runs: tuple[dict[str, Any], ...]

    def row(self, side: str, kind: str) -> Row | None:
        return next((row for row in self.rows if (row.side, row.kind) == (side, kind)), None)

    def share(self, row: Row) -> float | None:
        """The floor of a step as a share of what the row's steps took: 1 is a step at the floor."""
        if self.floor is None or row.kind != "fixed" or row.ms_per_step is None:
            return None
        return self.floor.ms / row.ms_per_step

    def json(self) -> dict[str, Any]:
        data = asdict(self)
        for row, facts in zip(self.rows, data["rows"], strict=True):
            facts |= {"steps_per_canvas": row.steps_per_canvas, "share_of_floor": self.share(row)}
        for name in ("floor", "prompt_floor"):
            floor = getattr(self, name)
            data[name] = None if floor is None else floor.json()
        return data


def suite_json(reports: Sequence[DecodeReport]) -> dict[str, Any]:
    """The reports of one call (one for each type and number of threads) as one JSON object."""
    return {"format": FORMAT, "version": VERSION, "reports": [report.json() for report in reports]}


@dataclass(frozen=True)
class Timed:
    """One measured run of one side."""

    side: str
    kind: str
    prompt: int
    seed: int
    run: Run


def row_of(side: str, kind: str, timed: Sequence[Timed], memory: Memory) -> Row:
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


def ratios_of(timed: Sequence[Timed], sides: Sequence[str]) -> list[Ratio]:
    ours, peers = sides[0], sides[1:]

    def step(run: Run) -> float:
        return 1 / statistics.median(run.step_seconds)

    def prompt(run: Run) -> float:
        return 1 / run.prompt_seconds

    def cpu(run: Run) -> float:
        return 1 / run.cpu_seconds

    def rate(run: Run) -> float:
        return run.tokens_per_second

    kinds = {item.kind for item in timed}
    wanted: list[tuple[str, Callable[[Run], float], tuple[str, str], tuple[str, str]]] = []
    for peer in peers:
        wanted += [
            ("denoising step", step, (ours, "fixed"), (peer, "fixed")),
            ("encoding the prompt", prompt, (ours, "fixed"), (peer, "fixed")),
            ("a canvas of equal steps", rate, (ours, "fixed"), (peer, "fixed")),
            ("a canvas of equal steps, CPU time", cpu, (ours, "fixed"), (peer, "fixed")),
            ("own settings, end to end", rate, (ours, "own"), (peer, "own")),
        ]
    wanted.append(("diffusion against autoregression", rate, (ours, "own"), (ours, "ar")))
    return [_ratio(name, speed, timed, fast, slow) for name, speed, fast, slow in wanted if {fast[1], slow[1]} <= kinds]


def _ratio(
    name: str,
    speed: Callable[[Run], float],
    timed: Sequence[Timed],
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


def _of(item: Timed, *wanted: tuple[str, str]) -> bool:
    return (item.side, item.kind) in wanted
