"""The GPU benchmark for people: tables for a terminal, one chart as SVG. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dgemma.bench.svg import Svg

_ROW, _LEFT, _WIDE = 26, 190, 420
_DONT = "a tiny model on a CPU, kernels interpreted: the numbers show that the script runs and mean nothing else"


def tables(state: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Everything that was measured, and what was not."""
    settings, parts = state["settings"], state["parts"]
    yield Text(f"{state['device']}, {settings['prompt_tokens']} tokens in, {settings['canvases']} canvases out", "bold")
    yield Text(_DONT if settings["tiny"] else "random weights of the released model's shape", "dim")
    if "ceilings" in parts:
        yield Text(_ceilings(parts["ceilings"]))
    yield ""
    yield _speed(state)
    for name in settings["formats"]:
        if f"{name}.parts" in parts:
            yield ""
            yield _step(name, parts[f"{name}.parts"])
    for part, reason in state["failed"].items():
        yield Text(f"failed: {part}: {reason}", "red")
    if state["left"]:
        yield Text(f"no time left for: {', '.join(state['left'])}; run the same command again", "yellow")


def _ceilings(found: Mapping[str, Any]) -> str:
    rates = ", ".join(
        f"{kind} {found[kind]['flops_per_second'] / 1e12:.3g} TFLOP/s"
        for kind in ("bf16", "fp8")
        if "missing" not in found[kind]
    )
    return f"copy {found['copy']['bytes_per_second'] / 1e9:,.3g} GB/s, products {rates}"


def speeds(state: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Format, what, and the part, of everything that has tokens a second."""
    settings, found = state["settings"], []
    for name in settings["formats"]:
        labels = {f"steps{steps}": f"{steps} steps" for steps in sorted(settings["steps"])}
        labels |= {f"unrecorded{steps}": f"{steps} steps, unrecorded" for steps in settings["steps"]}
        for part, label in {**labels, "ar": "autoregressive", "transformers": "transformers"}.items():
            if f"{name}.{part}" in state["parts"]:
                found.append((name, label, state["parts"][f"{name}.{part}"]))
    return found


def _speed(state: Mapping[str, Any]) -> Table:
    table = _table("weights", "run", "tok/s", "least - most", "ms a step", "% of roofline", "error", "experts hit")
    for name, label, part in speeds(state):
        rate, parts = part["tokens_per_second"], state["parts"]
        error = parts.get(f"{name}.error", {}).get("relative error, signal step")
        hits = parts.get(f"{name}.work", {}).get("experts hit, least by layer")
        step, share = part.get("ms_per_step"), part.get("share of roofline")
        table.add_row(
            name, label, f"{rate['median']:,.1f}", f"{rate['least']:,.1f} - {rate['most']:,.1f}",
            "" if step is None else f"{step:.2f}", "" if share is None else f"{100 * share:.1f}",
            "" if error is None or label == "transformers" else f"{error:.2g}",
            f"{min(hits)}" if hits and label.endswith("steps") else "",
        )  # fmt: skip
    return table


def _step(name: str, found: Mapping[str, Any]) -> Table:
    table = _table(f"{name}: a step", "ms, waited for", "roofline ms", "GB", "TFLOP")
    roof = found["roofline of a step"]
    for part, ms in found["denoise"]["parts"].items():
        least = roof.get(part)
        numbers = ["", "", ""] if least is None else [f"{least[key]:.3g}" for key in ("ms", "gigabytes", "tflops")]
        table.add_row(part, f"{ms:.2f}", *numbers)
    sums = [f"{sum(part[key] for part in roof.values()):.3g}" for key in ("ms", "gigabytes", "tflops")]
    table.add_row("all", f"{found['denoise']['ms']:.2f}", *sums)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for count, column in enumerate(columns):
        table.add_column(column, justify="right" if count else "left")
    return table


def chart(state: Mapping[str, Any]) -> str:
    """Tokens a second of every run as bars, with its roofline as a line behind."""
    bars = speeds(state)
    title = f"Tokens per second, {state['device']}"
    svg = Svg(_LEFT + _WIDE + 110, 90 + _ROW * max(len(bars), 1), title)
    svg.text(20, 30, title, size=14, more='font-weight="600"')
    settings = state["settings"]
    below = f"{settings['prompt_tokens']} tokens in, {settings['canvases']} canvases out, wall clock without the prompt"
    svg.text(20, 50, _DONT if settings["tiny"] else below, "soft", 11)
    tops = [max(part["tokens_per_second"]["most"], part.get("roofline_tokens_per_second", 0.0)) for *_, part in bars]
    top = max(tops, default=1.0)
    for count, (name, label, part) in enumerate(bars):
        y, rate = 68 + _ROW * count, part["tokens_per_second"]
        svg.text(_LEFT - 10, y + 13, f"{name}, {label}", size=12, anchor="end")
        roof = part.get("roofline_tokens_per_second")
        if roof:
            svg.rect(_LEFT, y + 2, _WIDE * roof / top, 16, "box")
        svg.rect(_LEFT, y + 5, _WIDE * rate["median"] / top, 10, "b" if label == "transformers" else "a")
        for end in ("least", "most"):
            x = _LEFT + _WIDE * rate[end] / top
            svg.line(x, y + 2, x, y + 18)
        share = f" ({100 * part['share of roofline']:.0f} %)" if roof else ""
        svg.text(
            _LEFT + _WIDE * max(rate["most"], roof or 0) / top + 6, y + 14, f"{rate['median']:,.0f}{share}", size=11
        )
    if not bars:
        svg.text(20, 80, "nothing measured yet", "soft", 12)
    return str(svg)
