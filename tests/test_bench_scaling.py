"""Checkpoints of the speed table, how cost grows, and the table that is made of cells and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from text_kit import save_model

from dgemma.api import LLM
from dgemma.bench.charts import scaling_plot, scaling_tables
from dgemma.bench.models import SHAPES, Shape, make_checkpoint, random_model, write_random
from dgemma.bench.peer import Peer
from dgemma.bench.runs import Ours
from dgemma.bench.scaling import ScalingReport, ScalingSettings, run_scaling
from dgemma.bench.table import TableRun, TableSettings, markdown
from dgemma.cli import main
from dgemma.errors import DgemmaError, RequestError

SMALL = Shape(
    vocab=2000, hidden=64, layers=7, dense=96, heads=4, kv_heads=2, head_dim=16, experts=4, top_k=2, expert=16, window=8
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(SMALL.config(), tmp_path_factory.mktemp("made") / "small", "small", 3, torch.bfloat16)


@pytest.fixture(scope="module")
def llm(made: Path) -> LLM:
    return LLM.load(made, threads=1)


# -- checkpoints -----------------------------------------------------------------------


def test_shapes_are_those_of_the_table() -> None:
    dense, moe = (SHAPES[name].config() for name in ("dense640", "moe262k"))
    assert (dense.hidden_size, dense.num_layers, dense.vocab_size, dense.num_experts) == (640, 18, 32_768, 1)
    assert (moe.hidden_size, moe.num_layers, moe.vocab_size) == (704, 8, 262_144)
    assert (moe.num_experts, moe.top_k_experts, moe.expert_size, moe.intermediate_size) == (32, 4, 176, 528)
    for config in (dense, moe):
        assert config.layers[5].kind == config.layers[-1].kind == "full" and config.layers[0].kind == "sliding"
        assert (config.layers[5].num_kv_heads, config.layers[5].head_dim) == (1, 512)
        assert (config.layers[0].num_kv_heads, config.layers[0].head_dim, config.num_heads) == (2, 256, 4)


def test_a_made_checkpoint_is_one_model_for_both(made: Path, llm: LLM) -> None:
    peer = Peer(made, llm.config, torch.float32, torch.device("cpu"), 16)
    prompt = llm.encode_prompt("Once upon a time, for three windows")
    ours, theirs = Ours(llm.engine).encode(prompt), peer.encode(prompt)
    assert ours.shape == (len(prompt), 64) and len(prompt) > 3 * 8
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert llm.tokenizer.decode(llm.tokenizer.encode("für 12 €")) == "für 12 €"


def test_weights_follow_the_seed_and_norms_of_q_and_k_are_damped() -> None:
    one, same, other = (random_model(SMALL.config(), seed, torch.float32).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert 0.2 < one["layers.0.attention.q_norm.weight"].mean() < 0.3
    assert 0.9 < one["layers.0.input_norm.weight"].mean() < 1.1
    assert one["embed.weight"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert all(tensor.isfinite().all() for tensor in one.values())


def test_unknown_checkpoints_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="must be one of dense640, moe262k; got 'dense'"):
        make_checkpoint("dense", tmp_path / "x")
    assert main(["bench", "make", "huge", str(tmp_path / "x")]) == 2
    assert "got 'huge'" in capsys.readouterr().err and not (tmp_path / "x").exists()


# -- scaling ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(llm: LLM) -> ScalingReport:
    settings = ScalingSettings(
        prompts=(40, 200, 20_000), canvases=(1, 2), batches=(1, 3), answers=(8, 32), vocabularies=(300, 600),
        narrow_width=8, prompt_tokens=12, canvas=32, steps=3, repeats=1,
    )  # fmt: skip
    return run_scaling(llm, settings)


def test_sweeps_do_the_work_they_name(report: ScalingReport) -> None:
    tokens = {sweep: [p.tokens for p in report.sweep(sweep)] for sweep in report.settings.sweeps}
    assert tokens == {
        "prompt": [32, 32], "again": [32, 32], "canvases": [32, 64], "batch": [32, 96], "narrow": [8, 24],
        "answer": [8, 32], "vocabulary": [32, 32],
    }  # fmt: skip
    assert [p.rows for p in report.sweep("batch")] == [32, 96] and [p.rows for p in report.sweep("narrow")] == [8, 24]
    assert [left_out.split(": ")[0] for left_out in report.skipped] == ["prompt 20000", "again 20000"]
    assert all("16384" in left_out for left_out in report.skipped)


def test_relative_is_to_the_first_value(report: ScalingReport) -> None:
    for sweep in report.settings.sweeps:
        first, last = report.sweep(sweep)
        assert first.relative == 1.0
        assert last.relative == pytest.approx(last.tokens_per_second / first.tokens_per_second)
        assert last.tokens_per_second == pytest.approx(last.tokens / last.seconds)
        for point in (first, last):
            assert 0 < point.ms_per_step < 1000 * point.seconds
            assert 0 < point.ms_prompt < 1000 * point.seconds


def test_a_prompt_that_was_encoded_before_costs_less(llm: LLM, report: ScalingReport) -> None:
    assert llm.engine.prefix_counters.reused_tokens >= 32 + 192, "whole blocks of both prompts"
    assert report.sweep("again")[1].ms_prompt < report.sweep("prompt")[1].ms_prompt


def test_chart_and_tables_show_every_point(report: ScalingReport) -> None:
    texts = [e.text for e in ElementTree.fromstring(scaling_plot(report)).iter() if e.tag.endswith("text")]
    for point in report.points:
        assert f"{point.value:,}" in texts
    assert "how cost grows" in (texts[0] or "")
    assert len(list(scaling_tables(report))) > 12
    assert json.loads(json.dumps(report.json(), allow_nan=False))["format"] == "dgemma-bench-scaling"


def test_scaling_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--sweeps", "batch", "--batches", "1,2", "--repeats", "1", "--fixed-steps", "2", "--canvas-length", "16")
    files = ("--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.svg"))
    assert main(["bench", "scaling", "--model", str(made), *quick, *files]) == 0
    assert "x first" in capsys.readouterr().out
    assert [p["value"] for p in json.loads((tmp_path / "s.json").read_text())["points"]] == [1, 2]
    ElementTree.parse(tmp_path / "s.svg")
    assert main(["bench", "scaling", "--model", str(made), "--sweeps", "batch,width"]) == 2
    assert "got batch, width" in capsys.readouterr().err


# -- the table -------------------------------------------------------------------------


class Pretend(TableRun):
    """A table whose commands take no time: they write what a benchmark would, and are remembered."""

    def __init__(self, *arguments: Any, broken: str = "") -> None:
        super().__init__(*arguments)
        self.commands: list[Sequence[str]] = []
        self._broken = broken

    def _command(self, arguments: Sequence[str]) -> None:
        self.commands.append(arguments)
        if self._broken and self._broken in " ".join(arguments):
            raise DgemmaError("it broke")
        if arguments[1] == "make" or arguments[0] == "quantize":
            folder = Path(arguments[3] if arguments[1] == "make" else arguments[2])
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            return
        place = Path(arguments[arguments.index("--json") + 1])
        exact = "--no-floor" not in arguments
        row = {"side": "dgemma", "kind": "fixed", "ms_per_step": 20.0, "share_of_floor": 0.75 if exact else None}
        ratios = [
            {"name": "denoising step", "slow": "transformers, fixed", "value": 4.5},
            {"name": "denoising step", "slow": "transformers (medium, tuned), fixed", "value": 2.5},
        ]
        one = {
            "rows": [row], "ratios": ratios, "floor": {"ms": 15.0} if exact else None, "agreement": 1e-6,
            "machine": {"load": 0.1},
        }  # fmt: skip
        place.write_text(json.dumps({"reports": [one]}))


def table(folder: Path, broken: str = "", **changes: Any) -> Pretend:
    settings = TableSettings(**{"checkpoints": ("default", "moe262k"), "extras": ("memory",), **changes})
    return Pretend(folder, settings, lambda text: None, broken=broken)


def test_table_makes_measures_and_goes_on(tmp_path: Path) -> None:
    first = table(tmp_path, broken="decode-moe262k-bfloat16-2.part")
    data = first.run()
    cells = [c for c in first.commands if c[1] in ("decode", "memory")]
    assert len(cells) == 2 * 3 * 2 + 2
    others = [c[:3] if c[1] == "make" else c[0] for c in first.commands if c not in cells]
    assert others == ["quantize", ("bench", "make", "moe262k"), "quantize"]
    assert list(data["failed"]) == ["decode-moe262k-bfloat16-2"]
    second = table(tmp_path)
    data = second.run()
    assert [c[1] for c in second.commands] == ["decode"] and not data["failed"]
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(json.dumps(data))
    third = table(tmp_path, repeats=4)
    third.run()
    assert len([c for c in third.commands if c[1] == "decode"]) == 12


def test_table_shows_numbers_beside_their_targets(tmp_path: Path) -> None:
    run = table(tmp_path, broken="--threads 2", extras=())
    run.run()
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| default | float32 | 1 | 20.00 | 15.00 | 75 % (>= 70 %) | 4.50 (>= 4.00) | 2.50 |"
    assert lines[3].count("not measured yet") == 5
    assert lines[6] == "| default | int8dyn | 1 | 20.00 | not measured yet | not measured yet | 4.50 (>= 5.00) | 2.50 |"


def test_table_says_what_its_other_cells_found() -> None:
    def point(sweep: str, value: int, relative: float, seconds: float) -> dict[str, Any]:
        return {"sweep": sweep, "value": value, "relative": relative, "seconds": seconds}

    side = {"side": "dgemma", "extra": 40.0, "peak": 700.0, "allowed": 650.0, "within_allowed": False}
    points = [point("batch", 1, 1, 2), point("batch", 8, 0.97, 2), point("narrow", 8, 2.2, 2)]
    points += [point("answer", 16, 1, 0.5), point("answer", 64, 1, 1), point("answer", 256, 1, 4)]
    ratio = {"name": "diffusion against autoregression", "value": 1.5, "fast": "dgemma, own", "slow": "dgemma, ar"}
    extras = {
        "memory-x": {"format": "dgemma-bench-memory", "sides": [side]},
        "batch-x": {"format": "dgemma-bench-scaling", "points": points},
        "start-x": {"format": "dgemma-bench-start", "first_draft": 2.5},
        "modes-x": {"format": "dgemma-bench-decode", "reports": [{"ratios": [ratio]}]},
    }
    assert markdown({"rows": [], "extras": extras}).splitlines()[3:] == [
        "* memory-x: dgemma takes 40.00 MB a canvas (ours: <= 64), peak 700 MB, not within "
        "1.15 x file + 64 MB + imports = 650 MB",
        "* batch-x: batch of 8: 0.97 x the tokens per second of one canvas (>= 0.95)",
        "* batch-x: narrow of 8: 2.20 x the tokens per second of one canvas (>= 2.0)",
        "* batch-x: an answer of 16 tokens takes 0.12 of one of 256 (<= 0.25)",
        "* start-x: first draft 2.50 s after the start of the process (<= 3)",
        "* modes-x: diffusion against autoregression: 1.50 x (dgemma, own against dgemma, ar)",
    ]


def test_a_half_written_cell_is_measured_again(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoints": ("default",), "formats": ("float32",), "threads": (1,), "extras": ()}
    table(tmp_path, **changes).run()
    (cell,) = (tmp_path / "cells").glob("*.json")
    cell.write_text(cell.read_text()[:40])
    again = table(tmp_path, **changes)
    again.run()
    assert len(again.commands) == 1


def test_every_command_of_the_table_is_one_that_dgemma_takes(tmp_path: Path) -> None:
    from dgemma.cli import _parser

    small = save_model(tmp_path / "small")
    run = table(tmp_path / "work", checkpoints=(str(small), "default"), extras=("memory", "modes", "batch", "start"))
    names = set()
    for cell in run.cells():
        arguments = _parser().parse_args([*cell.arguments, "--json", "x.json"])
        names.add(arguments.job.__name__)
    assert names == {"_decode", "_memory", "_scaling", "_start"}
    assert {cell.name.split("-")[1] for cell in run.cells()} == {"small", "default"}
    with pytest.raises(RequestError, match="names of their own, got small, small"):
        TableSettings(checkpoints=("a/small", "b/small"))
    with pytest.raises(RequestError, match="formats must be some of float32, bfloat16, int8dyn; got fp4"):
        TableSettings(formats=("fp4",))
