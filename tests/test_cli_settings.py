"""Where settings come from, which source wins, and what is told about wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dgemma.config import GenerationConfig
from dgemma.diffusion.samplers import SAMPLERS
from dgemma.errors import ConfigError, RequestError
from dgemma.settings import GENERATION, OPTIONS, Settings, resolve


def file(tmp_path: Path, text: str) -> dict[str, str]:
    """An environment whose configuration file holds `text`."""
    path = tmp_path / "dgemma" / "config.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return {"XDG_CONFIG_HOME": str(tmp_path)}


def test_nothing_set_leaves_all_to_the_checkpoint(tmp_path: Path) -> None:
    assert resolve({}, {"HOME": str(tmp_path)}) == Settings()


def test_flag_over_environment_over_file(tmp_path: Path) -> None:
    environ = file(tmp_path, 'model = "file"\nseed = 1\nsteps = 10\ntop_p = 1\ndevice = "cpu"\n')
    environ |= {"DGEMMA_SEED": "2", "DGEMMA_STEPS": "20", "DGEMMA_THREADS": "3", "OTHER": "x"}
    settings = resolve({"seed": 3, "t_min": 0.1}, environ)
    assert settings == Settings(
        model="file",
        device="cpu",
        threads=3,
        generation={"seed": 3, "max_denoising_steps": 20, "top_p": 1, "t_min": 0.1},
    )


def test_every_option_is_a_field_and_every_field_an_option() -> None:
    left_out = {"choice", "stop_tokens", "pad_token", "logit_bias"}
    assert {option.field for option in GENERATION} == {f.name for f in fields(GenerationConfig)} - left_out
    assert not set(OPTIONS) & {"config", "prompt"}


def test_the_help_names_every_sampler() -> None:
    assert all(name in OPTIONS["sampler"].help for name in SAMPLERS)


def test_none_switches_off(tmp_path: Path) -> None:
    environ = file(tmp_path, 'stability_threshold = "none"\n') | {"DGEMMA_CONFIDENCE_THRESHOLD": "None"}
    assert resolve({}, environ).generation == {"stability_threshold": None, "confidence_threshold": None}


def test_places_of_the_file(tmp_path: Path) -> None:
    home = tmp_path / ".config" / "dgemma"
    home.mkdir(parents=True)
    (home / "config.toml").write_text("seed = 5")
    assert resolve({}, {"HOME": str(tmp_path)}).generation == {"seed": 5}
    named = tmp_path / "mine.toml"
    named.write_text("seed = 6")
    assert resolve({}, {"HOME": str(tmp_path), "DGEMMA_CONFIG": str(named)}).generation == {"seed": 6}
    assert resolve({}, {"HOME": str(tmp_path), "DGEMMA_SEED": ""}).generation == {"seed": 5}


FILES = {
    "unknown key": ("sede = 1", r"config\.toml: unknown key 'sede'; known: model, device, .*seed"),
    "table": ("[generation]\nseed = 1", "unknown key 'generation'"),
    "no toml": ("seed = ", r"config\.toml: Invalid value"),
    "text for a number": ('seed = "1"', r"config\.toml: seed must be a whole number, got '1'"),
    "number for a text": ("model = 1", "model must be a text, got 1"),
    "boolean": ("steps = true", "steps must be a whole number, got True"),
    "real for whole": ("steps = 1.5", "steps must be a whole number"),
    "no choice": ('mode = "fast"', "mode must be one of diffusion, ar, verified, got 'fast'"),
}


@pytest.mark.parametrize("case", FILES)
def test_faults_in_the_file(case: str, tmp_path: Path) -> None:
    text, told = FILES[case]
    with pytest.raises(ConfigError, match=told):
        resolve({}, file(tmp_path, text))


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"DGEMMA_SEDE": "1"}, "unknown environment variable DGEMMA_SEDE; known: DGEMMA_CONFIG, DGEMMA_MODEL"),
        ({"DGEMMA_seed": "1"}, "unknown environment variable DGEMMA_seed"),
        ({"DGEMMA_SEED": "one"}, "DGEMMA_SEED: seed must be a whole number, got 'one'"),
        ({"DGEMMA_MODE": "x"}, "DGEMMA_MODE: mode must be one of"),
        ({"DGEMMA_CONFIG": "/nowhere/x.toml"}, "/nowhere/x.toml cannot be read: No such file"),
    ],
)
def test_faults_in_the_environment(environ: Mapping[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve({}, {"HOME": "/nowhere", **environ})


def test_make_run_passes_its_prompt_on() -> None:
    assert resolve({}, {"HOME": "/nowhere", "DGEMMA_PROMPT": "x", "DGEMMA_NATIVE": "0"}) == Settings()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be a number at least 0, got nan"),
        ({"t_min": 0.9, "t_max": 0.8}, "t_max must be greater"),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
    ],
)
def test_bad_values_are_found_before_a_model_is_loaded(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        resolve(flags, {"HOME": "/nowhere"})


@pytest.mark.parametrize("flags", [{"t_min": 2.0}, {"t_max": 0.01}])
def test_one_temperature_alone_is_judged_with_the_checkpoint(flags: dict[str, Any]) -> None:
    assert resolve(flags, {"HOME": "/nowhere"}).generation == flags
