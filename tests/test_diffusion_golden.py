"""Golden trajectories: ours still, and where the convention is hf, transformers' too."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_sampler import HfSampler
from make_golden import CAP, CASES, FOLDER, TEXT, VOCAB, denoiser, text_of, trajectory

from dgemma.diffusion.samplers import SAMPLERS
from dgemma.kernels.reference import softcap

Golden = dict[str, Any]
EVERY = pytest.mark.parametrize("name", list(CASES))
ENDED = [name for name in CASES if not name.endswith("_cap")]


def read(name: str) -> Golden:
    return json.loads((FOLDER / f"trajectory_{name}.json").read_text(encoding="utf-8"))


@EVERY
def test_the_trajectory_is_still_the_same(name: str) -> None:
    stored, made = read(name), trajectory(CASES[name])
    # A float32 sum may differ in its last digits between processors; the decisions may not.
    for old, new in zip(stored["steps"], made["steps"], strict=True):
        assert new.pop("entropy") == pytest.approx(old.pop("entropy"), abs=3e-5)
    assert made == stored


def test_every_file_has_a_case_and_the_text_form_is_stable() -> None:
    assert {path.stem for path in FOLDER.glob("trajectory_*.json")} == {f"trajectory_{name}" for name in CASES}
    for name in CASES:
        assert (FOLDER / f"trajectory_{name}.json").read_text(encoding="utf-8") == text_of(read(name))
    assert {read(name)["settings"]["sampler"] for name in CASES} == set(SAMPLERS)


@EVERY
def test_what_a_golden_file_must_show(name: str) -> None:
    golden = read(name)
    steps, settings = golden["steps"], golden["settings"]
    assert golden["convention"] == CASES[name].convention == name.partition("_")[0]
    assert len(steps) >= 8
    assert [step["step"] for step in steps] == list(range(settings["max_denoising_steps"], 0, -1))[: len(steps)]
    assert steps[0]["temperature"] == settings["t_max"]
    assert any(
        before["accepted"][i] and not after["accepted"][i] and before["next"][i] != after["next"][i]
        for before, after in pairwise(steps)
        for i in range(len(TEXT))
    ), "a token that was accepted is noise again one step later"
    assert any(before["argmax"] != after["argmax"] for before, after in pairwise(steps))
    assert [step["stop"] for step in steps[:-1]] == [False] * (len(steps) - 1)
    assert steps[-1]["stop"] == (golden["stopped"] == "stable") == (name in ENDED)
    for step, following in pairwise(steps):
        assert step["next"] == following["read"]
    for step in steps:
        for i, accepted in enumerate(step["accepted"]):
            if accepted:
                assert step["next"][i] == step["draw"][i]
            elif settings["sampler"] != "ancestral":
                assert step["next"][i] == step["fresh"][i]


@pytest.mark.parametrize("name", ENDED)
def test_the_stop_is_by_confidence_before_the_cap(name: str) -> None:
    golden = read(name)
    settings, last = golden["settings"], golden["steps"][-1]
    assert last["step"] > 1
    assert sum(last["entropy"]) / len(TEXT) < settings["confidence_threshold"]
    if golden["convention"] == "hf":
        equal = [step["argmax"] for step in golden["steps"][-1 - settings["stability_threshold"] :]]
        assert all(argmax == last["argmax"] for argmax in equal)
    else:
        assert last["argmax"] == last["read"]
    assert golden["committed"] == TEXT


def test_hf_commits_the_argmax_and_jax_the_sampled_and_renoised_canvas() -> None:
    for name, kind, other in (("hf_cap", "argmax", "next"), ("jax_cap", "next", "argmax")):
        golden = read(name)
        assert golden["committed"] == golden["steps"][-1][kind] != golden["steps"][-1][other]


@pytest.mark.parametrize("name", ["hf", "jax"])
def test_the_conventions_stop_at_different_steps(name: str) -> None:
    """The same canvas, seed and denoiser: jax waits for a canvas that was wholly accepted the step before."""
    other = {"hf": "jax", "jax": "hf"}[name]
    assert CASES[name].with_(convention=other) == CASES[other]
    ours, theirs = read(name)["steps"], read(other)["steps"]
    assert len(ours) != len(theirs)
    for a, b in zip(ours, theirs, strict=False):
        assert {**a, "stop": 0} == {**b, "stop": 0}


@pytest.mark.parametrize("name", [n for n in CASES if n in ("hf", "hf_cap", "hf_three_equal")])
def test_transformers_replays_the_hf_files(name: str) -> None:
    """Its own step, given the stored draws and fresh tokens and the same denoiser."""
    golden = read(name)
    theirs = HfSampler(torch.tensor([golden["steps"][0]["read"]]), CASES[name], VOCAB)
    for step in golden["steps"]:
        assert theirs.canvas[0].tolist() == step["read"] and not theirs.finished.any()
        logits = softcap(denoiser(theirs.canvas[0]), CAP)
        theirs.step(step["step"], logits[None], torch.tensor([step["draw"]]), torch.tensor([step["fresh"]]))
        assert theirs.argmax[0].tolist() == step["argmax"]
        assert theirs.accepted[0].int().tolist() == step["accepted"]
        assert theirs.canvas[0].tolist() == step["next"]
        assert bool(theirs.finished) == step["stop"]
    assert theirs.argmax[0].tolist() == golden["committed"]
