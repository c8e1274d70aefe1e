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

from dgemma.bench import serve, server_process
from dgemma.bench.load_client import Outcome
from dgemma.bench.load_mix import Expected, MixSettings
from dgemma.bench.load_report import drifts, load_plot, load_tables, markdown
from dgemma.bench.machine import Machine
from dgemma.bench.serve import LoadReport, Sample, Wrong
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
    lines = markdown({"1, batching": report(llm), "8, batching": report(llm, concurrency=8, lost=2)}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    first, second = dict(zip(cells[0], cells[2], strict=True)), dict(zip(cells[0], cells[3], strict=True))
    assert (first["at once"], second["at once"], second["lost"]) == ("4", "8", "2")
    assert (first["first text p50 ms"], first["canvas p50 ms"], first["rows/pass"]) == ("500", "200", "5.0")


def test_a_run_that_was_not_compared_claims_nothing(llm: Any) -> None:
    cells = markdown({"x": report(llm, checked=0)}).splitlines()[2].split("|")
    assert cells[4].strip() == "-"


def test_growth_shows_as_drift(llm: Any) -> None:
    grown = report(llm, samples=tuple(sample(at, resident_mb=500 + 10 * at) for at in range(16)))
    found = {name: drift for name, drift, _ in drifts(grown)}
    assert found["resident memory"].early == 555 and found["resident memory"].late == 635
    assert found["request"].early == found["request"].late == 1000


def test_the_chart_draws_every_reading(llm: Any) -> None:
    root = ElementTree.fromstring(load_plot(report(llm)))
    lines = [node.get("points", "") for node in root.iter() if node.tag.endswith("polyline")]
    assert [len(points.split()) for points in lines] == [11, 10]
    assert sum(node.tag.endswith("circle") for node in root.iter()) == 16


def test_the_report_is_json_without_texts(llm: Any) -> None:
    data = json.loads(json.dumps(report(llm).json()))
    assert (data["format"], data["mix"]["requests"], len(data["outcomes"])) == ("dgemma-bench-serve", 16, 16)
    assert "text" not in data["outcomes"][0] and data["outcomes"][3]["begun"] == pytest.approx(0.3)


def judge(found: LoadReport) -> list[str]:
    spec = importlib.util.spec_from_file_location("soak_serve", REPO / "scripts" / "soak_serve.py")
    assert spec and spec.loader
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    return list(soak.faults(found))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"lost": 1, "faults": ("request 3: gone",), "checked": 15}, "1 lost: .*request 3"),
        ({"wrong": (Wrong(number=1, got=outcome(1), expected=Expected("", "")),)}, "1 wrong"),
        ({"checked": 0}, "0 compared of 16"),
        ({"rows_per_forward": 3.9}, "3.90 rows a pass"),
        ({"samples": tuple(sample(at, running=1) for at in range(8))}, "left over in the engine"),
        ({"samples": tuple(sample(at, resident_mb=500 + 10 * at) for at in range(16))}, "resident memory grew"),
        ({"outcomes": tuple(outcome(n, first_text_s=0.1 * n) for n in range(16))}, "time to first text grew"),
    ],
)
def test_the_long_run_fails_for_each_broken_claim(llm: Any, changes: dict[str, Any], fault: str | None) -> None:
    faults = judge(report(llm, **changes))
    assert len(faults) == (fault is not None)
    assert not fault or re.search(fault, faults[0])


# -- the command ---------------------------------------------------------------------


class Fake:
    """In place of the server process and the run: keeps what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, llm: Any, **result: Any) -> None:
        self.flags: list[list[str]] = []
        self.runs: list[tuple[str, MixSettings, int, dict[str, str], bool]] = []
        self.llm, self.result = llm, result
        monkeypatch.setattr(server_process, "ServerProcess", self.start)
        monkeypatch.setattr(serve, "run_load", self.run)

    def start(self, model: str, flags: list[str]) -> Any:
        self.flags.append(flags)
        return contextlib.nullcontext(argparse.Namespace(url="http://started"))

    def run(self, llm: Any, url: str, mix: MixSettings, concurrency: int, **more: Any) -> LoadReport:
        self.runs.append((url, mix, concurrency, more["headers"], more["known"] is not None))
        return report(self.llm, concurrency=concurrency, **self.result)


@pytest.fixture
def model(folder: Path) -> str:
    return f"--model={folder}"


def test_the_server_gets_the_flags(monkeypatch: pytest.MonkeyPatch, llm: Any, model: str) -> None:
    fake = Fake(monkeypatch, llm)
    words = (model, "--requests=9", "--concurrency=100", "--max-rows=3", "--kv-bytes=5000000", "--dtype=float32")
    bench_serve.run(arguments(*words, "--json=-"))
    assert set(fake.flags[0]) == {
        "--max-rows=3", "--kv-bytes=5000000", "--device=auto", "--dtype=float32", "--max-waiting=100",
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
    assert len(capsys.readouterr().out.strip().splitlines()) == 8


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
    "words", [("--table", "--url=http://x"), ("--table", "--plot=x.svg"), ("--url=http://x", "--max-rows=2")]
)
def test_flags_that_do_not_go_together(words: tuple[str, ...], model: str) -> None:
    with pytest.raises(RequestError, match=r"no --url|without --url"):
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
        assert httpx.get(f"{process.url}/v1/models").json()["data"]
    assert process.status == 0 and not process.alive
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, signal.SIGCONT)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(DgemmaError, match=r"ended with status 2: .*nowhere"), ServerProcess(str(tmp_path / "nowhere")):
        pass
