"""The decode benchmark on a tiny random checkpoint: what it counts, what it says, and what it refuses."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import pytest
import torch
from engine_kit import tiny_config
from torch import Tensor

from dgemma.api import LLM
from dgemma.bench import decode
from dgemma.bench.child import TUNED
from dgemma.bench.decode import PROMPTS, DecodeReport, DecodeSettings, Ratio, Row, run_decode
from dgemma.bench.floor import Floor
from dgemma.bench.machine import Machine, Memory, MemoryMeter
from dgemma.bench.peer import MediumPeer, Peer
from dgemma.bench.report import plot, tables
from dgemma.bench.runs import Ours, Run
from dgemma.bench.tuned import TunedPeer
from dgemma.cli import main
from dgemma.config import GenerationConfig
from dgemma.errors import ConfigError, DgemmaError, RequestError

pytestmark = pytest.mark.usefixtures("brief_rates")

WIDTH, STEPS = 16, 3
SIDES = ("dgemma", "transformers", "transformers (medium)")
FIXED = dict(max_denoising_steps=STEPS, stability_threshold=None, confidence_threshold=None, stop_tokens=())


@pytest.fixture(scope="module")
def peer(llm: LLM) -> Peer:
    return Peer(llm.folder, llm.config, llm.dtype, llm.device, WIDTH)


@pytest.fixture(scope="module")
def report(llm: LLM) -> DecodeReport:
    settings = DecodeSettings(prompts=2, repeats=2, fixed_steps=STEPS, medium=True)
    return run_decode(llm, settings, {"seed": 7})


# -- what is counted -------------------------------------------------------------------


def test_fixed_runs_take_equal_steps(report: DecodeReport) -> None:
    rows = [report.row(side, "fixed") for side in SIDES]
    assert [row and (row.runs, row.denoise_passes, row.canvases, row.tokens) for row in rows] == [
        (4, 4 * STEPS, 4, 4 * WIDTH)
    ] * 3


@pytest.mark.parametrize("canvases", [1, 3])
def test_our_passes_are_those_of_the_api(llm: LLM, canvases: int) -> None:
    prompt = llm.encode_prompt("Once upon a time")
    for config in (llm.generation, llm.generation.with_(**FIXED), llm.generation.with_(mode="ar")):
        config = config.with_(max_new_tokens=canvases * WIDTH, seed=5)
        run = Ours(llm.engine).run(prompt, config)
        said = llm.generate(prompt, **{field.name: getattr(config, field.name) for field in fields(config)})
        assert (run.denoise_passes, run.tokens) == (sum(said.steps), len(said.token_ids))
        assert run.tokens_per_forward == pytest.approx(said.tokens_per_forward)
        assert run.canvases == len(said.steps)
        check_times(run)


@pytest.mark.parametrize("canvases", [1, 3])
def test_the_peers_passes_are_its_draws(peer: Peer, llm: LLM, canvases: int) -> None:
    prompt = llm.encode_prompt("Once upon a time")
    for config in (llm.generation.with_(stop_tokens=()), llm.generation.with_(**FIXED)):
        config = config.with_(max_new_tokens=canvases * WIDTH)
        with mock.patch.object(torch, "multinomial", wraps=torch.multinomial) as multinomial:
            run = peer.run(prompt, config)
        assert run.denoise_passes == multinomial.call_count
        assert (run.canvases, run.later_encodes, run.tokens) == (canvases, canvases - 1, canvases * WIDTH)
        check_times(run)


def check_times(run: Run) -> None:
    """A canvas's first step is not among the steps, and parts are no longer than the whole."""
    assert len(run.step_seconds) == run.denoise_passes - run.canvases
    assert min((run.prompt_seconds, *run.step_seconds)) > 0
    assert run.prompt_seconds + sum(run.step_seconds) < run.seconds
    assert run.cpu_seconds > 0


def test_the_peer_counts_tokens_up_to_the_end_token(peer: Peer, llm: LLM) -> None:
    prompt = llm.encode_prompt("Once")
    config = llm.generation.with_(**FIXED, max_new_tokens=2 * WIDTH)
    torch.manual_seed(config.seed)
    out = peer._model.generate(torch.tensor([prompt]), **peer._options(config))
    free = out.sequences[0, len(prompt) :].tolist()
    end = free[5]
    assert peer.run(prompt, config.with_(stop_tokens=(end,))).tokens == free.index(end) + 1


def test_both_sides_are_one_model(report: DecodeReport) -> None:
    assert report.agreement is not None and report.agreement < 1e-4


