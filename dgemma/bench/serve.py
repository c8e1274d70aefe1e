"""A server under a mix of requests: speed and memory over the run, and whether every answer is the one it gives alone.

The server is a process of its own (ours, or any that speaks the same API); this one plays its clients and, when they
are done, answers every request again by itself, one at a time.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from dgemma.api import LLM
from dgemma.bench.load_client import Outcome, send_all
from dgemma.bench.load_mix import Expected, Item, MixSettings, expected, make_mix
from dgemma.bench.machine import Machine
from dgemma.config import EngineConfig
from dgemma.errors import DgemmaError, RequestError

FORMAT, VERSION = "dgemma-bench-serve", 1
LEAST_JUDGED = 1000
ALONE = EngineConfig(max_batch_rows=1, prefix_cache_tokens=0)
"""How the engine of this process must be set up, so that an answer has nobody to share anything with."""
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The server at one moment, from its /metrics; `at` is seconds since the start of the run."""

    at: float
    resident_mb: float
    waiting: int
    running: int
    kv_reserved_mb: float
    prefix_tokens: int
    denoise_rows: int
    denoise_passes: int
    committed_tokens: int


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """An answer that is not the one the same request gets alone; or, of a client that left, no beginning of it."""

    number: int
    got: Outcome
    expected: Expected


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Everything measured. Latencies are the clients'; `canvas` is the time between two pieces of a stream's text."""

    model: str
    machine: Machine
    mix: MixSettings
    concurrency: int
    whole: int
    left: int
    lost: int
    checked: int
    wrong: tuple[Wrong, ...]
    refusals: int
    faults: tuple[str, ...]
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    rows_per_forward: float
    """Of denoise passes, from the server's counters before and after."""
    first_text_p50: float
    first_text_p99: float
    canvas_p50: float
    canvas_p99: float
    samples: tuple[Sample, ...]
    outcomes: tuple[Outcome, ...]

    def json(self) -> dict[str, Any]:
        """Outcomes without their texts and gaps: those fill a disk and are the same on every run."""
        kept = ("number", "begun", "end", "reason", "refusals", "first_text_s", "seconds", "completion_tokens")
        outcomes = [{name: getattr(one, name) for name in kept} for one in self.outcomes]
        return {"format": FORMAT, "version": VERSION, **asdict(self), "outcomes": outcomes}


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Medians of the second quarter of a run (the first warms up) and of its last one."""

    early: float
    late: float

    @staticmethod
    def of(values: Sequence[float]) -> Drift | None:
        if len(values) < 8:
            return None
        quarter = len(values) // 4
        return Drift(early=statistics.median(values[quarter : 2 * quarter]), late=statistics.median(values[-quarter:]))


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How the server's memory moved once its store of shared beginnings held as much as it ever did.

    Until then it grows, and should.
    """

    full_at: int
    """Requests that were over by then."""
    requests: int
    """Requests since."""
    level_mb: float
    """Median."""
    per_1000_mb: float
    """Median slope between any two readings (Theil-Sen), for 1,000 requests."""

    @property
    def judged(self) -> bool:
        """Whether that is enough to tell a leak from an allocator that settles."""
        return self.requests >= LEAST_JUDGED

    @staticmethod
    def of(samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> Growth:
        full = max(sample.prefix_tokens for sample in samples)
        first = next(place for place, sample in enumerate(samples) if sample.prefix_tokens == full)
        ends = sorted(one.begun + one.seconds for one in outcomes)
        points = [(bisect.bisect(ends, sample.at), sample.resident_mb) for sample in samples[first:]]
        slopes = [
            (late[1] - early[1]) / (late[0] - early[0])
            for early, late in itertools.combinations(points, 2)
            if late[0] > early[0]
        ]
        return Growth(
            full_at=points[0][0],
            requests=points[-1][0] - points[0][0],
            level_mb=statistics.median(memory for _, memory in points),
            per_1000_mb=1000 * statistics.median(slopes or [0.0]),
        )


def run_load(
    llm: LLM,
    url: str,
    mix: MixSettings,
    concurrency: int,
    *,
    headers: Mapping[str, str] | None = None,
    interval_s: float = 1.0,
    known: dict[Item, Expected] | None = None,
    say: Say = lambda text: None,
) -> LoadReport:
    """Send the mix to the server at `url`, and answer every request again with `llm`, whose engine must be `ALONE`.

    `known` are answers computed before, by item, and gets the new ones; with None nothing is compared.
    """
    if concurrency < 1:
        raise RequestError(f"concurrency must be at least 1, got {concurrency}")
    say("making the mix")
    items = make_mix(llm, mix)
    outcomes, samples, seconds = asyncio.run(_run(url, items, concurrency, headers, interval_s, say))
    wrong = () if known is None else tuple(_check(llm, items, outcomes, known, say))
    gaps = [gap for one, item in zip(outcomes, items, strict=True) if not item.stop for gap in one.gaps_s]
    firsts = [one.first_text_s for one in outcomes if one.first_text_s is not None]
    first, last = samples[0], samples[-1]
    passes = last.denoise_passes - first.denoise_passes
    return LoadReport(
        model=llm.name,
        machine=Machine.of(llm.device, llm.dtype),
        mix=mix,
        concurrency=concurrency,
        whole=sum(one.end == "whole" for one in outcomes),
        left=sum(one.end == "left" for one in outcomes),
        lost=sum(one.end == "lost" for one in outcomes),
        checked=0 if known is None else sum(one.end != "lost" for one in outcomes),
        wrong=wrong,
        refusals=sum(one.refusals for one in outcomes),
        faults=tuple(f"request {one.number}: {one.fault}" for one in outcomes if one.end == "lost"),
        seconds=seconds,
        requests_per_second=len(outcomes) / seconds,
        tokens_per_second=(last.committed_tokens - first.committed_tokens) / seconds,
        rows_per_forward=(last.denoise_rows - first.denoise_rows) / passes if passes else 0.0,
        first_text_p50=quantile(firsts, 0.5),
        first_text_p99=quantile(firsts, 0.99),
        canvas_p50=quantile(gaps, 0.5),
        canvas_p99=quantile(gaps, 0.99),
        samples=tuple(samples),
        outcomes=tuple(outcomes),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed; 0 of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else 0.0


async def _run(
    url: str,
    items: Sequence[Item],
    concurrency: int,
    headers: Mapping[str, str] | None,
    interval_s: float,
    say: Say,
) -> tuple[list[Outcome], list[Sample], float]:
    samples: list[Sample] = []
    begun, done = time.perf_counter(), 0

    def count(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        say(f"{done} of {len(items)} requests")

    async with httpx.AsyncClient(base_url=url, headers=dict(headers or {}), timeout=60, trust_env=False) as client:
        model = await _model(client, url)

        async def watch() -> None:
            while True:
                samples.append(await _sample(client, time.perf_counter() - begun))
                await asyncio.sleep(interval_s)

        samples.append(await _sample(client, 0.0))
        watching = asyncio.create_task(watch())
        begun = time.perf_counter()
        outcomes = await send_all(url, model, items, concurrency, headers=headers, done=count)
        seconds = time.perf_counter() - begun
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        samples.append(await _sample(client, seconds))
    return outcomes, samples, seconds


async def _model(client: httpx.AsyncClient, url: str) -> str:
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise DgemmaError(f"no server with a model answers at {url}: {type(error).__name__}: {error}") from None


async def _sample(client: httpx.AsyncClient, at: float) -> Sample:
    values = read_metrics((await client.get("/metrics")).raise_for_status().text)
    return Sample(
        at=at,
        resident_mb=values.get("process_resident_memory_bytes", 0.0) / 1e6,
        waiting=int(values["dgemma_requests_waiting"]),
        running=int(values["dgemma_requests_running"]),
        kv_reserved_mb=values["dgemma_kv_reserved_bytes"] / 1e6,
        prefix_tokens=int(values["dgemma_prefix_tokens"]),
        denoise_rows=int(values['dgemma_forward_rows_total{kind="denoise"}']),
        denoise_passes=int(values['dgemma_forward_passes_total{kind="denoise"}']),
        committed_tokens=int(values["dgemma_committed_tokens_total"]),
    )


def read_metrics(text: str) -> dict[str, float]:
    """Prometheus's text format as a mapping, labels as they stand."""
    found = _SAMPLE.findall(text)
    return {f"{name}{{{labels}}}" if labels else name: float(value) for name, labels, value in found}


def _check(
    llm: LLM, items: Sequence[Item], outcomes: Sequence[Outcome], known: dict[Item, Expected], say: Say
) -> list[Wrong]:
    assert llm.engine.config.max_batch_rows == 1 and not llm.engine.config.prefix_cache_tokens
    wrong = []
    for count, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
        if outcome.end == "lost":
            continue
        say(f"answering {count + 1} of {len(items)} alone")
        alone = known[item] = known.get(item) or expected(llm, item)
        if outcome.end == "whole":
            right = (outcome.text, outcome.reason) == (alone.text, alone.reason)
        else:
            right = alone.text.startswith(outcome.text)
        if not right:
            wrong.append(Wrong(number=item.number, got=outcome, expected=alone))
    return wrong
