"""From a recipe to a trained checkpoint: builds what the loop needs, runs it, exports the result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgemma.checkpoint.autoregressive import load_autoregressive
from dgemma.checkpoint.load import Checkpoint, load_checkpoint
from dgemma.checkpoint.save import save_checkpoint
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.errors import ConfigError, DataError
from dgemma.model import DiffusionGemma
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.data.mixture import Mixture, Phase
from dgemma.train.data.rows import load_sources
from dgemma.train.freeze import apply_freeze
from dgemma.train.init import new_model
from dgemma.train.loop import Batches, Loss, Run, train
from dgemma.train.lora import add_lora, merge, save_adapter
from dgemma.train.measure import HeldOut, measure
from dgemma.train.objective import Losses, denoising_loss
from dgemma.train.parallel import Parallel
from dgemma.train.plot import plot_run
from dgemma.train.recipe import DataSection, ModelSection, PhaseSection, Recipe, SudokuSection
from dgemma.train.sudoku.examples import SudokuBatches
from dgemma.train.sudoku.network import give_board_hints

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Start:
    """What training begins with: float32 weights, sampler settings, and the folder of the text files."""

    model: DiffusionGemma
    generation: GenerationConfig
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `model` is the exported checkpoint (None when it was interrupted)."""

    run: Run
    model: Path | None
    before: HeldOut | None
    after: HeldOut | None


def run_recipe(recipe: Recipe, folder: Path, report: Callable[[str], None]) -> Outcome:
    """Train in `folder`, resuming what is there; `report` takes lines for the user.

    Writes `state/` and `metrics.jsonl`, at the end `curves.png`, `model/`, and `adapter/` with LoRA.
    """
    parallel = Parallel.from_environment()
    try:
        return _run(recipe, folder, report, parallel)
    finally:
        parallel.close()


def _run(recipe: Recipe, folder: Path, report: Callable[[str], None], parallel: Parallel) -> Outcome:
    say = report if parallel.rank == 0 else _silent
    start = build_model(recipe.model, recipe.loop.seed)
    batches, held = build_batches(recipe.data, start, recipe.loop.seed, say)
    model, before = start.model.to(recipe.loop.place), None
    if held is not None:
        before = measure(model, held, recipe.objective)
    if recipe.lora is not None:
        add_lora(model, recipe.lora, recipe.loop.seed)
    loss = _Staged(recipe, model)

    def before_step(step: int) -> None:
        apply_freeze(model, recipe.freeze, step)
        loss.at(step)

    run = train(
        model,
        batches,
        recipe.loop,
        folder,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        loss=loss,
        before_step=before_step,
        parallel=parallel,
        identity=_identity(recipe),
    )
    if not run.finished:
        return Outcome(run, None, before, None)
    trained = _result(model, run, parallel)
    if parallel.rank > 0:
        return Outcome(run, None, before, None)
    if recipe.lora is not None:
        save_adapter(folder / "adapter", trained, recipe.lora, base=recipe.model.init)
        merge(trained)
    after = measure(trained, held, recipe.objective) if held is not None else None
    files = {name: (start.folder / name).read_bytes() for name in TEXT_FILES if (start.folder / name).is_file()}
    trained.config = replace(trained.config, canvas_widths=_widths(recipe.data, trained.config))
    path = save_checkpoint(folder / "model", trained, start.generation, extra_files=files, dtype=recipe.loop.stored)
    plot_run(folder, title=folder.name)
    return Outcome(run, path, before, after)


def build_model(section: ModelSection, seed: int) -> Start:
    """The network in float32, as the section says."""
    folder = None if section.tokenizer is None else Path(section.tokenizer)
    if section.shape is not None:
        config = section.shape.config()
        model = new_model(config, seed)
        if section.hints == "board":
            give_board_hints(model, seed)
        generation = GenerationConfig(stop_tokens=config.eos_tokens, pad_token=config.pad_token)
    else:
        loaded = _load(section)
        model, generation, folder = loaded.model, loaded.generation, folder or loaded.folder
    if folder is None or not (folder / TEXT_FILES[0]).is_file():
        raise ConfigError(f"model.tokenizer must be a folder with {TEXT_FILES[0]}, got {str(folder)!r}")
    for param in model.parameters():
        param.data = param.data.clone()  # a loaded weight may be a read-only view of its file
    return Start(model.train(), generation.with_(**section.generation), folder)


def _load(section: ModelSection) -> Checkpoint:
    if section.autoregressive is not None:
        return load_autoregressive(section.autoregressive, canvas_length=section.canvas_length, dtype=torch.float32)
    assert section.init is not None
    loaded = load_checkpoint(section.init, dtype=torch.float32)
    if loaded.format is not None:
        raise ConfigError(
            f"model.init: {section.init} is quantised ({loaded.format.name}), and only plain weights are trained: "
            "name the checkpoint it was made from"
        )
    return loaded