class Lazy:
    """A peer that skips a step."""

    name = "lazy"

    version, settings = "0", {}

    def __init__(self, engine: Any) -> None:
        self._ours = Ours(engine)

    def rehearse(self, prompt: Sequence[int], config: GenerationConfig) -> Memory:
        return self._ours.rehearse(prompt, config)

    def run(self, prompt: Sequence[int], config: GenerationConfig) -> Run:
        return self._ours.run(prompt, config.with_(max_denoising_steps=config.max_denoising_steps - 1))

    def encode(self, prompt: Sequence[int]) -> Tensor:
        return self._ours.encode(prompt)


def test_unequal_steps_are_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = Lazy(llm.engine)
    monkeypatch.setattr(decode, "Peer", lambda *_: lazy)
    with pytest.raises(DgemmaError, match=r"unequal numbers of steps in a fixed run: \[2, 3\]"):
        run_decode(llm, DecodeSettings(prompts=1, repeats=1, fixed_steps=3))


# -- what is said ----------------------------------------------------------------------


def test_json_has_all_fields_and_positive_numbers(report: DecodeReport) -> None:
    data = json.loads(json.dumps(report.json(), allow_nan=False))
    assert set(data) == {field.name for field in fields(DecodeReport)}
    assert set(data["machine"]) == {field.name for field in fields(Machine)}
    assert data["machine"]["threads"] == torch.get_num_threads()
    assert data["machine"]["dtype"] == "float32" and data["machine"]["cpu"]
    assert (data["seeds"], data["canvas"], data["prompts"]) == ([7, 8], WIDTH, list(PROMPTS[:2]))
    plan = [(side, kind) for kind in ("fixed", "own") for side in SIDES] + [("dgemma", "ar")]
    assert [(row["side"], row["kind"]) for row in data["rows"]] == plan
    assert len(data["runs"]) == 4 * len(plan)
    for row in data["rows"]:
        assert set(row) == {"steps_per_canvas", "share_of_floor", *(field.name for field in fields(Row))}
        steps = {"ms_per_step", "steps_per_canvas", "canvases", "denoise_passes"}
        for name, value in row.items():
            if name in steps and row["kind"] == "ar":
                assert not value
            elif name == "extra_mb":
                assert value is None or value >= 0
            elif name == "share_of_floor":
                assert (value is not None and value > 0) == (row["kind"] == "fixed")
            elif name not in ("side", "kind"):
                assert value > 0, name
    for ratio in data["ratios"]:
        assert set(ratio) == {field.name for field in fields(Ratio)}
        assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]


def test_rows_and_ratios_follow_from_the_runs(report: DecodeReport) -> None:
    def runs(side: str, kind: str) -> list[dict[str, Any]]:
        return [item["run"] for item in report.runs if (item["side"], item["kind"]) == (side, kind)]

    for row in report.rows:
        assert row.seconds == statistics.median(run["seconds"] for run in runs(row.side, row.kind))
        assert row.tokens == sum(run["tokens"] for run in runs(row.side, row.kind))
    ratio = next(ratio for ratio in report.ratios if ratio.name == "a canvas of equal steps")
    assert (ratio.fast, ratio.slow) == ("dgemma, fixed", "transformers, fixed")
    keyed = {(item["side"], item["kind"], item["prompt"], item["seed"]): item["run"]["seconds"] for item in report.runs}
    pairs = [
        keyed["transformers", "fixed", *key] / keyed["dgemma", "fixed", *key]
        for key in itertools.product((0, 1), report.seeds)
    ]
    assert ratio.value == pytest.approx(statistics.median(pairs))
    assert (ratio.low, ratio.high) == (pytest.approx(min(pairs)), pytest.approx(max(pairs)))


def test_share_is_the_floor_of_a_step_by_its_time(report: DecodeReport) -> None:
    assert isinstance(report.floor, Floor) and isinstance(report.prompt_floor, Floor)
    assert (report.floor.rows, report.floor.threads, report.floor.dtype) == (WIDTH, torch.get_num_threads(), "float32")
    lengths = [item["run"]["prompt_tokens"] for item in report.runs]
    assert report.prompt_floor.rows == report.floor.prefix == round(statistics.median(lengths))
    row = report.row("dgemma", "fixed")
    assert row and row.ms_per_step and report.share(row) == report.floor.ms / row.ms_per_step < 1
    slow = replace(report, rows=(replace(row, ms_per_step=2 * row.ms_per_step),))
    assert slow.share(slow.rows[0]) == pytest.approx((report.share(row) or 0) / 2)
    data = report.json()["floor"]
    assert data["ms"] == pytest.approx(sum(line["ms"] for line in data["lines"])) == pytest.approx(report.floor.ms)


