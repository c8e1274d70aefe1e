"""Train, continue or fine-tune a model as a recipe says; run it again to resume."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli.output import write
from dgemma.errors import ConfigError

if TYPE_CHECKING:
    from dgemma.train.recipe import Recipe
    from dgemma.train.run import Outcome

NAME = "train"
HELP = "train, continue or fine-tune a model from a recipe"
INTERRUPTED = 130

# Activations are large, short-lived allocations: keep such blocks instead of returning them to the kernel every step.
_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_TOP_PAD_": "1000000000"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file, see docs/recipes.md and the folder recipes/")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="read these instead of the recipe's sources")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--model", metavar="NAME", help="start from this checkpoint instead of the recipe's")
    parser.add_argument("--steps", type=int, metavar="N", help="short for --set loop.steps=N")
    parser.add_argument("--seed", type=int, metavar="N", help="short for --set loop.seed=N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change an entry: loop.steps=50"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--fresh", action="store_true", help="refuse to resume: the folder must hold no run")


def run(arguments: argparse.Namespace) -> int:
    _keep_memory()
    import torch

    from dgemma.train.recipe import load_recipe
    from dgemma.train.run import run_recipe

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    named = {name: getattr(arguments, name) for name in ("steps", "seed")}
    short = [f"loop.{name}={value}" for name, value in named.items() if value is not None]
    if arguments.model:
        short.append(f"model.init={arguments.model}")
    recipe = load_recipe(arguments.recipe, [*arguments.set, *short])
    if arguments.data:
        recipe = _with_data(recipe, arguments.data)
    folder = arguments.out or Path("runs") / arguments.recipe.stem
    if arguments.fresh and (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder} holds a run already; leave --fresh out to resume it, or give another --out")
    outcome = run_recipe(recipe, folder, lambda text: print(text, file=sys.stderr))
    if int(os.environ.get("RANK", "0")):
        return 0
    if outcome.model is None:
        write(f"interrupted at step {outcome.run.step}; the same command resumes\n")
        return INTERRUPTED
    _tell(recipe, folder, outcome)
    return 0


def _keep_memory() -> None:
    """Start anew with an allocator that keeps its memory; glibc reads these variables only at its beginning."""
    started = Path(sys.argv[0])
    is_command = started.name == "dgemma" or (started.parent.name, started.name) == ("dgemma", "__main__.py")
    if is_command and "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "dgemma", *sys.argv[1:]], {**os.environ, **_MALLOC})


def _with_data(recipe: Recipe, paths: list[str]) -> Recipe:
    """The same options for other files; the recipe's first source says how they are read."""
    if not recipe.data.sources:
        raise ConfigError("--data: this recipe reads no sources")
    first = recipe.data.sources[0]
    return replace(recipe, data=replace(recipe.data, sources=tuple(replace(first, path=path) for path in paths)))


def _tell(recipe: Recipe, folder: Path, outcome: Outcome) -> None:
    run, before, after = outcome.run, outcome.before, outcome.after
    write(f"{run.step} steps in {run.seconds / 60:.1f} minutes -> {outcome.model}\n")
    if before is not None and after is not None:
        write(f"\nheld out ({after.tokens} tokens), nats a token    before    after\n")
        rows = [("encoder", before.encoder, after.encoder), ("canvas", before.canvas, after.canvas)]
        rows += [(f"canvas, t {level}", before.by_t[level], after.by_t[level]) for level in sorted(after.by_t)]
        write("".join(f"  {name:<40}{old:>9.3f}{new:>9.3f}\n" for name, old, new in rows))
    if recipe.samples.prompts:
        _show_samples(recipe, outcome.model)
    write(f"\ncurves: {folder / 'curves.png'}    try it: dgemma generate --model {outcome.model} PROMPT\n")


def _show_samples(recipe: Recipe, model: Path | None) -> None:
    """The same prompts and seeds answered by the model before and after."""
    from dgemma.api import LLM

    samples = recipe.samples
    assert model is not None
    for title, name in (("before", recipe.model.init), ("after", str(model))):
        if name is None:
            continue
        llm = LLM.load(name)
        write(f"\n{title}\n")
        for index, prompt in enumerate(samples.prompts):
            settings: dict[str, Any] = {"max_new_tokens": samples.max_new_tokens, "seed": samples.seed + index}
            if samples.chat:
                text = llm.chat([{"role": "user", "content": prompt}], **settings).text
                write(f"  > {prompt}\n    {' '.join(text.split())}\n")
            else:
                text = llm.generate(prompt, **settings).text
                write(f"  {prompt}|{' '.join(text.split())}\n")