def build_batches(
    section: DataSection, start: Start, seed: int, report: Callable[[str], None]
) -> tuple[Batches, Batches | None]:
    """Training batches, and held-out ones if the recipe keeps any (`data.held_out`)."""
    if bool(section.sources) == (section.sudoku is not None):
        raise ConfigError("data needs either sources or sudoku")
    if section.sudoku is not None:
        return _puzzles(section.sudoku, seed), None
    tokenizer = Tokenizer.load(start.folder)
    template = ChatTemplate.load(start.folder)
    sources = load_sources(section.sources, tokenizer, template, Path(section.cache), report)
    pairs = [source.split(section.held_out) for source in sources]
    mixture = Mixture(
        sources=[kept for kept, _ in pairs],
        widths=tuple(section.widths),
        phases=_phases(section),
        tokens=section.tokens,
        max_prefix=section.max_prefix,
        blocks=section.blocks,
        eos=start.model.config.eos_tokens[0],
        pad=start.model.config.pad_token,
        seed=seed,
    )
    apart = [held for _, held in pairs if held is not None]
    if not apart:
        return mixture, None
    return mixture, replace(mixture, sources=apart, phases=(Phase(0, [1.0] * len(apart), [1.0] * len(section.widths)),))


def _widths(section: DataSection, config: ModelConfig) -> tuple[int, ...]:
    """The canvas widths that the model has been trained with, now and before."""
    if section.sudoku is not None:
        return config.canvas_widths
    shares = [section.widths if phase.widths is None else phase.widths for phase in section.phases] or [section.widths]
    used = {width for mine in shares for width, share in mine.items() if share > 0}
    return tuple(sorted(used.union(config.canvas_widths)))


def _puzzles(section: SudokuSection, seed: int) -> SudokuBatches:
    path = Path(section.puzzles)
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it with recipes/sudoku/build_data.py")
    with np.load(path) as data:
        puzzles, solutions = data["puzzles"], data["solutions"]
    return SudokuBatches(puzzles, solutions, section.boards, section.draws, seed, section.most_givens)


def _phases(section: DataSection) -> list[Phase]:
    """The recipe's phases; what one leaves out is as in the sources and `widths`."""
    weights, widths = [spec.weight for spec in section.sources], section.widths
    phases = []
    for phase in section.phases or (PhaseSection(first_step=0),):
        mine = widths if phase.widths is None else phase.widths
        if set(mine) - set(widths):
            raise ConfigError(f"data.phases: widths must be among {sorted(widths)}, got {sorted(mine)}")
        shares = list(phase.weights or weights)
        if len(shares) != len(weights):
            raise ConfigError(f"data.phases: {len(weights)} sources need {len(weights)} weights, got {len(shares)}")
        phases.append(Phase(phase.first_step, shares, [mine.get(width, 0.0) for width in widths]))
    if phases[0].first_step:
        raise ConfigError(f"data.phases must begin at step 0, got {phases[0].first_step}")
    return phases


class _Staged:
    """The recipe's loss; which of its stages counts is a function of the step."""

    def __init__(self, recipe: Recipe, model: DiffusionGemma) -> None:
        first: Loss = partial(denoising_loss, objective=recipe.objective)
        if recipe.distil is not None:
            # The teacher is where the run began, also when it is resumed.
            teacher = copy.deepcopy(model).to(recipe.loop.dtype).eval().requires_grad_(False)
            first = partial(recipe.distil, teacher=teacher, objective=recipe.objective)
        later = [(stage.first_step, partial(denoising_loss, objective=stage.objective)) for stage in recipe.stages]
        self._stages: list[tuple[int, Loss]] = [(0, first), *later]
        self._now = first

    def at(self, step: int) -> None:
        self._now = next(loss for begin, loss in reversed(self._stages) if begin <= step)

    def __call__(self, *arguments: Any, **options: Any) -> Losses:
        return self._now(*arguments, **options)


@torch.no_grad()
def _result(model: DiffusionGemma, run: Run, parallel: Parallel) -> DiffusionGemma:
    """The trained weights (their average, if one was kept) in float32, whole on every rank."""
    weights = parallel.whole(run.optimizer.averaged())
    trained = parallel.plain(model).float().eval()
    for name, param in trained.named_parameters():
        if name in weights:
            param.copy_(weights[name])
    return trained


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What a resumed run must share with its beginning; its length may change."""
    data = {name: repr(value) for name, value in vars(recipe).items() if name not in ("loop", "samples")}
    return {**data, "loop.seed": recipe.loop.seed, "loop.accumulation": recipe.loop.accumulation}


def _silent(text: str) -> None:
    """What the other ranks say."""
