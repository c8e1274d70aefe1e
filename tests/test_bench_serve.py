"""The command `dgemma bench serve`, and the process of the server that it starts."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from rich.console import Console
from server_kit import PATIENCE_S

from dgemma.bench import serve, server_process
from dgemma.bench.load_client import Outcome
from dgemma.bench.load_mix import Expected, MixSettings
from dgemma.bench.load_report import drifts, load_plot, load_tables
from dgemma.bench.load_table import absolute, ratios
from dgemma.bench.machine import Machine
from dgemma.bench.serve import Growth, LoadReport, Sample, Wrong
from dgemma.bench.server_process import ServerProcess
from dgemma.cli import bench_serve
from dgemma.cli.arguments import Parser
from dgemma.errors import DgemmaError, RequestError

REPO = Path(__file__).resolve().parent.parent


def arguments(*words: str) -> argparse.Namespace:
    parser = Parser(prog="serve")
    bench_serve.add_arguments(parser)
    return parser.parse_args(words)


def outcome(number: int, **changes: Any) -> Outcome:
    values: dict[str, Any] = {"end": "whole", "begun": 0.1 * number, "first_text_s": 0.5, "seconds": 1.0, "text": "a"}
    return Outcome(number, **(values | changes))


def sample(at: float, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "resident_mb": 500.0, "waiting": 0, "running": 0, "kv_reserved_mb": 0.0, "prefix_tokens": 0,
        "denoise_rows": int(100 * at), "denoise_passes": int(20 * at), "committed_tokens": int(30 * at),
    }  # fmt: skip
    return Sample(at=at, **(values | changes))


def report(llm: Any, **changes: Any) -> LoadReport:
    values: dict[str, Any] = {
        "model": "tiny", "machine": Machine.of(llm.device, llm.dtype), "mix": MixSettings(requests=16),
        "concurrency": 4, "whole": 15, "left": 1, "lost": 0, "checked": 16, "wrong": (), "refusals": 0, "faults": (),
        "seconds": 10.0, "requests_per_second": 1.6, "tokens_per_second": 30.0, "rows_per_forward": 5.0,
        "first_text_p50": 0.5, "first_text_p99": 0.6, "canvas_p50": 0.2, "canvas_p99": 0.3,
        "samples": tuple(sample(at) for at in range(11)), "outcomes": tuple(outcome(n) for n in range(16)),
    }  # fmt: skip
    return LoadReport(**(values | changes))


def text_of(parts: Iterator[Any]) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    for part in parts:
        console.print(part)
    return console.export_text()


def test_a_report_shows_what_went_wrong(llm: Any) -> None:
    wrong = Wrong(number=3, got=outcome(3, text="bad one"), expected=Expected("good one", "stop"))
    text = text_of(load_tables(report(llm, lost=1, wrong=(wrong,), faults=("request 7: the stream broke off",))))
    assert "lost 1" in text and "request 7: the stream broke off" in text
    assert "'bad one'" in text and "'good one'" in text


def test_the_table_has_a_row_a_run_in_milliseconds(llm: Any) -> None:
    runs = {"1, batching": report(llm), "8, batching": report(llm, concurrency=8, lost=2)}
    lines = absolute({name: run.json() for name, run in runs.items()}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    first, second = dict(zip(cells[0], cells[2], strict=True)), dict(zip(cells[0], cells[3], strict=True))
    assert (first["at once"], second["at once"], second["lost"]) == ("4", "8", "2")
    assert (first["first text p50 ms"], first["canvas p50 ms"], first["rows/pass"]) == ("500", "200", "5.0")


def test_a_run_that_was_not_compared_claims_nothing(llm: Any) -> None:
    cells = absolute({"x": report(llm, checked=0).json()}).splitlines()[2].split("|")
    assert cells[4].strip() == "-"


def test_ratios_are_over_the_same_without_batching_and_over_the_fewest_streams(llm: Any) -> None:
    def run(concurrency: int, **changes: float) -> dict[str, Any]:
        return report(llm, concurrency=concurrency, **changes).json()

    rows = {
        "1, batching": run(1), "1, one at a time": run(1),
        "8, batching": run(8, tokens_per_second=90.0, first_text_p50=1.0, canvas_p99=0.9, rows_per_forward=6.5),
        "8, one at a time": run(8, tokens_per_second=30.0, first_text_p50=4.0, canvas_p99=0.6, lost=1),
        "64, batching": run(64),
    }  # fmt: skip
    lines = ratios(rows).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert table == [
        ["1", "without batching", "1.00 x", "1.00 x", "1.00 x", "1.00 x", "1.00 x", "5.0", "0", "0"],
        ["8", "without batching", "3.00 x", "0.25 x", "1.00 x", "1.00 x", "1.50 x", "6.5", "1", "0"],
        ["8", "1 with batching", "3.00 x", "2.00 x", "1.00 x", "1.00 x", "3.00 x", "6.5", "1", "0"],
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_drift_compares_the_second_quarter_with_the_last(llm: Any) -> None:
    slower = report(llm, outcomes=tuple(outcome(n, seconds=1.0 + n) for n in range(16)))
    found = {name: drift for name, drift, _ in drifts(slower)}
    assert (found["request"].early, found["request"].late) == (6500, 14500)
    assert found["time to first text"].early == found["time to first text"].late == 500


def long_run(llm: Any, per_request_mb: float = 0.0, fill: int = 200, requests: int = 1600) -> LoadReport:
    """One request a second; the store of beginnings fills at first, and memory with it."""
    readings = []
    for at in range(0, requests + 1, 5):
        memory = 300 + min(at, fill) + per_request_mb * max(0, at - fill) + (30 if 900 < at < 960 else 0)
        readings.append(sample(at, resident_mb=memory, prefix_tokens=160 * min(at, fill)))
    ends = tuple(outcome(n, begun=float(n), seconds=0.9) for n in range(requests))
    return report(
        llm, mix=MixSettings(requests=requests), checked=requests, samples=tuple(readings), outcomes=ends,
    )  # fmt: skip


def test_memory_is_judged_from_when_the_store_is_full(llm: Any) -> None:
    grown = long_run(llm, per_request_mb=0.05)
    growth = Growth.of(grown.samples, grown.outcomes)
    assert (growth.full_at, growth.requests, growth.judged) == (200, 1400, True)
    assert growth.per_1000_mb == pytest.approx(50, rel=0.05)
    assert "+50.0 MB for 1,000 requests" in " ".join(text_of(load_tables(grown)).split())
    short = long_run(llm, requests=400)
    assert not Growth.of(short.samples, short.outcomes).judged
    assert "200 requests are too few" in " ".join(text_of(load_tables(short)).split())


def test_the_chart_draws_every_reading(llm: Any) -> None:
    root = ElementTree.fromstring(load_plot(report(llm)))
    lines = [node.get("points", "") for node in root.iter() if node.tag.endswith("polyline")]
    assert [len(points.split()) for points in lines] == [11, 10]
    assert sum(node.tag.endswith("circle") for node in root.iter()) == 16


def test_the_report_is_json_without_texts(llm: Any) -> None:
    data = json.loads(json.dumps(report(llm).json()))
    assert (data["format"], data["mix"]["requests"], len(data["outcomes"])) == ("dgemma-bench-serve", 16, 16)
    assert "text" not in data["outcomes"][0] and data["outcomes"][3]["begun"] == pytest.approx(0.3)


def soak_serve() -> Any:
    spec = importlib.util.spec_from_file_location("soak_serve", REPO / "scripts" / "soak_serve.py")
    assert spec and spec.loader
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    return soak


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"lost": 1, "faults": ("request 3: gone",), "checked": 15}, "1 lost: .*request 3"),
        ({"wrong": (Wrong(number=1, got=outcome(1), expected=Expected("", "")),)}, "1 wrong"),
        ({"checked": 0}, "0 compared of 16"),
        ({"rows_per_forward": 3.9}, "3.90 rows a pass"),
        ({"samples": tuple(sample(at, running=1) for at in range(8))}, "left over in the engine"),
        ({"outcomes": tuple(outcome(n, first_text_s=0.1 * n) for n in range(16))}, "time to first text grew"),
    ],
)
def test_the_long_run_fails_for_each_broken_claim(llm: Any, changes: dict[str, Any], fault: str | None) -> None:
    faults = list(soak_serve().faults(report(llm, **changes), memory=False))
    assert len(faults) == (fault is not None)
    assert not fault or re.search(fault, faults[0])


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        ({}, None),
        ({"per_request_mb": 0.01}, None),  # 10 MB at 500: an allocator that settles
        ({"per_request_mb": 0.05}, "resident memory grows by 50"),
        ({"per_request_mb": -0.05}, None),
        ({"requests": 1100}, "memory cannot be judged: 900 requests"),
    ],
)
def test_the_long_run_fails_for_memory_that_grows(llm: Any, run: dict[str, Any], fault: str | None) -> None:
    faults = list(soak_serve().faults(long_run(llm, **run)))
    assert len(faults) == (fault is not None), faults
    assert not fault or re.search(fault, faults[0])


def test_the_long_run_refuses_to_be_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["soak_serve.py", "--requests", "400"])
    with pytest.raises(SystemExit):
        soak_serve().main()
    assert "400 requests are too few to judge memory: take at least 1300, or --no-memory" in capsys.readouterr().err


# -- the command ---------------------------------------------------------------------


class Fake:
    """In place of the server process and the run: keeps what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, llm: Any, **result: Any) -> None:
        self.flags: list[list[str]] = []
        self.runs: list[tuple[str, MixSettings, int, dict[str, str], bool]] = []
        self.llm, self.result = llm, result
        self.breaks_at: int | None = None
        monkeypatch.setattr(server_process, "ServerProcess", self.start)
        monkeypatch.setattr(serve, "run_load", self.run)

    def start(self, model: str, flags: list[str]) -> Any:
        self.flags.append(flags)
        return contextlib.nullcontext(argparse.Namespace(url="http://started"))

    def run(self, llm: Any, url: str, mix: MixSettings, concurrency: int, **more: Any) -> LoadReport:
        if len(self.runs) == self.breaks_at:
            self.breaks_at = None
            raise KeyboardInterrupt
        self.runs.append((url, mix, concurrency, more["headers"], more["known"] is not None))
        made = {"checked": int(more["known"] is not None)}
        return report(self.llm, mix=mix, model=llm.name, concurrency=concurrency, **made | self.result)


