"""Reports of a server under load for people: tables for a terminal, the run as SVG. Measures nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dgemma.bench.load_client import Outcome
from dgemma.bench.report import machine_line, number
from dgemma.bench.serve import LEAST_JUDGED, Drift, Growth, LoadReport
from dgemma.bench.svg import Svg

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 660, 130, 70, 84, 64
_MOST_MARKS = 700  # of a chart: more would hide each other


def load_tables(report: LoadReport) -> Iterator[RenderableType]:
    """One run."""
    mix = report.mix
    yield Text(f"{report.model}: {mix.requests} requests of seed {mix.seed}, {report.concurrency} at once", "bold")
    yield Text(machine_line(report.machine), "dim")
    yield ""
    yield Text(f"whole {report.whole}, left by the client {report.left}, lost {report.lost}")
    yield Text(
        f"compared with the same request alone {report.checked}, wrong {len(report.wrong)}; told to come again "
        f"{report.refusals} times"
    )
    yield ""
    yield _table({"": report})
    growth = Growth.of(report.samples, report.outcomes)
    yield Text(
        f"resident memory: {number(growth.level_mb)} MB since the store of shared beginnings was as full as it got, "
        f"after {growth.full_at} requests; "
        + (
            f"{growth.per_1000_mb:+.1f} MB for 1,000 requests"
            if growth.judged
            else f"{growth.requests} requests are too few to tell how it grows ({LEAST_JUDGED} would do)"
        )
    )
    for name, drift, unit in drifts(report):
        yield Text(
            f"{name}: median of the second quarter {number(drift.early)} {unit}, of the last {number(drift.late)}"
        )
    for fault in report.faults[:10]:
        yield Text(f"lost: {fault}", "red")
    for one in report.wrong[:10]:
        yield Text(f"wrong: request {one.number}: {one.got.text[:60]!r}, alone {one.expected.text[:60]!r}", "red")


def drifts(report: LoadReport) -> Iterator[tuple[str, Drift, str]]:
    """How latencies moved over the run; nothing for a run too short to tell."""
    series = {
        "time to first text": ([1e3 * at for _, at in _firsts(report)], "ms"),
        "request": ([1e3 * one.seconds for one in _in_time(report) if one.end == "whole"], "ms"),
    }
    for name, (values, unit) in series.items():
        drift = Drift.of(values)
        if drift:
            yield name, drift, unit


TITLES = (
    "at once",
    "lost",
    "wrong",
    "req/s",
    "tok/s",
    "first text p50 ms",
    "p99",
    "canvas p50 ms",
    "p99",
    "rows/pass",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A run, given as its JSON, under `TITLES`."""
    times = ("first_text_p50", "first_text_p99", "canvas_p50", "canvas_p99")
    wrong = str(len(row["wrong"])) if row["checked"] else "-"
    values = (row["requests_per_second"], row["tokens_per_second"], *(1e3 * row[name] for name in times))
    return [str(row["concurrency"]), str(row["lost"]), wrong, *map(number, values), f"{row['rows_per_forward']:.1f}"]


def _table(reports: Mapping[str, LoadReport]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("")
    for title in TITLES:
        table.add_column(title, justify="right")
    for name, report in reports.items():
        table.add_row(name, *cells(report.json()))
    return table


def _in_time(report: LoadReport) -> list[Outcome]:
    return sorted(report.outcomes, key=lambda one: one.begun)


def _firsts(report: LoadReport) -> list[tuple[float, float]]:
    return [(one.begun, one.first_text_s) for one in _in_time(report) if one.first_text_s is not None]


def load_plot(report: LoadReport) -> str:
    """Memory, time to first text and rows of a pass over the run."""
    title = f"{report.model}: {report.mix.requests} requests, {report.concurrency} at once"
    svg = Svg(_LEFT + _WIDTH + 30, _TOP + 3 * (_HEIGHT + _GAP) - 10, title)
    svg.text(20, 30, title, size=14, more='font-weight="600"')
    svg.text(20, 48, machine_line(report.machine), "soft", 11)
    samples = report.samples
    memory = [(sample.at, sample.resident_mb) for sample in samples]
    rows = [
        (late.at, (late.denoise_rows - early.denoise_rows) / (late.denoise_passes - early.denoise_passes))
        for early, late in itertools.pairwise(samples)
        if late.denoise_passes > early.denoise_passes
    ]
    _panel(svg, 0, "resident memory of the server, MB", memory, report.seconds, joined=True)
    _panel(svg, 1, "time to first text, seconds", _firsts(report), report.seconds, joined=False)
    _panel(svg, 2, "rows of a denoise pass, mean between two readings", rows, report.seconds, joined=True)
    return str(svg)


def _panel(
    svg: Svg, index: int, title: str, points: Sequence[tuple[float, float]], seconds: float, joined: bool
) -> None:
    top = _TOP + index * (_HEIGHT + _GAP)
    base = top + _HEIGHT
    svg.text(_LEFT, top - 6, title, "soft", 11)
    points = points[:: max(1, len(points) // _MOST_MARKS)]
    highest = max((value for _, value in points), default=1.0) or 1.0
    for share in (0.0, 0.5, 1.0):
        y = base - share * 0.9 * _HEIGHT
        svg.line(_LEFT, y, _LEFT + _WIDTH, y)
        svg.text(_LEFT - 8, y + 4, number(share * highest), "soft", 11, anchor="end")
    places = [(_LEFT + _WIDTH * at / seconds, base - 0.9 * _HEIGHT * value / highest) for at, value in points]
    if joined:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        svg.raw(f'<polyline points="{path}" fill="none" stroke="#2f81f7" stroke-width="1.5"/>')
    else:
        for x, y in places:
            svg.raw(f'<circle class="a" cx="{x:.1f}" cy="{y:.1f}" r="1.6"/>')
    svg.text(_LEFT, base + 16, "0", "soft", 11)
    svg.text(_LEFT + _WIDTH, base + 16, f"{seconds:.0f} s", "soft", 11, anchor="end")
