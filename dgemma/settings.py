"""What a user may set: the same names as flags, as `DGEMMA_*` variables and as keys of a TOML file.

A flag wins over the environment, the environment over the file, and what none of them sets stays as the
checkpoint has it. Knows no command line and loads no model.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dgemma.config import EngineConfig, GenerationConfig
from dgemma.config.engine import KV_CACHE_DTYPES
from dgemma.errors import ConfigError, RequestError

PREFIX = "DGEMMA_"
# server; file; kernels; `make run`; a test
_READ_ELSEWHERE = frozenset({"API_KEYS", "CONFIG", "NATIVE", "PROMPT", "REPORT"})


@dataclass(frozen=True)
class Option:
    """One setting. `field` is its name in `GenerationConfig`; empty for what concerns loading the model."""

    name: str
    kind: type
    help: str
    field: str = ""
    choices: tuple[str, ...] = ()
    nullable: bool = False
    """Whether the word `none` is a value: it switches the thing off."""

    def parse(self, text: str) -> Any:
        """The value that a text from a flag or a variable stands for, or a `RequestError`."""
        if self.nullable and text.lower() == "none":
            return None
        try:
            value = self.kind(text)
        except ValueError:
            raise RequestError(f"{self.name} must be {self._wanted()}, got {text!r}") from None
        return self.check(value)

    def check(self, value: Any) -> Any:
        """`value` if it has this option's type, or a `RequestError`. A whole number is a real one too."""
        if self.nullable and isinstance(value, str) and value.lower() == "none":
            return None
        good = isinstance(value, (int, float) if self.kind is float else self.kind)
        if not good or isinstance(value, bool) or (self.choices and value not in self.choices):
            raise RequestError(f"{self.name} must be {self._wanted()}, got {value!r}")
        return value

    def _wanted(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        word = {int: "a whole number", float: "a number", str: "a text"}[self.kind]
        return f"{word} or none" if self.nullable else word


LOADING = (
    Option("model", str, "a shipped name, a checkpoint folder, or a Hugging Face id"),
    Option("device", str, "auto, cpu, cuda, cuda:N or mps"),
    Option("dtype", str, "type of the weights in memory", choices=("auto", "float32", "bfloat16", "float16")),
    Option("threads", int, "CPU threads"),
    Option("drafter", str, "mode verified: another model, whose canvases draft"),
    Option("kv_cache_dtype", str, "how keys and values are kept; fp8 halves them and rounds", choices=KV_CACHE_DTYPES),
)
GENERATION = (
    Option(
        "mode", str, "diffusion (canvases), ar (token by token) or verified (ar, drafted by canvases)", "mode",
        ("diffusion", "ar", "verified"),
    ),
    Option("verify_draft", str, "mode verified: a draft's tokens are the likeliest or drawn", "verify_draft",
           ("argmax", "sample")),
    Option("verify_pace", str, "mode verified: draft as it pays, or always", "verify_pace", ("adaptive", "fixed")),
    Option("max_new_tokens", int, "at most so many tokens", "max_new_tokens"),
    Option("seed", int, "the same seed gives the same text", "seed"),
    Option("steps", int, "at most so many denoising steps a canvas", "max_denoising_steps"),
    Option("canvas_length", int, "positions of a canvas", "canvas_length", nullable=True),
    Option(
        "narrow", str, "fewer positions: never, where the rest is short, or at first, too (adaptive)", "narrow",
        ("auto", "never", "short", "adaptive"),
    ),
    Option("sampler", str, "entropy_bound, confidence or ancestral", "sampler"),
    Option("entropy_bound", float, "nats that one step's accepted positions may sum to", "entropy_bound"),
    Option("accept_confidence", float, "confidence sampler: the least probability", "accept_confidence"),
    Option("t_max", float, "temperature of the first step", "t_max"),
    Option("t_min", float, "temperature that the last step comes close to", "t_min"),
    Option("temperature", float, "scales the draw only; 0 draws the most likely token", "temperature"),
    Option("top_k", int, "draw from the k most likely tokens; 0 is all", "top_k"),
    Option("top_p", float, "only the most likely tokens of this total probability (slower)", "top_p"),
    Option("presence_penalty", float, "taken from the logits of tokens that the answer has", "presence_penalty"),
    Option("frequency_penalty", float, "the same, as often as it has them", "frequency_penalty"),
    Option(
        "stability_threshold", int, "steps without change before a canvas may stop", "stability_threshold",
        nullable=True,
    ),
    Option(
        "confidence_threshold", float, "mean entropy in nats below which a canvas may stop",
        "confidence_threshold", nullable=True,
    ),
    Option("convention", str, "stop and commit as hf or as jax does", "convention", ("hf", "jax")),
)  # fmt: skip
OPTIONS: Mapping[str, Option] = {option.name: option for option in (*LOADING, *GENERATION)}


_ENGINE = EngineConfig()


@dataclass(frozen=True)
class Settings:
    """Which model to load and how, and what generation is to be done otherwise than the checkpoint says."""

    model: str = "default"
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    drafter: str | None = None
    kv_cache_dtype: str = "auto"
    generation: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `GenerationConfig` that somebody set."""

    @property
    def loading(self) -> dict[str, Any]:
        """How the model is loaded, as `LLM.load` takes it beside the model's name and an engine."""
        return {name: getattr(self, name) for name in ("device", "dtype", "threads", "drafter")}

    def engine(self, usual: EngineConfig = _ENGINE) -> EngineConfig:
        """`usual` with what somebody set."""
        return replace(usual, kv_cache_dtype=self.kv_cache_dtype)

    @property
    def of_requests(self) -> dict[str, Any]:
        """`generation` as the defaults of many requests: without the seed, which would make them all alike."""
        return {name: value for name, value in self.generation.items() if name != "seed"}


def resolve(flags: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Merge flags (name to value; absent means not given), environment and file.

    Unknown names and values of the wrong type are a `ConfigError` or `RequestError` that names the source.
    """
    environ = os.environ if environ is None else environ
    values = {**from_file(environ), **from_environment(environ), **flags}
    loading = {option.name: values[option.name] for option in LOADING if option.name in values}
    chosen = {option.field: values[option.name] for option in GENERATION if option.name in values}
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", loading.get("device", "auto")):
        raise RequestError(f"device must be auto, cpu, cuda, cuda:N or mps; got {loading['device']!r}")
    if loading.get("threads") is not None and loading["threads"] < 1:
        raise RequestError(f"threads must be a whole number of at least 1, got {loading['threads']}")
    _check_generation(chosen)
    return Settings(**loading, generation=chosen)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings among the `DGEMMA_*` variables. An empty variable counts as not set."""
    values = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable.removeprefix(PREFIX) in _READ_ELSEWHERE or not text:
            continue
        option = OPTIONS.get(variable.removeprefix(PREFIX).lower())
        if option is None or variable != variable.upper():
            known = ", ".join(PREFIX + name.upper() for name in OPTIONS)
            raise ConfigError(f"unknown environment variable {variable}; known: {PREFIX}CONFIG, {known}")
        values[option.name] = _blaming(variable, option.parse, text)
    return values


def config_path(environ: Mapping[str, str]) -> tuple[Path, bool]:
    """Where the file is, and whether it was asked for by name (`DGEMMA_CONFIG`), so that it must exist."""
    named = environ.get(f"{PREFIX}CONFIG")
    if named:
        return Path(named).expanduser(), True
    home = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or "~").expanduser() / ".config")
    return home / "dgemma" / "config.toml", False


def from_file(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings in the configuration file; none if there is no file in the default place."""
    path, named = config_path(environ)
    if not named and not path.is_file():
        return {}
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for name in data:
        if name not in OPTIONS:
            raise ConfigError(f"{path}: unknown key {name!r}; known: {', '.join(OPTIONS)}")
    return {name: _blaming(f"{path}", OPTIONS[name].check, value) for name, value in data.items()}


def _blaming(source: str, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except RequestError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_generation(chosen: Mapping[str, Any]) -> None:
    """Find bad values before a model is loaded. Bounds that depend on the checkpoint's own come after."""
    temperatures = {"t_min", "t_max"} & set(chosen)
    open_ended = temperatures if len(temperatures) == 1 else set()
    GenerationConfig(**{name: value for name, value in chosen.items() if name not in open_ended})
