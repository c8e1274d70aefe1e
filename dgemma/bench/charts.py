"""Reports on parts, memory and scaling for people: tables for a terminal, charts as SVG. Measures nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dgemma.bench.kernels import KernelsReport, Pass
from dgemma.bench.memory import MemoryReport
from dgemma.bench.parts import ALL_PARTS
from dgemma.bench.report import floor_table, machine_line, number
from dgemma.bench.scaling import Point, ScalingReport
from dgemma.bench.svg import Svg

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 300, 150, 60, 76, 70
_COLUMNS = 2
_TITLES = {
    "prompt": ("prompt tokens", "ms to the first draft"),
    "again": ("prompt tokens, encoded before", "ms to the first draft"),
    "canvases": ("canvases, one after another", "seconds"),
    "batch": ("whole canvases in a batch", "tokens per second"),
    "narrow": ("narrow canvases in a batch", "tokens per second"),
    "answer": ("tokens of an answer", "seconds"),
    "vocabulary": ("vocabulary", "ms of a step"),
}


def kernels_tables(report: KernelsReport, ops: bool = False) -> Iterator[RenderableType]:
    """Parts of each pass beside their floors; with `ops`, every op of the floors too."""
    settings = report.settings
    yield Text(f"{report.model}, canvas {report.canvas} behind {settings.prompt_tokens} tokens", "bold")
    yield Text(machine_line(report.machine), "dim")
    for one in report.passes:
        yield ""
        yield _parts(one)
        if ops:
            yield ""
            yield floor_table(one.floor)
    yield ""
    yield Text(
        "medians; a part's time is without the parts inside it. rest: inside the pass, in no part. python: around it. "
        "without the watch: the same pass with nothing measured inside",
        "dim",
    )


def _parts(one: Pass) -> Table:
    floors = one.floor.parts
    table = _table(one.name, "ms", "% of pass", "floor ms", "% of floor")
    for part in ALL_PARTS:
        ms, floor = one.parts[part], floors.get(part, 0.0)
        if ms or floor:
            share = f"{100 * ms / one.watched_ms:.0f}" if one.watched_ms else "-"
            table.add_row(part, number(ms), share, number(floor or None), _share(floor, ms))
    table.add_row("all", number(one.watched_ms), "100", number(one.floor.ms), _share(one.floor.ms, one.watched_ms))
    table.add_row("without the watch", number(one.ms), "", number(one.floor.ms), _share(one.floor.ms, one.ms))
    return table


def _share(floor: float, ms: float) -> str:
    return f"{100 * floor / ms:.0f}" if floor and ms else "-"


def memory_tables(report: MemoryReport) -> Iterator[RenderableType]:
    """Each side's stages in MB."""
    settings = report.settings
    yield Text(f"{report.model}, vocabulary {report.vocab:,}, {settings.canvases} canvases of {report.canvas}", "bold")
    yield Text(machine_line(report.machine), "dim")
    yield ""
    table = _table(
        "MB, seen from outside", "imports", "loaded", "warm", "peak", "per canvas", "weights", "file", "allowed"
    )
    for side in report.sides:
        values = (side.imported, side.loaded, side.warm, side.peak, side.extra, side.weights, side.file, side.allowed)
        table.add_row(side.side, *map(number, values))
    yield table
    yield ""
    yield Text(
        "warm: after the prompt and a canvas of one position. peak: of the canvases after it; per canvas: peak - warm."
        " allowed: 1.15 x file + 64 MB + imports, the bound for weights that stay as they are stored",
        "dim",
    )


def scaling_tables(report: ScalingReport) -> Iterator[RenderableType]:
    """A table for each sweep."""
    settings = report.settings
    yield Text(f"{report.model}, canvas {report.canvas}, {settings.steps} steps", "bold")
    yield Text(machine_line(report.machine), "dim")
    for sweep in settings.sweeps:
        points = report.sweep(sweep)
        if not points:
            continue
        yield ""
        table = _table(_TITLES[sweep][0], "seconds", "ms prompt", "ms/step", "tok/s", "x first")
        for point in points:
            values = (point.seconds, point.ms_prompt, point.ms_per_step, point.tokens_per_second, point.relative)
            table.add_row(f"{point.value:,}", *map(number, values))
        yield table
    yield ""
    for reason in report.skipped:
        yield Text(f"left out: {reason}", "dim")
    yield Text("x first: tokens per second against the first row; a batch without loss per row has 1 or more", "dim")


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for count, title in enumerate(titles):
        table.add_column(title, justify="right" if count else "left")
    return table


def scaling_plot(report: ScalingReport) -> str:
    """A panel for each sweep; the value doubles from mark to mark."""
    sweeps = [sweep for sweep in report.settings.sweeps if report.sweep(sweep)]
    rows = math.ceil(len(sweeps) / _COLUMNS)
    title = f"{report.model}: how cost grows, canvas {report.canvas}, {report.machine.threads} threads"
    svg = Svg(_COLUMNS * (_LEFT + _WIDTH) + 40, _TOP + rows * (_HEIGHT + _GAP), title)
    svg.text(20, 30, title, size=14, more='font-weight="600"')
    svg.text(20, 48, machine_line(report.machine), "soft", 11)
    for count, sweep in enumerate(sweeps):
        x = _LEFT + (count % _COLUMNS) * (_WIDTH + _LEFT)
        _panel(svg, x, _TOP + (count // _COLUMNS) * (_HEIGHT + _GAP), sweep, report.sweep(sweep))
    return str(svg)


def _panel(svg: Svg, x: float, y: float, sweep: str, points: Sequence[Point]) -> None:
    below, beside = _TITLES[sweep]
    heights = [_height(sweep, point) for point in points]
    top, widest = max(heights), max(len(points) - 1, 1)
    svg.text(x, y + 4, beside, "soft", 11)
    base = y + _HEIGHT
    svg.line(x, base, x + _WIDTH - 20, base)
    places = [(x + 12 + (_WIDTH - 60) * i / widest, base - 0.82 * _HEIGHT * h / top) for i, h in enumerate(heights)]
    for (x1, y1), (x2, y2) in itertools.pairwise(places):
        svg.raw(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#2f81f7" stroke-width="2"/>')
    for (px, py), point, height in zip(places, points, heights, strict=True):
        svg.raw(f'<circle class="a" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>')
        svg.text(px, py - 8, number(height), size=11, anchor="middle")
        svg.text(px, base + 15, f"{point.value:,}", "soft", 11, anchor="middle")
    svg.text(x + (_WIDTH - 20) / 2, base + 32, below, "soft", 11, anchor="middle")


def _height(sweep: str, point: Point) -> float:
    unit = _TITLES[sweep][1]
    values = {
        "ms of a step": point.ms_per_step, "ms to the first draft": point.ms_prompt, "seconds": point.seconds
    }  # fmt: skip
    return values.get(unit, point.tokens_per_second)
