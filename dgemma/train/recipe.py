"""A training run as a value: read strictly from YAML, every section a frozen dataclass. Builds nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from dgemma.config import LayerConfig, ModelConfig
from dgemma.diffusion.loss import Objective
from dgemma.errors import ConfigError
from dgemma.train.data.rows import SourceSpec
from dgemma.train.distil import SelfDistillation
from dgemma.train.freeze import FreezePhase
from dgemma.train.loop import LoopConfig
from dgemma.train.lora import LoraConfig
from dgemma.train.optim import OptimConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A network from scratch. `layers` spells the attention kinds: s sliding, f full (the last one is full)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    layers: str
    kv_heads: int
    head_dim: int
    full_kv_heads: int
    full_head_dim: int
    canvas_length: int
    canvas_positions: int = 0
    sliding_window: int = 128
    num_experts: int = 0
    top_k_experts: int = 0
    expert_size: int = 0
    max_positions: int = 2048
    eos_tokens: tuple[int, ...] = (1,)

    def config(self) -> ModelConfig:
        """The model's configuration; `ConfigError` for a letter that names no kind."""
        if not self.layers or set(self.layers) - {"s", "f"} or self.layers[-1] != "f":
            raise ConfigError(f"model.shape.layers must be letters s and f that end in f, got {self.layers!r}")
        kinds = {
            "s": LayerConfig(kind="sliding", num_kv_heads=self.kv_heads, head_dim=self.head_dim),
            "f": LayerConfig(kind="full", num_kv_heads=self.full_kv_heads, head_dim=self.full_head_dim),
        }
        mine = {"layers", "kv_heads", "head_dim", "full_kv_heads", "full_head_dim"}
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in mine}
        return ModelConfig(layers=tuple(kinds[letter] for letter in self.layers), **same)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Where the weights come from, exactly one of: `init` (a checkpoint: name, folder or hub id), `shape` (from
    scratch) or `autoregressive` (a Gemma 4 checkpoint to convert).

    `tokenizer` is a folder with the tokenizer's files (a checkpoint brings its own). `hints: board` starts a Sudoku
    network (`sudoku.network`). `generation` changes the sampler settings that the result carries.
    """

    init: str | None = None
    shape: Shape | None = None
    autoregressive: str | None = None
    tokenizer: str | None = None
    canvas_length: int = 256
    hints: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in ("init", "shape", "autoregressive") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"model needs exactly one of init, shape, autoregressive; got {given or 'none'}")
        if self.shape is not None and self.tokenizer is None:
            raise ConfigError("model.shape needs model.tokenizer, a folder with tokenizer.json")
        if self.hints not in (None, "board"):
            raise ConfigError(f"model.hints must be board, got {self.hints!r}")


@dataclass(frozen=True, kw_only=True)
class PhaseSection:
    """From `first_step` on, other weights of the sources or other widths."""

    first_step: int
    weights: tuple[float, ...] | None = None
    widths: Mapping[int, float] | None = None


@dataclass(frozen=True, kw_only=True)
class SudokuSection:
    """Puzzles from recipes/sudoku/build_data.py; `boards` a step, each corrupted `draws` times."""

    puzzles: str
    boards: int = 32
    draws: int = 2
    most_givens: int = 46


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What is read: text sources, or Sudoku. `widths` maps canvas widths to shares; `tokens` is the size of a batch."""

    sources: tuple[SourceSpec, ...] = ()
    sudoku: SudokuSection | None = None
    widths: Mapping[int, float] = field(default_factory=lambda: {16: 0.4, 32: 0.3, 64: 0.2, 128: 0.1})
    phases: tuple[PhaseSection, ...] = ()
    tokens: int = 6144
    max_prefix: int = 32
    blocks: str = "all"
    held_out: float = 0.0
    cache: str = "build/tokens"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From `first_step` on, another objective."""

    first_step: int
    objective: Objective


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Prompts to answer before and after, so that the effect can be read."""

    prompts: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. What is not given has the defaults of the sections."""

    model: ModelSection
    loop: LoopConfig
    data: DataSection = field(default_factory=DataSection)
    objective: Objective = field(default_factory=Objective)
    stages: tuple[Stage, ...] = ()
    distil: SelfDistillation | None = None
    optimizer: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    lora: LoraConfig | None = None
    freeze: tuple[FreezePhase, ...] = ()
    samples: Samples = field(default_factory=Samples)

    def __post_init__(self) -> None:
        steps = [stage.first_step for stage in self.stages]
        if steps != sorted(set(steps)) or steps[:1] == [0]:
            raise ConfigError(f"stages must come in rising order after step 0, got first steps {steps}")
        if self.distil is not None and (self.stages or self.lora is not None or self.model.init is None):
            raise ConfigError("distil needs model.init, and neither stages nor lora")
        if self.lora is not None and self.freeze:
            raise ConfigError("lora and freeze exclude each other: LoRA freezes everything but its own deltas")


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe; each of `settings` (`section.key=value`, the value in YAML) replaces one entry.

    Raises `ConfigError` naming the file and the entry for anything unknown, missing or of a wrong type.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections, got {type(data).__name__}")
    for setting in settings:
        _set(data, setting)
    try:
        return recipe_of(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def recipe_of(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data; see `load_recipe`."""
    _refuse_unknown(Recipe, data, "")
    try:
        return TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}") from None


def _set(data: dict[str, Any], setting: str) -> None:
    name, equals, text = setting.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"a setting is section.key=value, got {setting!r}")
    place: Any = data
    for key in keys[:-1]:
        place = place[int(key)] if isinstance(place, list) and key.isdecimal() else place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"{setting!r}: {key} has no entries of its own")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(place, list):
        place[int(keys[-1])] = value
    else:
        place[keys[-1]] = value


def _refuse_unknown(kind: Any, data: Any, where: str) -> None:
    """pydantic ignores unknown keys of plain dataclasses; a recipe must not."""
    if get_origin(kind) in (Union, UnionType):
        for option in get_args(kind):
            _refuse_unknown(option, data, where)
    elif get_origin(kind) is tuple and isinstance(data, Sequence) and not isinstance(data, str):
        for index, item in enumerate(data):
            _refuse_unknown(get_args(kind)[0], item, f"{where}{index}.")
    elif is_dataclass(kind) and isinstance(data, Mapping):
        hints = get_type_hints(kind)
        for key, value in data.items():
            if key not in hints:
                near = difflib.get_close_matches(str(key), hints, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"{where}{key} is not known here{hint} Allowed: {', '.join(hints)}")
            _refuse_unknown(hints[key], value, f"{where}{key}.")
