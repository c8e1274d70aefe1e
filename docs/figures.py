"""Draws the pictures of the documentation as SVG.

    python docs/figures.py architecture                          # docs/figures/architecture.svg
    python docs/figures.py canvas TRACE.jsonl docs/figures/canvas.svg

The first is drawn from the rank table in tests/test_layering.py, the second from a trace that
`dgemma generate --trace TRACE.jsonl` has recorded. Both are the same bytes for the same input.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from dgemma.bench.svg import MONO, Svg  # noqa: E402
from dgemma.events import Draft  # noqa: E402
from dgemma.trace import TraceReader  # noqa: E402
from dgemma.view import HEAT_COLOURS, HEAT_NATS, Cell, cells, heat  # noqa: E402

ARCHITECTURE = REPO / "docs" / "figures" / "architecture.svg"

PURPOSE = {
    "cli": "arguments to one call",
    "server": "HTTP and the web page",
    "eval": "how good it is",
    "bench": "how fast, beside a peer",
    "notebook": "live view in Jupyter",
    "api": "LLM: text in, text out",
    "train": "data, objective, loop",
    "engine": "requests, batches, passes",
    "checkpoint": "folders and names",
    "control": "pins, bans, grammars",
    "quant": "weight formats",
    "model": "the network, two passes",
    "diffusion": "noise, samplers, stop",
    "cache": "keys and values",
    "view": "what a live view shows",
    "kernels": "ops, one table",
    "text": "tokenizer and template",
    "settings": "flags, variables, file",
    "trace": "recorded requests",
    "config": "model and request",
    "events": "Draft, Committed, Finished",
    "errors": "one exception tree",
}
BOX_W, BOX_H, GAP, LEFT, TOP = 186, 44, 12, 64, 56


def ranks() -> dict[str, int]:
    """The rank table, read without running the test."""
    tree = ast.parse((REPO / "tests" / "test_layering.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["RANKS"]:
            return dict(ast.literal_eval(node.value))
    raise SystemExit("tests/test_layering.py has no RANKS")


def built(room: str) -> bool:
    """Whether a room has any code yet."""
    folder = REPO / "dgemma" / room
    files = [folder.with_suffix(".py"), *(folder.rglob("*.py") if folder.is_dir() else ())]
    return any(path.is_file() and path.stat().st_size for path in files)


def architecture() -> str:
    """One row a rank, the highest on top; rooms without code are dashed."""
    table = ranks()
    levels = sorted(set(table.values()), reverse=True)
    most = max(list(table.values()).count(rank) for rank in levels)
    width = LEFT + most * (BOX_W + GAP) + 8
    bottom = TOP + len(levels) * (BOX_H + GAP)
    svg = Svg(width, bottom + 26, "The rooms of dgemma and who may import whom")
    svg.text(20, 32, "A room imports only rooms below its own line", size=15, more='font-weight="600"')
    arrow = '<path class="soft" d="M{x} {y} l-5 -9 h10 z"/>'
    svg.line(20, TOP + 4, 20, bottom - 14)
    svg.raw(arrow.format(x=20, y=bottom - 8))
    for row, rank in enumerate(levels):
        y = TOP + row * (BOX_H + GAP)
        svg.text(LEFT - 14, y + BOX_H / 2 + 4, str(rank).replace("-", "\u2212"), "soft", 12, "end")
        rooms = [room for room, at in table.items() if at == rank]
        for column, room in enumerate(rooms):
            x = LEFT + column * (BOX_W + GAP)
            ink = "ink" if built(room) else "soft"
            dash = "" if built(room) else ' stroke-dasharray="4 3" fill-opacity="0"'
            svg.rect(x, y, BOX_W, BOX_H, "box stroke", 6, f'stroke-width="1"{dash}')
            svg.text(x + 12, y + 19, room, ink, 13, more='font-weight="600"')
            svg.text(x + 12, y + 35, PURPOSE.get(room, ""), "soft", 11)
    note = (
        "dashed: no code yet" if not all(built(room) for room in table) else "rooms on one line do not know each other"
    )
    svg.text(width - 20, 32, note, "soft", 11, "end")
    return str(svg)


MAP_LEFT, MAP_WIDTH, RIGHT = 60, 768, 132
STEP_HEIGHTS, TEXT_CHARS = (7.0, 18.0), 118


def canvas(trace: Path, number: int = 0) -> str:
    """A canvas condensing: entropy of every position at every step, and the text at some of the steps."""
    reader = TraceReader.open(trace)
    events = [moment.event for moment in reader]
    drafts = [event for event in events if isinstance(event, Draft) and event.canvas == number]
    if not drafts:
        raise SystemExit(f"{trace} has no denoising steps of canvas {number}")
    grid = [cells(draft, reader.piece, reader.header.blank) for draft in drafts]
    width, cell_w = len(grid[0]), MAP_WIDTH / len(grid[0])
    cell_h = min(STEP_HEIGHTS[1], max(STEP_HEIGHTS[0], 420 / len(grid)))
    bottom = 88 + cell_h * len(grid)
    shown = sorted({0, len(grid) // 4, len(grid) // 2, len(grid) - 1})
    height = bottom + 62 + 36 * len(shown) + 16
    svg = Svg(MAP_LEFT + MAP_WIDTH + RIGHT, height, f"A canvas of {width} positions condensing in {len(grid)} steps")
    heading = f"{len(grid)} denoising steps of a canvas of {width}, model {reader.header.model}"
    svg.text(20, 30, heading, size=15, more='font-weight="600"')
    svg.text(20, 50, f"prompt: {_clipped(reader.header.prompt, 90)}", "soft", 12)
    svg.text(MAP_LEFT, 80, "position in the canvas", "soft", 11)
    svg.text(MAP_LEFT + MAP_WIDTH + 62, 80, "mean nats", "soft", 11, "end")
    svg.text(MAP_LEFT + MAP_WIDTH + 120, 80, "accepted", "soft", 11, "end")
    _heat_map(svg, grid, cell_w, cell_h, 88)
    every = max(1, round(12 / cell_h))
    for row, draft in enumerate(drafts):
        if row % every and row != len(drafts) - 1:
            continue
        y = 88 + cell_h * (row + 0.5) + 4
        entropy = sum(draft.entropy) / width
        svg.text(MAP_LEFT - 8, y, f"{draft.step}", "soft", 10, "end")
        svg.text(MAP_LEFT + MAP_WIDTH + 62, y, f"{entropy:.3f}", "soft", 10, "end")
        svg.text(MAP_LEFT + MAP_WIDTH + 120, y, f"{sum(draft.accepted)}", "soft", 10, "end")
    _legend(svg, bottom + 22)
    y = bottom + 62.0
    for row in shown:
        svg.text(20, y, f"prediction at step {drafts[row].step}", "soft", 11)
        _words(svg, grid[row], y + 17)
        y += 36
    return str(svg)


def _heat_map(svg: Svg, grid: Sequence[Sequence[Cell]], cell_w: float, cell_h: float, top: float) -> None:
    """One path a heat, and one for the dots of accepted positions on hot and on cold ground."""
    places: dict[int, list[str]] = {}
    dots: dict[bool, list[str]] = {True: [], False: []}
    size = max(1.2, min(cell_w, cell_h) / 3.5)
    for row, line in enumerate(grid):
        x, y = float(MAP_LEFT), top + row * cell_h
        for level, run in itertools.groupby(cell.heat for cell in line):
            length = cell_w * len(list(run))
            places.setdefault(level, []).append(f"M{x:.1f} {y:.1f}h{length:.2f}v{cell_h:.2f}h-{length:.2f}z")
            x += length
        for column, cell in enumerate(line):
            if cell.accepted:
                left, up = MAP_LEFT + (column + 0.5) * cell_w - size / 2, y + (cell_h - size) / 2
                dots[cell.heat > 0].append(f"M{left:.1f} {up:.1f}h{size:.1f}v{size:.1f}h-{size:.1f}z")
    for level, parts in sorted(places.items()):
        svg.raw(f'<path {_fill(level)} shape-rendering="crispEdges" d="{"".join(parts)}"/>')
    for hot, parts in dots.items():
        if parts:
            svg.raw(f'<path class="{"card" if hot else "soft"}" d="{"".join(parts)}"/>')


def _fill(level: int) -> str:
    return f'fill="{HEAT_COLOURS[level - 1]}"' if level else 'class="line"'


def _legend(svg: Svg, y: float) -> None:
    svg.text(MAP_LEFT, y, "entropy of a position, nats:", "soft", 11)
    x = MAP_LEFT + 158.0
    for level in range(len(HEAT_NATS) + 1):
        low = 0.0 if level == 0 else HEAT_NATS[level - 1]
        assert heat(low) == level
        svg.raw(f'<rect {_fill(level)} x="{x:.0f}" y="{y - 10:.0f}" width="14" height="12"/>')
        svg.text(x + 18, y, f"{low:g}+", "soft", 11)
        x += 58
    svg.text(x + 4, y, "dot: accepted in that step", "soft", 11)


def _words(svg: Svg, line: Sequence[Cell], y: float) -> None:
    """Pieces in a row, coloured as a live view colours them, cut at the edge."""
    spans, room = [], TEXT_CHARS
    for cell in line:
        text = cell.text[:room]
        room -= len(text)
        colour = 'class="ink"' if not cell.heat else f'fill="{HEAT_COLOURS[cell.heat - 1]}"'
        spans.append(f"<tspan {colour}>{escape(text, quote=False)}</tspan>")
        if room <= 0:
            break
    style = (
        f'font-family="{MONO}" font-size="12" xml:space="preserve" style="font-family:{escape(MONO)};white-space:pre"'
    )
    svg.raw(f'<text x="20" y="{y:.0f}" {style}>{"".join(spans)}</text>')


def _clipped(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = parser.add_subparsers(dest="figure", required=True)
    figures.add_parser("architecture")
    condensing = figures.add_parser("canvas")
    condensing.add_argument("trace", type=Path)
    condensing.add_argument("out", type=Path)
    condensing.add_argument("--canvas", type=int, default=0, help="which canvas of the answer (0)")
    arguments = parser.parse_args(argv)
    if arguments.figure == "architecture":
        out, text = ARCHITECTURE, architecture()
    else:
        out, text = arguments.out, canvas(arguments.trace, arguments.canvas)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text.encode()):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