def test_peer_settings_are_those_of_its_runs(report: DecodeReport) -> None:
    plain, medium = report.peer_settings["transformers"], report.peer_settings["transformers (medium)"]
    assert (plain["matmul precision"], medium["matmul precision"]) == ("highest", "medium")
    assert (plain["dtype"], plain["attention"], plain["cache"]) == ("float32", "sdpa", "dynamic")
    assert plain["allocator"] == "glibc default"


def test_only_the_chosen_kinds_are_run(llm: LLM) -> None:
    settings = DecodeSettings(prompts=1, repeats=1, fixed_steps=2, peer=False, floor=False, kinds=("fixed",))
    report = run_decode(llm, replace(settings, prompt_tokens=40))
    assert [(row.side, row.kind) for row in report.rows] == [("dgemma", "fixed")]
    assert (report.floor, report.ratios, report.runs[0]["run"]["prompt_tokens"]) == (None, (), 40)


def test_the_tuned_peer_is_the_same_model_in_another_process(llm: LLM, peer: Peer) -> None:
    prompt = llm.encode_prompt("Once")
    config = llm.generation.with_(**FIXED, max_new_tokens=2 * WIDTH)
    with TunedPeer(llm.folder, llm.dtype, WIDTH, peer.version) as tuned:
        run, here = tuned.run(prompt, config), peer.run(prompt, config)
        memory = tuned.rehearse(prompt, config)
        assert tuned.settings["allocator"] == " ".join(f"{name}={TUNED[name]}" for name in sorted(TUNED))
        assert tuned.settings["matmul precision"] == "medium"
        with pytest.raises(DgemmaError, match=r"child process failed at 'run': RequestError: entropy_bound must be"):
            tuned._child.call("run", prompt=prompt, config={**asdict(config), "entropy_bound": None})
    counted = ("prompt_tokens", "tokens", "denoise_passes", "later_encodes", "canvases")
    assert [getattr(run, name) for name in counted] == [getattr(here, name) for name in counted]
    assert memory.peak_mb > 50
    check_times(run)
    with pytest.raises(DgemmaError, match="child process"):
        tuned.run(prompt, config)


