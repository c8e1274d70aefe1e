"""Recipes: read strictly; run by the real command; killed and resumed; the shipped ones do what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dgemma import LLM
from dgemma.checkpoint.load import load_checkpoint
from dgemma.cli import main
from dgemma.errors import ConfigError
from dgemma.train import state
from dgemma.train.metrics import read_journal
from dgemma.train.recipe import load_recipe, recipe_of
from dgemma.train.run import build_model, run_recipe

REPO = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPO / "recipes").glob("*.yaml"))
TOKENIZER = str(REPO / "dgemma" / "models" / "default")
SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "layers": "sf", "kv_heads": 1,
    "head_dim": 8, "full_kv_heads": 1, "full_head_dim": 8, "canvas_length": 8, "num_experts": 2, "top_k_experts": 1,
    "expert_size": 8,
}  # fmt: skip


def tiny(tmp_path: Path, **changes: Any) -> Path:
    """A recipe of a network of 70,000 parameters, trained on twenty lines."""
    text = tmp_path / "text.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": f"The {n}. day was fine."}) + "\n" for n in range(20)))
    data = {
        "model": {"shape": SHAPE, "tokenizer": TOKENIZER},
        "data": {
            "sources": [{"path": str(text)}], "widths": {4: 1, 8: 1}, "tokens": 64, "held_out": 0.2,
            "cache": str(tmp_path / "cache"),
        },
        "optimizer": {"ema": 0.5},
        "loop": {"steps": 6, "precision": "fp32", "save_every": 1, "accumulation": 2},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}))
    return path


def test_the_result_names_the_widths_that_it_was_trained_with(tmp_path: Path) -> None:
    first = run_recipe(load_recipe(tiny(tmp_path), ["loop.steps=1"]), tmp_path / "first", print)
    assert first.model is not None and load_checkpoint(first.model).config.canvas_widths == (4, 8)
    more = {"model": {"init": str(first.model)}}
    settings = ["loop.steps=1", "data.widths={16: 1, 2: 1}", "data.phases=[{first_step: 0, widths: {16: 1}}]"]
    second = run_recipe(load_recipe(tiny(tmp_path, **more), settings), tmp_path / "second", print)
    assert second.model is not None and load_checkpoint(second.model).config.canvas_widths == (4, 8, 16)


def command(*arguments: str | Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "dgemma", "train", *map(str, arguments)]
    return subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(read_journal(folder)) < count:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < limit
        time.sleep(0.01)


# -- reading -------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.loop.steps > 0
    assert "dgemma train" in path.read_text()


WRONG = [
    ({"loop": {"step": 3}}, "loop.step is not known here; did you mean steps?"),
    ({"loop": {"steps": "many"}}, "loop.steps: "),
    ({"loop": {"steps": 0}}, "loop.steps must be at least 1, got 0"),
    ({"optimiser": {}}, "optimiser is not known here; did you mean optimizer?"),
    ({"model": {"init": "default", "shape": SHAPE, "tokenizer": "x"}}, "exactly one of init, shape, autoregressive"),
    ({"model": {"shape": SHAPE}}, "model.shape needs model.tokenizer"),
    ({"model": {"shape": {**SHAPE, "layers": "sxs"}, "tokenizer": TOKENIZER}}, "letters s and f that end in f"),
    ({"data": {}}, "either sources or sudoku"),
    ({"objective": {"name": "best"}}, "objective name must be one of"),
    ({"data": {"sources": [{"path": "a", "kinds": "text"}]}}, "data.sources.0.kinds is not known here"),
    ({"lora": {}, "freeze": [{"first_step": 0, "train": ["all"]}]}, "exclude each other"),
]


@pytest.mark.parametrize(("changes", "text"), WRONG, ids=[text for _, text in WRONG])
def test_a_wrong_recipe_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], text: str
) -> None:
    assert main(["train", str(tiny(tmp_path, **changes)), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1, error


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    for content, text in (("a: [", "not YAML"), ("- 1", "mapping of sections, got list")):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(ConfigError, match=text):
            load_recipe(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


def test_settings_replace_entries(tmp_path: Path) -> None:
    recipe = load_recipe(tiny(tmp_path), ["loop.steps=9", "optimizer.lr=1e-3", "data.sources.0.kind=text"])
    assert (recipe.loop.steps, recipe.optimizer.lr, recipe.data.sources[0].kind) == (9, 1e-3, "text")
    with pytest.raises(ConfigError, match=r"section\.key=value, got 'loop\.steps'"):
        load_recipe(tiny(tmp_path), ["loop.steps"])


def test_a_scratch_model_has_the_recipes_shape(tmp_path: Path) -> None:
    start = build_model(load_recipe(tiny(tmp_path)).model, seed=0)
    assert [layer.kind for layer in start.model.config.layers] == ["sliding", "full"]
    assert start.model.config.hidden_size == 16 and start.generation.stop_tokens == (1,)


# -- running -------------------------------------------------------------------------


def test_a_run_from_recipe_to_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    samples = {"prompts": ["The"], "max_new_tokens": 4}
    assert main(["train", str(tiny(tmp_path, samples=samples)), "--out", str(folder), "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 steps in" in out and "held out" in out and "canvas, t 0.00-0.25" in out and "The|" in out
    assert (folder / "curves.png").exists()
    llm = LLM.load(folder / "model")
    assert llm.generate("The 3.", max_new_tokens=8).token_ids
    trained = dict(load_checkpoint(folder / "model").model.named_parameters())
    fresh = dict(build_model(load_recipe(tiny(tmp_path)).model, seed=0).model.named_parameters())
    assert not torch.equal(trained["embed.weight"], fresh["embed.weight"])
    # It is the average that is shipped.
    tensors = {"average": {name: torch.empty_like(value) for name, value in trained.items()}}
    found = state.latest(folder / "state")
    assert found is not None
    state.load(found, tensors)
    for name, value in trained.items():
        assert torch.equal(value, tensors["average"][name]), name
    assert main(["train", str(tiny(tmp_path)), "--out", str(folder), "--fresh"]) == 2


def test_killed_at_any_moment_and_resumed_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    """kill -9 twice, with shuffled sources, accumulation and an average; then the weights of an undisturbed run."""
    recipe = tiny(tmp_path, loop={"steps": 12, "precision": "fp32", "save_every": 2, "accumulation": 2})
    whole = command(recipe, "--out", tmp_path / "whole")
    cut = tmp_path / "cut"
    for steps in (3, 8):
        process = command(recipe, "--out", cut)
        wait_for_steps(cut, steps, process)
        process.kill()
        process.communicate()
    last = command(recipe, "--out", cut)
    for process in (whole, last):
        assert process.wait(300) == 0, process.stderr and process.stderr.read().decode()
    saved = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert saved[0] == saved[1]
    records = [[record | {"seconds": 0} for record in read_journal(tmp_path / name)] for name in ("whole", "cut")]
    assert records[0] == records[1] and len(records[0]) == 12


def test_stages_change_the_objective_at_their_step(tmp_path: Path) -> None:
    """From step 2 on the canvas is not trained: its loss is reported as zero."""
    stages = [{"first_step": 2, "objective": {"canvas_weight": 0.0}}]
    path = tiny(tmp_path, stages=stages, loop={"steps": 3, "precision": "fp32", "save_every": 1})
    run_recipe(load_recipe(path), tmp_path / "run", print)
    assert [record["canvas"] > 0 for record in read_journal(tmp_path / "run")] == [True, True, False]


def test_two_processes_make_the_model_of_one(tmp_path: Path) -> None:
    """The same recipe by `dgemma train` and under torchrun: one run, the same losses, the same result."""
    recipe = tiny(
        tmp_path,
        optimizer={"name": "adamw", "lr": 0.003},
        loop={"steps": 4, "precision": "fp32", "save_every": 2},
        data={
            "sources": [{"path": str(tmp_path / "text.jsonl")}], "widths": {8: 1}, "tokens": 512,
            "cache": str(tmp_path / "cache"),
        },
    )  # fmt: skip
    alone = command(recipe, "--out", tmp_path / "alone")
    assert alone.wait(300) == 0, alone.stderr and alone.stderr.read().decode()
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dgemma"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, "train", str(recipe), "--out", str(tmp_path / "both")],
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    one, two = (read_journal(tmp_path / name) for name in ("alone", "both"))
    for key in ("canvas", "encoder"):
        assert [r[key] for r in one] == pytest.approx([r[key] for r in two], abs=1e-5)
    assert [r["tokens"] for r in one] == [r["tokens"] for r in two]
    models = [dict(load_checkpoint(tmp_path / name / "model").model.named_parameters()) for name in ("alone", "both")]
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], atol=1e-4, rtol=0)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, loop={"steps": 100_000, "precision": "fp32", "save_every": 100_000})
    process = command(recipe, "--out", tmp_path / "run")
    wait_for_steps(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error.decode()
    assert b"the same command resumes" in out and b"Traceback" not in error
    assert state.latest(tmp_path / "run" / "state") is not None


def test_fine_tuning_the_shipped_model_teaches_it(tmp_path: Path) -> None:
    """The recipe for examples of one's own, cut short: it answers with the examples' words."""
    folder = tmp_path / "run"
    settings = [
        "loop.steps=16",
        "data.tokens=768",
        "data.held_out=0",
        f"data.cache={tmp_path / 'cache'}",
        "samples.prompts=[]",
    ]
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", str(REPO / "recipes" / "sft.yaml"), "--out", str(folder), *options]) == 0
    records = read_journal(folder)
    assert sum(r["encoder"] for r in records[-4:]) < 0.6 * sum(r["encoder"] for r in records[:4])
    question = [{"role": "user", "content": "Who are you?"}]
    before, after = (
        LLM.load(name).chat(question, max_new_tokens=24, mode="ar", temperature=0.0)
        for name in ("default", folder / "model")
    )
    assert "I am" not in before.text and after.text.startswith("I am a"), (before.text, after.text)


def test_unknown_keys_are_refused_at_every_depth() -> None:
    with pytest.raises(ConfigError, match=r"data\.phases\.0\.weight is not known"):
        recipe_of({"model": {"init": "default"}, "loop": {"steps": 1}, "data": {"phases": [{"weight": 1}]}})