@pytest.fixture
def model(folder: Path) -> str:
    return f"--model={folder}"


def test_the_server_gets_the_flags(monkeypatch: pytest.MonkeyPatch, llm: Any, model: str) -> None:
    fake = Fake(monkeypatch, llm)
    words = (model, "--requests=9", "--concurrency=100", "--max-rows=3", "--kv-bytes=5000000", "--dtype=float32")
    bench_serve.run(arguments(*words, "--json=-"))
    assert set(fake.flags[0]) == {
        "--max-rows=3", "--kv-bytes=5000000", "--device=auto", "--dtype=float32", "--max-waiting=100",
        "--kv-cache-dtype=auto",
    }  # fmt: skip
    assert fake.runs == [("http://started", MixSettings(requests=9), 100, {}, True)]


def test_a_running_server_is_taken_with_its_key(monkeypatch: pytest.MonkeyPatch, llm: Any, model: str) -> None:
    fake = Fake(monkeypatch, llm, checked=0)
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    bench_serve.run(arguments(model, "--url=http://there", "--no-check", "--json=-"))
    assert not fake.flags
    assert fake.runs == [("http://there", MixSettings(requests=200), 16, {"authorization": "Bearer abc"}, False)]


def test_the_key_goes_to_no_server_of_ours(monkeypatch: pytest.MonkeyPatch, llm: Any, model: str) -> None:
    fake = Fake(monkeypatch, llm)
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    bench_serve.run(arguments(model, "--json=-"))
    assert fake.runs[0][3] == {}


