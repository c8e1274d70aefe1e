"""The load table: runs of one mix beside each other, absolute and as ratios, and the file that keeps its rows.

A row is what `LoadReport.json` gives, or the same read back. Measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma.bench.load_report import TITLES, cells
from dgemma.errors import RequestError

FORMAT, VERSION = "dgemma-bench-serve-table", 1
BATCHING, ALONE = "batching", "one at a time"
_TIMES = ("first_text_p50", "first_text_p99", "canvas_p50", "canvas_p99")
_RATIOS = ("throughput", "first text p50", "p99", "canvas p50", "p99")
_TELLING = ("cpu", "usable_cores", "device", "dtype", "torch_version", "dgemma_version")
"""Facts of a machine that must be the same for two rows to be compared."""

Row = Mapping[str, Any]


def row_name(concurrency: int, kind: str) -> str:
    return f"{concurrency}, {kind}"


def table_json(rows: Mapping[str, Row]) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, "rows": dict(rows)}


def save(path: Path, rows: Mapping[str, Row]) -> None:
    """The rows so far, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(table_json(rows), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def kept(path: Path, wanted: Row) -> dict[str, Row]:
    """The rows of a former run; none without a file. `wanted` is `model`, `mix`, `machine` and `compared` of a new row.

    Rows of another kind are a `RequestError`: their ratios would mean nothing.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = dict(data["rows"]) if (data["format"], data["version"]) == (FORMAT, VERSION) else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError):
        rows = None
    if rows is None:
        raise RequestError(f"{str(path)!r} is no load table; take another --json, or leave --resume out")
    asked = json.loads(json.dumps(wanted))
    for name, row in rows.items():
        for field, value in (*(("machine", fact) for fact in _TELLING), *((field, "") for field in ("model", "mix"))):
            old, new = (found[field][value] if value else found[field] for found in (row, asked))
            if old != new:
                raise RequestError(
                    f"{str(path)!r}: the row {name!r} is of {value or field} {old!r}, this run of {new!r}; "
                    "take another --json, or leave --resume out"
                )
        if bool(row["checked"]) != asked["compared"]:
            raise RequestError(f"{str(path)!r}: the row {name!r} is with --no-check or this run is; both must be alike")
    return rows


def absolute(rows: Mapping[str, Row]) -> str:
    """A row a run, as Markdown."""
    return _markdown(["", *TITLES], [[name, *cells(row)] for name, row in rows.items()])


def ratios(rows: Mapping[str, Row]) -> str:
    """As Markdown: each number of streams with batching, over the same without, and over the fewest streams.

    Throughput above 1 is more, times above 1 are longer. Pairs that are not there yet are left out.
    """
    counts = sorted({row["concurrency"] for row in rows.values()})
    both = [count for count in counts if {row_name(count, BATCHING), row_name(count, ALONE)} <= set(rows)]
    lines = []
    for count in both:
        batched, single = rows[row_name(count, BATCHING)], rows[row_name(count, ALONE)]
        first = rows[row_name(both[0], BATCHING)]
        lost = sum(row["lost"] for row in (batched, single))
        wrong = sum(len(row["wrong"]) for row in (batched, single))
        passes = f"{batched['rows_per_forward']:.1f}"
        for label, base in (("without batching", single), (f"{both[0]} with batching", first)):
            if base is not batched:
                lines.append([str(count), label, *_over(batched, base), passes, str(lost), str(wrong)])
    return _markdown(["streams at once", "compared with", *_RATIOS, "rows a pass", "lost", "wrong"], lines)


def _over(row: Row, base: Row) -> list[str]:
    names = ("tokens_per_second", *_TIMES)
    return [f"{row[name] / base[name]:.2f} x" if base[name] else "-" for name in names]


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---", *("--:" for _ in head[1:])], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
