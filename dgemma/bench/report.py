"""Decode reports for people: tables for a terminal, a bar chart as SVG. Knows the reports, measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dgemma.bench.floor import Floor
from dgemma.bench.machine import Machine
from dgemma.bench.results import DecodeReport
from dgemma.bench.svg import Svg

_BUSY_LOAD = 0.5
_IMPOSSIBLE = 1.1  # share of a floor that noise cannot explain
_HUES = {"dgemma": "a", "floor": "c"}
_BAR_WIDTH, _LEFT, _BAR, _GAP = 360, 190, 16, 8


def tables(report: DecodeReport) -> Iterator[RenderableType]:
    """What a terminal shows, in order."""
    yield Text(_headline(report), "bold")
    yield Text(_machine(report), "dim")
    yield ""
    yield _rows(report)
    yield ""
    if report.ratios:
        yield _ratios(report)
        yield ""
    for note in _notes(report):
        yield Text(note, "dim")


def overview(reports: Sequence[DecodeReport]) -> Iterator[RenderableType]:
    """The fixed runs of several reports side by side; nothing for a single one."""
    if len(reports) < 2:
        return
    peers = list(dict.fromkeys(r.side for report in reports for r in report.rows if r.side != "dgemma"))
    table = _table("dtype", "threads")
    for title in ("ms/step", "floor ms", "% of floor", *(f"x {peer}" for peer in peers)):
        table.add_column(title, justify="right")
    for report in reports:
        row = report.row("dgemma", "fixed")
        if row is None:
            continue
        ratios = {ratio.slow: ratio.value for ratio in report.ratios if ratio.name == "denoising step"}
        table.add_row(
            report.machine.dtype,
            str(report.machine.threads),
            number(row.ms_per_step),
            number(None if report.floor is None else report.floor.ms),
            _percent(report.share(row)),
            *(number(ratios.get(f"{peer}, fixed")) for peer in peers),
        )
    yield Text("denoising steps of the fixed run", "bold")
    yield table


def floor_table(floor: Floor) -> Table:
    """Every op of a floor."""
    table = _table("part", "op", "shape")
    for title in ("times", "GFLOP", "MB", "GFLOP/s", "ms"):
        table.add_column(title, justify="right")
    table.add_column("best by")
    for line in floor.lines:
        table.add_row(
            line.part, line.name, line.shape, str(line.count), number(line.gflops), number(line.megabytes),
            number(line.gflops_per_second), number(line.ms), line.by,
        )  # fmt: skip
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _headline(report: DecodeReport) -> str:
    peer = f" beside {report.peer}" if report.peer else ""
    return f"{report.model} ({report.parameters:,} parameters), canvas {report.canvas}{peer}"


def _machine(report: DecodeReport) -> str:
    return machine_line(report.machine)


def machine_line(machine: Machine) -> str:
    """The machine in a line."""
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, {machine.device}, {machine.dtype}, "
        f"torch {machine.torch_version}"
    )


def _rows(report: DecodeReport) -> Table:
    table = _table("", "run")
    for title in ("tok/s", "ms/step", "% of floor", "ms prompt", "tok/forward", "steps/canvas", "extra MB"):
        table.add_column(title, justify="right")
    for row in report.rows:
        table.add_row(
            row.side,
            row.kind,
            number(row.tokens_per_second),
            number(row.ms_per_step),
            _percent(report.share(row)),
            number(row.ms_per_prompt),
            number(row.tokens_per_forward),
            number(row.steps_per_canvas),
            number(row.extra_mb),
        )
    return table


def _ratios(report: DecodeReport) -> Table:
    table = _table("times as fast")
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
    for side, facts in report.peer_settings.items():
        yield f"{side}: " + ", ".join(f"{name} {value}" for name, value in facts.items())
    if "transformers (medium, tuned)" in report.peer_settings:
        yield "the tuned allocator is a process's environment, so that side takes its turns in a process of its own"
    if report.floor is not None:
        floor = report.floor
        parts = ", ".join(f"{part} {number(ms)}" for part, ms in floor.parts.items() if ms)
        yield (
            f"floor of a step of the fixed run behind {floor.prefix} tokens: {number(floor.ms)} ms ({parts}); "
            f"memory {floor.bandwidth:.1f} GB/s"
        )
        ours = report.row("dgemma", "fixed")
        if ours and (report.share(ours) or 0) > _IMPOSSIBLE:
            yield "the floor lies above our own steps: something disturbed its measurement, the share means nothing"
    if report.agreement is not None:
        yield f"both sides are one model: their encoder states differ by {report.agreement:.0e} of the largest"
    if (
        report.peer
        and "own" in settings.kinds
        and (own.sampler, own.convention, own.temperature, own.top_k) != ("entropy_bound", "hf", 1.0, 0)
    ):
        yield "own: the peer knows only the entropy-bound sampler at temperature 1, so its runs follow another rule"
    if report.machine.load > _BUSY_LOAD:
        yield f"load average {report.machine.load:.1f} at the start: something else was running, trust ratios only"


def number(value: float | None) -> str:
    """Three digits or so."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plot(*reports: DecodeReport) -> str:
    """Groups of bars as an SVG document: milliseconds per step, and tokens per second, of each report."""
    groups = [group for report in reports for group in _groups(report, len(reports) > 1) if group[1]]
    count = sum(len(bars) for _, bars in groups)
    title = _headline(reports[0])
    svg = Svg(_LEFT + _BAR_WIDTH + 90, 72 + 44 * len(groups) + count * (_BAR + _GAP), title)
    svg.text(20, 30, title, size=14, more='font-weight="600"')
    svg.text(20, 48, _machine(reports[0]), "soft", 11)
    y = 76.0
    for title, bars in groups:
        svg.text(20, y, title, "soft", 12)
        y = _bars(svg, y + 12, bars) + 28
    return str(svg)


def _groups(report: DecodeReport, several: bool) -> list[tuple[str, list[tuple[str, str, float | None]]]]:
    """Titles and bars: side, label, value."""
    which = f", {report.machine.dtype}, {report.machine.threads} threads" if several else ""
    fixed: list[tuple[str, str, float | None]]
    fixed = [(row.side, row.side, row.ms_per_step) for row in report.rows if row.kind == "fixed"]
    if report.floor is not None:
        fixed.append(("floor", "floor", report.floor.ms))
    rates: list[tuple[str, str, float | None]]
    rates = [(row.side, f"{row.side}, {row.kind}", row.tokens_per_second) for row in report.rows if row.kind != "fixed"]
    return [
        (f"milliseconds per denoising step of {report.canvas} positions (less is better){which}", fixed),
        (f"tokens per second, end to end, one prompt at a time (more is better){which}", rates),
    ]


def _bars(svg: Svg, y: float, bars: Sequence[tuple[str, str, float | None]]) -> float:
    """Draws bars from `y` down; where the last one ends."""
    longest = max((value or 0.0 for _, _, value in bars), default=0.0) or 1.0
    for side, label, value in bars:
        length = _BAR_WIDTH * (value or 0.0) / longest
        svg.text(_LEFT - 10, y + _BAR - 4, label, anchor="end")
        svg.rect(_LEFT, y, length, _BAR, _HUES.get(side, "b"))
        svg.text(_LEFT + length + 6, y + _BAR - 4, number(value))
        y += _BAR + _GAP
    return y
