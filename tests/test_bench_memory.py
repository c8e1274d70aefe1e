"""Memory from outside, and how long a start takes: what another process takes is seen, in the right stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dgemma.api import LLM
from dgemma.bench.charts import memory_tables
from dgemma.bench.child import Child
from dgemma.bench.memory import Footprint, MemorySettings, Watch, run_memory
from dgemma.bench.start import run_start
from dgemma.cli import main
from dgemma.errors import DgemmaError, RequestError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory of other processes is read from /proc")
GREEDY = """
import sys
sys.stdin.readline()
block = bytearray(b"x") * 150_000_000
del block
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def greedy() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", GREEDY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_what_another_process_takes_and_gives_back_is_seen(greedy: subprocess.Popen[str]) -> None:
    assert greedy.stdin and greedy.stdout
    with Watch(greedy.pid) as before:
        pass
    with Watch(greedy.pid) as during:
        greedy.stdin.write("\n")
        greedy.stdin.flush()
        greedy.stdout.readline()
    with Watch(greedy.pid) as after:
        pass
    assert 145 < during.peak - before.peak < 170
    if os.access(f"/proc/{greedy.pid}/clear_refs", os.W_OK):
        assert after.peak < before.peak + 20


def test_each_side_has_its_own_process_and_stages(folder: Path) -> None:
    llm = LLM.load(folder, threads=1)
    report = run_memory(llm, MemorySettings(canvases=2, steps=2, prompt_tokens=20))
    ours, theirs = report.sides
    assert (ours.side, theirs.side, report.canvas) == ("dgemma", "transformers", 16)
    for side in report.sides:
        assert 50 < side.imported <= side.loaded <= side.load_peak + 1
        assert side.warm <= side.peak + 1 and side.extra == max(0.0, side.peak - side.warm)
        assert side.allowed == pytest.approx(1.15 * side.file + 64 + side.imported)
        assert side.file == pytest.approx((folder / "model.safetensors").stat().st_size / 1e6)
    # The same weights: transformers has a stub of a vision tower beside them.
    assert ours.weights == pytest.approx(sum(w.nbytes for w in llm.engine.runner.model.parameters()) / 1e6)
    assert ours.weights <= theirs.weights < 1.1 * ours.weights
    assert theirs.settings["matmul precision"] == "highest"
    data = json.loads(json.dumps(report.json(), allow_nan=False))
    assert data["sides"][0]["extra"] == ours.extra
    assert data["sides"][0]["within_allowed"] == (ours.peak <= ours.allowed)
    assert len(list(memory_tables(report))) > 3


def test_extra_and_bound_are_what_they_say() -> None:
    side = Footprint(
        side="x", imported=10.0, loaded=60.0, load_peak=80.0, warm=100.0, peak=350.0, ended=100.0, weights=90.0,
        file=100.0, threads=1, settings={},
    )  # fmt: skip
    assert side.extra == 250.0 and side.allowed == pytest.approx(115 + 64 + 10)
    assert replace(side, peak=90.0).extra == 0.0


def test_a_childs_failure_is_one_line() -> None:
    with Child() as child, pytest.raises(DgemmaError, match=r"failed at 'load': CheckpointError: .*nowhere"):
        child.call("start", side="dgemma", threads=1)
        child.call("load", folder="/nowhere", dtype="float32", width=4)


def test_a_dead_child_is_told() -> None:
    child = Child()
    child._process.kill()
    with pytest.raises(DgemmaError, match="child process ended with status -9 at 'start'"):
        child.call("start", side="dgemma", threads=1)
    child.close()


def test_start_is_counted_from_the_process_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_start(str(folder), "float32", 1, repeats=1)
    assert 0 < report.imported < report.loaded < report.first_draft < 60
    with pytest.raises(DgemmaError, match="no checkpoint 'nosuchmodel'"):
        run_start("nosuchmodel", "float32", 1)
    with pytest.raises(RequestError, match="repeats must be at least 1, got 0"):
        run_start(str(folder), "float32", 1, repeats=0)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--canvases", "1", "--prompt-tokens", "8", "--canvas-length", "32", "--no-peer", "--json", "-")
    assert main(["bench", "memory", "--model", str(folder), *quick]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["format"], data["canvas"], len(data["sides"])) == ("dgemma-bench-memory", 32, 1)
    assert main(["bench", "memory", "--model", str(folder), "--canvases", "0"]) == 2
    assert "canvases must be at least 1, got 0" in capsys.readouterr().err
