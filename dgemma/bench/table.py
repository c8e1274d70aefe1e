"""The whole speed table with one command: every cell is a `dgemma bench` call in a process of its own.

A finished cell is a file in the work folder, and is not measured again: what was interrupted goes on where it was.
Knows commands and files, no tensors.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgemma.errors import DgemmaError, RequestError

FORMAT, VERSION = "dgemma-bench-table", 1
CHECKPOINTS = ("default", "dense640", "moe262k")
FORMATS = ("float32", "bfloat16", "int8dyn")
EXTRAS = ("memory", "modes", "batch", "start")
_TARGETS: Mapping[tuple[str, str], float] = {
    ("default", "float32"): 4.0, ("default", "bfloat16"): 4.0, ("default", "int8dyn"): 5.0,
    ("dense640", "float32"): 3.0, ("dense640", "bfloat16"): 3.2, ("dense640", "int8dyn"): 4.5,
    ("moe262k", "float32"): 6.5, ("moe262k", "bfloat16"): 8.0, ("moe262k", "int8dyn"): 9.0,
}  # fmt: skip
_SHARES: Mapping[str, float] = {"default": 0.70, "dense640": 0.80, "moe262k": 0.85}


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """What to measure. Cells already in the work folder with the same settings stay."""

    checkpoints: tuple[str, ...] = CHECKPOINTS
    formats: tuple[str, ...] = FORMATS
    threads: tuple[int, ...] = (1, 2)
    extras: tuple[str, ...] = EXTRAS
    canvas: int = 256
    prompt_tokens: int = 128
    fixed_steps: int = 6
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, allowed in (("formats", FORMATS), ("extras", EXTRAS)):
            for value in getattr(self, name):
                if value not in allowed:
                    raise RequestError(f"{name} must be some of {', '.join(allowed)}; got {value}")
        names = [label(checkpoint) for checkpoint in self.checkpoints]
        if not names or len(set(names)) < len(names):
            raise RequestError(f"checkpoints must have names of their own, got {', '.join(names) or 'none'}")


@dataclass(frozen=True)
class Cell:
    """One measurement: its file's name, and the arguments of `dgemma` that write it after `--json FILE`."""

    name: str
    arguments: tuple[str, ...]


