"""Two thousand requests of mixed lengths against a real server process: nothing lost, nothing wrong, nothing leaks.

Writes docs/figures/serve-soak.json and .svg. Ends with status 1 and the reason if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from dgemma.api import LLM
from dgemma.bench.load_mix import MixSettings
from dgemma.bench.load_report import drifts, load_plot
from dgemma.bench.serve import ALONE, LEAST_JUDGED, Growth, LoadReport, run_load
from dgemma.bench.server_process import ServerProcess

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
MOST_DRIFT = 1.5
"""Latencies of the last quarter over those of the second, at most; they vary with what happens to stand in the mix."""
MOST_GROWTH = 0.04
"""Of the memory's level, for 1,000 requests."""
LEAST_REQUESTS = LEAST_JUDGED + 300
"""About 200 of the mix fill the store of shared beginnings of the default model."""
LEAST_ROWS = 4.0


def faults(report: LoadReport, memory: bool = True) -> Iterator[str]:
    """The claims that do not hold."""
    if report.lost:
        yield f"{report.lost} lost: {report.faults[:3]}"
    if report.wrong:
        yield f"{len(report.wrong)} wrong: {report.wrong[:3]}"
    if report.checked != report.mix.requests - report.lost:
        yield f"{report.checked} compared of {report.mix.requests}"
    if report.rows_per_forward < LEAST_ROWS:
        yield f"{report.rows_per_forward:.2f} rows a pass, wanted {LEAST_ROWS}"
    last = report.samples[-1]
    if (last.waiting, last.running, last.kv_reserved_mb) != (0, 0, 0):
        yield f"left over in the engine: {last}"
    for name, drift, unit in drifts(report):
        if drift.late > MOST_DRIFT * drift.early:
            yield f"{name} grew from {drift.early:.1f} to {drift.late:.1f} {unit}"
    if not memory:
        return
    growth = Growth.of(report.samples, report.outcomes)
    if not growth.judged:
        yield (
            f"memory cannot be judged: {growth.requests} requests after the store of shared beginnings was as full as "
            f"it got, wanted {LEAST_JUDGED}"
        )
    elif growth.per_1000_mb > MOST_GROWTH * growth.level_mb:
        yield f"resident memory grows by {growth.per_1000_mb:.1f} MB for 1,000 requests, at {growth.level_mb:.0f} MB"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--no-memory", action="store_true", help="do not judge memory: a run may be short then")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, default=FIGURES / "serve-soak")
    arguments = parser.parse_args()
    if arguments.requests < LEAST_REQUESTS and not arguments.no_memory:
        parser.error(
            f"{arguments.requests} requests are too few to judge memory: take at least {LEAST_REQUESTS}, or --no-memory"
        )
    llm = LLM.load(arguments.model, engine=ALONE)
    latest = 0

    def say(text: str) -> None:
        nonlocal latest
        head = text.split()[0]
        if head.isdigit() and int(head) >= latest + 100:
            latest = int(head)
            print(text, flush=True)

    mix, server = MixSettings(requests=arguments.requests), ServerProcess(arguments.model)
    with server:
        report = run_load(llm, server.url, mix, arguments.concurrency, interval_s=2.0, known={}, say=say)
    found = list(faults(report, memory=not arguments.no_memory))
    if server.status != 0:
        found.append(f"the server ended with status {server.status} when it was told to stop")
    arguments.out.with_suffix(".json").write_text(json.dumps(report.json()) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".svg").write_text(load_plot(report), encoding="utf-8")
    print(
        f"{report.whole} whole, {report.left} left by the client, {report.lost} lost, {len(report.wrong)} wrong of "
        f"{report.checked} compared; {report.seconds:.0f} s, {report.tokens_per_second:.0f} tokens/s, "
        f"{report.rows_per_forward:.1f} rows a pass"
    )
    print("memory was not judged" if arguments.no_memory else Growth.of(report.samples, report.outcomes))
    for fault in found:
        print(f"FAILED: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
