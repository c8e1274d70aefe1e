"""A decode report for people: a table for a terminal, a bar chart as SVG. Knows the report, measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dgemma.bench.decode import DecodeReport, Row
from dgemma.bench.svg import Svg

_BUSY_LOAD = 0.5
_BAR_WIDTH, _LEFT, _BAR, _GAP = 360, 190, 16, 8


def tables(report: DecodeReport) -> Iterator[RenderableType]:
    """What a terminal shows, in order."""
    yield Text(_headline(report), "bold")
    yield Text(_machine(report), "dim")
    yield ""
    yield _rows(report)
    yield ""
    yield _ratios(report)
    yield ""
    for note in _notes(report):
        yield Text(note, "dim")


def _headline(report: DecodeReport) -> str:
    peer = f" beside {report.peer}" if report.peer else ""
    return f"{report.model} ({report.parameters:,} parameters), canvas {report.canvas}{peer}"


def _machine(report: DecodeReport) -> str:
    machine = report.machine
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, {machine.device}, {machine.dtype}, "
        f"torch {machine.torch_version}"
    )


def _rows(report: DecodeReport) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("run")
    for title in ("tok/s", "ms/step", "ms prompt", "tok/forward", "steps/canvas", "extra MB"):
        table.add_column(title, justify="right")
    for row in report.rows:
        table.add_row(
            row.side,
            row.kind,
            _number(row.tokens_per_second),
            _number(row.ms_per_step),
            _number(row.ms_per_prompt),
            _number(row.tokens_per_forward),
            _number(row.steps_per_canvas),
            _number(row.extra_mb),
        )
    return table


def _ratios(report: DecodeReport) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("times as fast")
    table.add_column("", justify="right", style="bold")
    table.add_column("lowest-highest", justify="right")
    table.add_column("against")
    for ratio in report.ratios:
        table.add_row(ratio.name, f"{ratio.value:.2f}", f"{ratio.low:.2f}-{ratio.high:.2f}", ratio.slow)
    return table


def _notes(report: DecodeReport) -> Iterator[str]:
    settings, own = report.settings, report.generation
    seeds = ", ".join(map(str, report.seeds))
    yield (
        f"medians of {len(report.prompts)} prompts x seeds {seeds}, steps without each canvas's first. "
        f"fixed: one canvas, {settings.fixed_steps} steps, no early stop. own: at most {own.max_new_tokens} tokens "
        f"and {own.max_denoising_steps} steps a canvas, sampler {own.sampler}. ar: greedy"
    )
    if report.agreement is not None:
        yield f"both sides are one model: their encoder states differ by {report.agreement:.0e} of the largest"
    if report.peer and (own.sampler, own.convention, own.temperature, own.top_k) != ("entropy_bound", "hf", 1.0, 0):
        yield "own: the peer knows only the entropy-bound sampler at temperature 1, so its runs follow another rule"
    if report.machine.load > _BUSY_LOAD:
        yield f"load average {report.machine.load:.1f} at the start: something else was running, trust ratios only"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plot(report: DecodeReport) -> str:
    """Two groups of bars as an SVG document: milliseconds per step, and tokens per second."""
    fixed = [(row, row.side, row.ms_per_step) for row in report.rows if row.kind == "fixed"]
    rates = [(row, f"{row.side}, {row.kind}", row.tokens_per_second) for row in report.rows if row.kind != "fixed"]
    groups = (
        (f"milliseconds per denoising step of {report.canvas} positions (less is better)", fixed),
        ("tokens per second, end to end, one prompt at a time (more is better)", rates),
    )
    count = len(fixed) + len(rates)
    svg = Svg(_LEFT + _BAR_WIDTH + 90, 72 + 44 * len(groups) + count * (_BAR + _GAP), _headline(report))
    svg.text(20, 30, _headline(report), size=14, more='font-weight="600"')
    svg.text(20, 48, _machine(report), "soft", 11)
    y = 76.0
    for title, bars in groups:
        svg.text(20, y, title, "soft", 12)
        y = _bars(svg, y + 12, bars) + 28
    return str(svg)


def _bars(svg: Svg, y: float, bars: Sequence[tuple[Row, str, float | None]]) -> float:
    """Draws bars from `y` down; where the last one ends."""
    longest = max((value or 0.0 for _, _, value in bars), default=0.0) or 1.0
    for row, label, value in bars:
        length = _BAR_WIDTH * (value or 0.0) / longest
        svg.text(_LEFT - 10, y + _BAR - 4, label, anchor="end")
        svg.rect(_LEFT, y, length, _BAR, "b" if row.side.startswith("transformers") else "a")
        svg.text(_LEFT + length + 6, y + _BAR - 4, _number(value))
        y += _BAR + _GAP
    return y