class TableRun:
    """A table in the making, in a folder: `checkpoints/` and `cells/`."""

    def __init__(self, folder: Path, settings: TableSettings, say: Callable[[str], object]) -> None:
        self.settings, self._say = settings, say
        self._folder, self._cells = folder, folder / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)

    def cells(self) -> Iterator[Cell]:
        """In the order in which they are measured: cheap ones first."""
        s = self.settings
        common = ("--prompt-tokens", str(s.prompt_tokens), "--canvas-length", str(s.canvas))
        for name in s.checkpoints:
            for kind in s.formats:
                fixed: tuple[str, ...] = (
                    "bench", "decode", "--kinds", "fixed", "--prompts", "1", "--repeats", str(s.repeats),
                    "--fixed-steps", str(s.fixed_steps), "--tuned", *common,
                )  # fmt: skip
                if kind == "int8dyn":
                    model = self.quantised(name)
                    fixed += ("--model", model, "--peer-model", self.model(name), "--dtype", "bfloat16", "--no-floor")
                else:
                    fixed += ("--model", self.model(name), "--dtype", kind)
                for threads in s.threads:
                    yield Cell(f"decode-{label(name)}-{kind}-{threads}", (*fixed, "--threads", str(threads)))
        yield from self._extras(s.checkpoints[0], s.checkpoints[-1], common)

    def _extras(self, first: str, last: str, common: tuple[str, ...]) -> Iterator[Cell]:
        s = self.settings
        for threads in (str(count) for count in s.threads):
            if "modes" in s.extras:
                modes = (
                    "bench", "decode", "--kinds", "own,ar", "--no-peer", "--model", self.model(first), "--dtype",
                    "float32", "--threads", threads, "--max-new-tokens", str(s.canvas), *common,
                )  # fmt: skip
                yield Cell(f"modes-{label(first)}-{threads}", modes)
            if "batch" in s.extras:
                batch = (
                    "bench", "scaling", "--sweeps", "batch,narrow,answer", "--model", self.model(first), "--dtype",
                    "float32", "--threads", threads, *common,
                )  # fmt: skip
                yield Cell(f"batch-{label(first)}-{threads}", batch)
        threads = str(s.threads[-1])
        if "memory" in s.extras:
            for kind in (kind for kind in s.formats if kind != "float32"):
                quantised = kind == "int8dyn"
                own = self.quantised(last) if quantised else self.model(last)
                other = ("--no-peer",) if quantised else ("--tuned",)
                memory = (
                    "bench", "memory", "--model", own, "--dtype", "bfloat16", "--threads", threads, *other, *common,
                )  # fmt: skip
                yield Cell(f"memory-{label(last)}-{kind}", memory)
        if "start" in s.extras:
            yield Cell(f"start-{label(first)}", ("bench", "start", "--model", self.model(first), "--threads", threads))

    def run(self) -> dict[str, Any]:
        """Measure what is missing; the table as JSON. A cell that fails is told, and the others go on."""
        plan, failed = list(self.cells()), dict[str, str]()
        begun = time.monotonic()
        for count, cell in enumerate(plan, start=1):
            place = f"[{count}/{len(plan)}] {cell.name}"
            if self._read(cell) is not None:
                self._say(f"{place}: there already")
                continue
            self._say(f"{place}: measuring, {time.monotonic() - begun:.0f} s so far")
            try:
                self._measure(cell)
            except DgemmaError as error:
                failed[cell.name] = str(error)
                self._say(f"{place}: failed: {error}")
        found = {cell.name: self._read(cell) for cell in plan}
        table = {
            "format": FORMAT,
            "version": VERSION,
            "settings": asdict(self.settings),
            "failed": failed,
            "rows": list(rows(self.settings, found)),
            "extras": {name: data for name, data in found.items() if data and not name.startswith("decode-")},
        }
        (self._folder / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        (self._folder / "table.md").write_text(markdown(table), encoding="utf-8")
        return table

    def model(self, name: str) -> str:
        """What `--model` takes: the shipped name or a folder of one's own as it is, else the folder it is made in."""
        return name if name == "default" or Path(name).is_dir() else str(self._made(name))

    def quantised(self, name: str) -> str:
        return str(self._made(f"{label(name)}-int8dyn"))

    def _made(self, name: str) -> Path:
        return self._folder / "checkpoints" / name

    def _prepare(self, name: str) -> None:
        """Make the checkpoints that an argument names and that are not there yet."""
        folder = Path(name)
        if folder.parent != self._folder / "checkpoints" or (folder / "config.json").exists():
            return
        base = folder.name.removesuffix("-int8dyn")
        if base == folder.name:
            self._say(f"making {base}")
            self._command(("bench", "make", base, str(folder)))
            return
        source = next((c for c in self.settings.checkpoints if label(c) == base), base)
        self._prepare(self.model(source))
        self._say(f"quantising {base}")
        self._command(("quantize", self.model(source), str(folder), "--format", "int8dyn", "--head"))

    def _measure(self, cell: Cell) -> None:
        for argument in cell.arguments:
            self._prepare(argument)
        part = self._cells / f"{cell.name}.part"
        self._command((*cell.arguments, "--json", str(part)))
        data = {"arguments": list(cell.arguments), "result": json.loads(part.read_text(encoding="utf-8"))}
        part.write_text(json.dumps(data) + "\n", encoding="utf-8")
        part.replace(self._cells / f"{cell.name}.json")

    def _command(self, arguments: Sequence[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "dgemma", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            told = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
            raise DgemmaError(told[-1].removeprefix("dgemma: error: "))

    def _read(self, cell: Cell) -> Any:
        """The result of a cell, if it was measured with these very arguments."""
        try:
            data = json.loads((self._cells / f"{cell.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data.get("result") if data.get("arguments") == list(cell.arguments) else None


def label(checkpoint: str) -> str:
    """A checkpoint's name in files and rows: of a folder, the last part."""
    return Path(checkpoint).name


def rows(settings: TableSettings, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each cell of the fixed runs; None where it was not measured."""
    for name in settings.checkpoints:
        for kind in settings.formats:
            for threads in settings.threads:
                data = found.get(f"decode-{label(name)}-{kind}-{threads}")
                report = data["reports"][0] if data else None
                yield {
                    "checkpoint": label(name),
                    "format": kind,
                    "threads": threads,
                    "target": _TARGETS.get((name, kind)),
                    "target_share": _SHARES.get(name) if kind != "int8dyn" else None,
                    **_facts(report),
                }


def _facts(report: Mapping[str, Any] | None) -> dict[str, Any]:
    empty = dict.fromkeys(("ms_per_step", "floor_ms", "share", "ratio", "ratio_tuned", "agreement", "load"))
    if report is None:
        return empty
    row = next(row for row in report["rows"] if (row["side"], row["kind"]) == ("dgemma", "fixed"))
    steps = {ratio["slow"]: ratio["value"] for ratio in report["ratios"] if ratio["name"] == "denoising step"}
    return {
        "ms_per_step": row["ms_per_step"],
        "floor_ms": report["floor"] and report["floor"]["ms"],
        "share": row["share_of_floor"],
        "ratio": steps.get("transformers, fixed"),
        "ratio_tuned": steps.get("transformers (medium, tuned), fixed"),
        "agreement": report["agreement"],
        "load": report["machine"]["load"],
    }


def markdown(table: Mapping[str, Any]) -> str:
    """The rows as a table for a page, and a line for each other measurement."""
    lines = [
        "| checkpoint | format | threads | ms/step | floor ms | share of floor | x transformers | x medium, tuned |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in table["rows"]:
        share = _against(row["share"], row["target_share"], percent=True)
        ratio = _against(row["ratio"], row["target"])
        values = (
            row["checkpoint"], row["format"], str(row["threads"]), _number(row["ms_per_step"]),
            _number(row["floor_ms"]), share, ratio, _number(row["ratio_tuned"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(values)} |")
    more = [f"* {cell}: {text}" for cell, data in table["extras"].items() for text in _said(data)]
    return "\n".join([*lines, *([""] if more else []), *more]) + "\n"


def _said(data: Mapping[str, Any]) -> Iterator[str]:
    """What a measurement beside the rows found, beside its target."""
    kind = data.get("format", "")
    if kind == "dgemma-bench-memory":
        for side in data["sides"]:
            within = "within" if side["within_allowed"] else "not within"
            yield (
                f"{side['side']} takes {_number(side['extra'])} MB a canvas (ours: <= 64), peak "
                f"{_number(side['peak'])} MB, {within} 1.15 x file + 64 MB + imports = {_number(side['allowed'])} MB"
            )
    elif kind == "dgemma-bench-scaling":
        points = {(point["sweep"], point["value"]): point for point in data["points"]}
        for sweep, target in (("batch", 0.95), ("narrow", 2.0)):
            count = max((value for name, value in points if name == sweep), default=0)
            if count > 1:
                gain = _number(points[sweep, count]["relative"])
                yield f"{sweep} of {count}: {gain} x the tokens per second of one canvas (>= {target})"
        answers = sorted(value for name, value in points if name == "answer")
        if len(answers) > 1:
            short, full = (points["answer", value]["seconds"] for value in (answers[0], answers[-1]))
            yield f"an answer of {answers[0]} tokens takes {short / full:.2f} of one of {answers[-1]} (<= 0.25)"
    elif kind == "dgemma-bench-start":
        yield f"first draft {data['first_draft']:.2f} s after the start of the process (<= 3)"
    elif kind == "dgemma-bench-decode":
        for ratio in data["reports"][0]["ratios"]:
            yield f"{ratio['name']}: {_number(ratio['value'])} x ({ratio['fast']} against {ratio['slow']})"


def _against(value: float | None, target: float | None, percent: bool = False) -> str:
    """A value beside its target."""
    show: Callable[[float | None], str] = _percent if percent else _number
    return show(value) if value is None or target is None else f"{show(value)} (>= {show(target)})"


def _percent(value: float | None) -> str:
    return "not measured yet" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None) -> str:
    return "not measured yet" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