def test_the_table_runs_each_number_with_and_without_batching(
    monkeypatch: pytest.MonkeyPatch, llm: Any, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(monkeypatch, llm)
    bench_serve.run(arguments(model, "--table"))
    assert [concurrency for _, _, concurrency, _, _ in fake.runs] == [1, 1, 8, 8, 64, 64]
    assert ["--max-rows=1" in flags for flags in fake.flags] == [False, True] * 3
    assert all(mix.cancelled == mix.stopped == 0 and mix.streamed == 1 for _, mix, _, _, _ in fake.runs)
    absolute_, _, ratios_ = capsys.readouterr().out.strip().partition("\n\n")
    assert len(absolute_.splitlines()) == 8 and len(ratios_.splitlines()) == 2 + 3 + 2


def test_a_table_that_was_cut_off_goes_on(
    monkeypatch: pytest.MonkeyPatch, llm: Any, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, file = Fake(monkeypatch, llm), tmp_path / "table.json"
    fake.breaks_at = 3
    words = (model, "--table", f"--json={file}", "--resume")
    with pytest.raises(KeyboardInterrupt):
        bench_serve.run(arguments(*words))
    assert list(json.loads(file.read_text())["rows"]) == ["1, batching", "1, one at a time", "8, batching"]
    before = file.read_bytes()
    for other, said in (("--mix-seed=4", "is of mix"), ("--no-check", "both must be alike")):
        with pytest.raises(RequestError, match=said):
            bench_serve.run(arguments(*words, other))
    assert file.read_bytes() == before
    fake.runs.clear()
    bench_serve.run(arguments(*words))
    assert [concurrency for _, _, concurrency, _, _ in fake.runs] == [8, 64, 64]
    assert len(json.loads(file.read_text())["rows"]) == 6
    fake.runs.clear()
    bench_serve.run(arguments(model, "--table", f"--json={file}"))
    assert len(fake.runs) == 6, "without --resume it begins anew"
    file.write_text("{}")
    with pytest.raises(RequestError, match="is no load table"):
        bench_serve.run(arguments(*words))


BAD = Wrong(number=1, got=outcome(1), expected=Expected("", ""))


@pytest.mark.parametrize("result", [{"lost": 1}, {"wrong": (BAD,)}])
def test_a_lost_or_wrong_answer_is_an_error(
    monkeypatch: pytest.MonkeyPatch, llm: Any, model: str, result: dict[str, Any], tmp_path: Path
) -> None:
    Fake(monkeypatch, llm, **result)
    with pytest.raises(DgemmaError, match="answers were lost"):
        bench_serve.run(arguments(model, f"--json={tmp_path / 'out.json'}"))
    assert json.loads((tmp_path / "out.json").read_text())["lost"] == result.get("lost", 0)


@pytest.mark.parametrize(
    "words",
    [
        ("--table", "--url=http://x"), ("--table", "--plot=x.svg"), ("--url=http://x", "--max-rows=2"),
        ("--resume",), ("--resume", "--table"), ("--resume", "--json=x"), ("--table", "--requests=63"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(words: tuple[str, ...], model: str) -> None:
    with pytest.raises(RequestError, match=r"no --url|without --url|needs --table and --json|at least 64 requests"):
        bench_serve.run(arguments(model, *words))


@pytest.mark.parametrize("word", ["--requests=0", "--longest-prompt=0"])
def test_numbers_without_meaning_are_refused(word: str, model: str) -> None:
    with pytest.raises(RequestError, match="must be at least 1, got 0"):
        bench_serve.run(arguments(model, word))


# -- the process ---------------------------------------------------------------------


def test_a_server_process_answers_and_ends_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its flags alone count: this would be refused.
    monkeypatch.setenv("DGEMMA_STEPS", "nonsense")
    process = ServerProcess(str(folder), ["--max-rows=2"])
    with process:
        assert process.alive and process.status is None
        assert httpx.get(f"{process.url}/v1/models", timeout=PATIENCE_S).json()["data"]
    assert process.status == 0 and not process.alive
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(DgemmaError, match=r"ended with status 2: .*nowhere"), ServerProcess(str(tmp_path / "nowhere")):
        pass