def test_several_types_and_threads_are_one_call(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, place = torch.get_num_threads(), tmp_path / "b.json"
    several = (
        "--dtypes",
        "float32,bfloat16",
        "--threads",
        "1,2",
        "--kinds",
        "fixed",
        "--no-peer",
        "--json",
        str(place),
    )
    try:
        assert main(["bench", "decode", "--model", str(folder), *QUICK, *several, "--json", str(place)]) == 0
    finally:
        torch.set_num_threads(before)
    reports = json.loads(place.read_text())["reports"]
    wanted = [(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)]
    assert [(r["machine"]["dtype"], r["machine"]["threads"]) for r in reports] == wanted
    assert [(r["floor"]["dtype"], r["floor"]["threads"]) for r in reports] == wanted
    assert "denoising steps of the fixed run" in capsys.readouterr().out


def test_sides_take_turns(report: DecodeReport) -> None:
    order = [item["side"] for item in report.runs]
    rounds = [order[start : start + 7] for start in range(0, len(order), 7)]
    assert rounds[0] == [*SIDES, *SIDES, "dgemma"]
    assert rounds[1] == rounds[0][::-1] and rounds[2:] == rounds[:2]


def test_chart_is_svg_with_every_number(report: DecodeReport) -> None:
    texts = [element.text for element in ElementTree.fromstring(plot(report)).iter() if element.tag.endswith("text")]
    for label in (*SIDES, "dgemma, own", "transformers, own", "dgemma, ar"):
        assert label in texts


def test_a_busy_machine_and_another_sampler_are_said(report: DecodeReport) -> None:
    calm = replace(report, machine=replace(report.machine, load=0.0))
    busy = replace(report, machine=replace(report.machine, load=3.0))
    other = replace(calm, generation=report.generation.with_(sampler="confidence"))
    said = {name: " ".join(map(str, tables(one))) for name, one in (("calm", calm), ("busy", busy), ("other", other))}
    assert ["load average" in text for text in said.values()] == [False, True, False]
    assert ["another rule" in text for text in said.values()] == [False, False, True]
    assert report.floor
    lines = tuple(replace(line, ms=1e6) for line in report.floor.lines)
    absurd = replace(calm, floor=replace(report.floor, lines=lines))
    assert "means nothing" in " ".join(map(str, tables(absurd))) and "means nothing" not in said["calm"]


def test_budget_is_whole_canvases(llm: LLM) -> None:
    settings = DecodeSettings(prompts=1, repeats=1, fixed_steps=2, peer=False)
    report = run_decode(llm, settings, {"max_new_tokens": 9, "canvas_length": 8, "mode": "ar"})
    assert (report.canvas, report.generation.max_new_tokens, report.generation.mode) == (8, 16, "diffusion")
    assert (report.peer, report.agreement) == (None, None)
    assert [(row.side, row.kind) for row in report.rows] == [("dgemma", kind) for kind in ("fixed", "own", "ar")]
    assert [ratio.name for ratio in report.ratios] == ["diffusion against autoregression"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory can be reset on Linux only")
def test_memory_meter_sees_what_is_taken_and_given_back() -> None:
    meter = MemoryMeter()
    block = torch.ones(20_000_000)
    del block
    memory = meter.stop()
    if memory.extra_mb is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 75 < memory.extra_mb < memory.peak_mb
    assert (MemoryMeter().stop().extra_mb or 0) < 40


def test_medium_precision_ends_with_the_run(peer: Peer, llm: LLM) -> None:
    before = torch.get_float32_matmul_precision()
    seen = []
    config = llm.generation.with_(**FIXED)
    with mock.patch.object(peer, "run", side_effect=lambda *_: seen.append(torch.get_float32_matmul_precision())):
        MediumPeer(peer).run([2, 3], config)
    assert (seen, torch.get_float32_matmul_precision()) == (["medium"], before)


# -- the command -----------------------------------------------------------------------

QUICK = ("--prompts", "1", "--repeats", "1", "--fixed-steps", "2")


def test_command_writes_table_json_and_chart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    files = ("--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg"))
    assert main(["bench", "decode", "--model", str(folder), *QUICK, *files, "--steps", "4"]) == 0
    told = capsys.readouterr().out
    assert "denoising step" in told and "transformers" in told and "ms/step" in told
    (data,) = json.loads((tmp_path / "b.json").read_text())["reports"]
    assert data["generation"]["max_denoising_steps"] == 4 and data["settings"]["fixed_steps"] == 2
    ElementTree.parse(tmp_path / "b.svg")


def test_json_to_standard_output_comes_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--model", str(folder), *QUICK, "--no-peer", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["format"], data["version"], data["reports"][0]["peer"]) == ("dgemma-bench-decode", 2, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "nosuchmodel"), "no checkpoint 'nosuchmodel'"),
        (("--prompts", "9"), "prompts must be in 1..8, got 9"),
        (("--repeats", "0"), "repeats must be in 1..1000, got 0"),
        (("--fixed-steps", "1"), "fixed-steps must be in 2..1000, got 1"),
        (("--plot", "x.png"), "--plot writes .svg, got 'x.png'"),
        (("--json", "/nowhere/b.json"), "'/nowhere/b.json' cannot be written"),
        (("--mode", "ar"), "measures both modes"),
        (("--kinds", "fixed,slow"), "kinds must be some of fixed, own, ar; got fixed, slow"),
        (("--threads", "1,0"), "whole numbers of at least 1 with commas between, got '1,0'"),
        (("--dtype", "float32", "--dtypes", "bfloat16"), "--dtype and --dtypes say the same thing"),
        (("--dtypes", "int3"), "dtypes must be some of float32, bfloat16, float16; got 'int3'"),
        (("--top-p", "0"), "top_p must be a number more than 0 and at most 1, got 0.0"),
        (("--max-new-tokens", "2000"), "the model has 256"),
    ],
)
def test_wrong_use_is_told_in_a_line(
    folder: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", "--model", str(folder), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_missing_or_unable_peer_is_a_clear_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**changes: Any) -> Peer:
        return Peer(llm.folder, tiny_config(**changes), llm.dtype, llm.device, WIDTH)

    with pytest.raises(ConfigError, match=r"cannot build a dense DiffusionGemma.*--no-peer"):
        load(num_experts=0)
    with pytest.raises(ConfigError, match=r"canvas positions.*--no-peer"):
        load(canvas_positions=16)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers, is not installed.*pip install 'dgemma\[dev\]'.*--no-peer"):
        load()


def test_settings_are_checked() -> None:
    with pytest.raises(RequestError, match="prompts must be in"):
        DecodeSettings(prompts=0)
