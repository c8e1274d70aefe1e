"""Parts of a step: self times, nothing lost, nothing left behind, on the compiled path and without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dgemma import kernels
from dgemma.api import LLM
from dgemma.bench import parts
from dgemma.bench.charts import kernels_tables
from dgemma.bench.floor import PARTS
from dgemma.bench.kernels import KernelsSettings, run_kernels
from dgemma.bench.parts import ALL_PARTS, Stopwatch, observe_routing, replaced, watching
from dgemma.bench.runs import Ours
from dgemma.cli import main
from dgemma.engine import Engine
from dgemma.errors import RequestError

pytestmark = pytest.mark.usefixtures("brief_rates")


def plain(llm: LLM) -> Engine:
    """The engine of the same model without compiled ops."""
    engine = Engine(llm.engine.runner.model)
    engine.runner._stack = None
    return engine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])
    return now


def test_times_are_self_times(clock: list[float]) -> None:
    watch = Stopwatch()

    def inner() -> None:
        clock[0] += 5

    def outer() -> None:
        clock[0] += 2
        watch.wrap("attention", inner)()
        clock[0] += 1

    watch.wrap("rest", outer, "denoise")()
    clock[0] += 100  # nobody's
    watch.wrap("sampler", inner)()
    assert watch.lap() == {("denoise", "rest"): 3, ("denoise", "attention"): 5, ("", "sampler"): 5}
    assert watch.lap() == {}


def test_self_conditioning_keeps_what_is_inside_it(clock: list[float]) -> None:
    watch = Stopwatch()

    def tick() -> None:
        clock[0] += 1

    watch.wrap("embedding", watch.wrap("norms", tick))()
    watch.wrap("projections", watch.wrap("norms", tick))()
    assert watch.lap() == {("", "embedding"): 1, ("", "norms"): 1, ("", "projections"): 0}


def test_an_error_leaves_the_watch_in_order(clock: list[float]) -> None:
    watch = Stopwatch()

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        watch.wrap("rest", watch.wrap("mlp", fail))()
    assert set(watch.lap()) == {("", "rest"), ("", "mlp")}


def test_a_replaced_attribute_comes_back() -> None:
    class Base:
        def name(self) -> str:
            return "base"

    class Own(Base):
        pass

    one = Own()
    with replaced(Base, "name", lambda self: "class"), replaced(one, "name", lambda: "object"):
        assert (one.name(), Own().name()) == ("object", "class")
    assert (one.name(), vars(one)) == ("base", {})


def state(engine: Engine) -> list[Any]:
    """Everything that watching touches."""
    owners = [engine, engine.runner, kernels, *(owner for owner, _, _ in parts.METHODS)]
    modules = list(engine.runner.model.modules())
    hooks = [len(hooks) for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    names = ("tick", "denoise", "encode", "vocab", *(name for _, name, _ in parts.METHODS))
    return [*hooks, *((id(owner), name, vars(owner).get(name)) for owner in owners for name in names)]


@pytest.mark.parametrize("compiled", [True, False])
def test_watching_changes_no_token_and_leaves_nothing(llm: LLM, compiled: bool) -> None:
    engine = llm.engine if compiled else plain(llm)
    request = llm.request("Once upon a time", max_new_tokens=32, steps=3, seed=4)

    def tokens() -> list[int]:
        engine.add(request)
        out: list[int] = []
        while engine.has_work:
            out += [t for event in engine.tick() if hasattr(event, "tokens") for t in event.tokens]
        return out

    before, alone, watch = state(engine), tokens(), Stopwatch()
    with watching(engine, watch):
        assert tokens() == alone
    assert state(engine) == before
    seconds = watch.lap()
    if compiled and engine.runner._stack is None:
        pytest.skip("no compiled ops here")
    for part in PARTS:
        assert seconds.get(("denoise", part), 0) > 0, part
        assert (seconds.get(("encode", part), 0) > 0) == (part != "vocabulary"), part
    assert seconds["", "sampler"] > 0 and seconds["", "python"] > 0


@pytest.mark.parametrize("compiled", [True, False])
def test_routing_is_seen_at_the_right_width(llm: LLM, compiled: bool) -> None:
    engine = llm.engine if compiled else plain(llm)
    prompt = llm.encode_prompt("Once upon a time")
    config = llm.generation.with_(max_new_tokens=16, max_denoising_steps=2, stop_tokens=())
    routing = observe_routing(lambda: Ours(engine).run(prompt, config), 16)
    assert routing.hit is not None and 2 <= routing.hit <= 4
    assert observe_routing(lambda: Ours(engine).run(prompt, config), 17).hit is None


def test_report_adds_up(llm: LLM) -> None:
    report = run_kernels(llm, KernelsSettings(steps=3, repeats=2, prompt_tokens=24))
    step, encode = report.passes
    for one in report.passes:
        assert set(one.parts) == set(ALL_PARTS) and one.ms > 0
        assert 0.3 * one.ms < one.watched_ms < 5 * one.ms
        assert one.floor.ms < one.ms
    assert (step.floor.rows, step.floor.prefix, encode.floor.rows) == (16, 24, 24)
    assert step.parts["vocabulary"] > 0 and encode.parts["vocabulary"] == encode.parts["sampler"] == 0
    data = json.loads(json.dumps(report.json(), allow_nan=False))
    assert data["format"] == "dgemma-bench-kernels"
    assert data["passes"][0]["watched_ms"] == pytest.approx(sum(data["passes"][0]["parts"].values()))
    assert data["passes"][0]["floor"]["parts"]["mlp"] > 0
    assert len(list(kernels_tables(report, ops=True))) > len(list(kernels_tables(report)))


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "k.json"
    quick = ("--fixed-steps", "2", "--repeats", "1", "--prompt-tokens", "8", "--canvas-length", "32", "--ops")
    assert main(["bench", "kernels", "--model", str(folder), *quick, "--json", str(place)]) == 0
    told = capsys.readouterr().out
    assert "without the watch" in told and "projections" in told and "self-conditioning, down" in told
    assert json.loads(place.read_text())["canvas"] == 32


def test_settings_are_checked() -> None:
    with pytest.raises(RequestError, match="steps must be at least 2, got 1"):
        KernelsSettings(steps=1)
    assert torch.get_num_threads() >= 1
