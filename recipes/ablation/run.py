"""Which objective trains the default model best? Every objective with every seed, the same compute each; then a table.

    python recipes/ablation/run.py                  # 3 objectives x 3 seeds x 170 steps (a fifth of the shipped run)
    python recipes/ablation/run.py --quick          # a network of a toy's size, two steps: to see that it runs

Needs build/default (recipes/default/build_data.py). A folder per run; interrupt and rerun as you like, what is finished
is not done again. Several processes may share the work by `--objectives` or `--seeds`; the last one prints the table.
Nothing but the objective differs: recipe, data, order of batches and noise are functions of the seed alone, and every
model is sampled with the recipe's settings, which were fitted to the official objective.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from table import summary, verdict

from dgemma import LLM
from dgemma.checkpoint.load import load_checkpoint
from dgemma.diffusion.loss import OBJECTIVES
from dgemma.eval.judge import NgramJudge
from dgemma.eval.samples import story_score
from dgemma.train.recipe import Recipe, load_recipe
from dgemma.train.run import run_recipe

RECIPES = Path(__file__).resolve().parents[1]
sys.path.append(str(RECIPES / "default"))
import report  # noqa: E402

SHIPPED_STEPS, PHASE_STEP = 850, 225  # of recipes/default.yaml; the second phase begins at the same share of a run
SIZE = report.Size(
    stories=300, prose=60, bound_stories=60, bound_prose=30, bound_tokens=257, losses=1, prompts=10, seeds=2,
    new_tokens=160,
)  # fmt: skip
KINDS = ("stories", "chat", "prose")  # the recipe's sources in their order
TOY = ("hidden_size=32", "intermediate_size=48", "head_dim=16", "full_head_dim=16", "num_experts=0")


def recipe(objective: str, seed: int, steps: int, data: Path, quick: bool) -> Recipe:
    """The default recipe, shortened."""
    settings = [
        f"objective.name={objective}",
        f"loop.seed={seed}",
        f"loop.steps={steps}",
        f"schedule.warmup={min(30, max(1, steps // 5))}",
        f"data.phases.1.first_step={max(1, round(steps * PHASE_STEP / SHIPPED_STEPS))}",
        f"model.tokenizer={data / 'tokenizer'}",
    ]
    settings += [f"data.sources.{n}.path={data / f'train_{kind}.npz'}" for n, kind in enumerate(KINDS)]
    if quick:
        settings += ["data.tokens=512", *(f"model.shape.{entry}" for entry in TOY)]
    return load_recipe(RECIPES / "default.yaml", settings)


def evaluate(folder: Path, data: Path, judge: NgramJudge, size: Any) -> dict[str, float]:
    """The yardsticks of one model, all on held-out data."""
    llm, model = LLM.load(folder, dtype="float32"), load_checkpoint(folder, dtype=torch.float32).model
    width = llm.config.canvas_length
    scores = report.all_likelihoods(model.requires_grad_(False), llm.tokenizer, data, width, size)
    found: dict[str, float] = {}
    for kind in ("stories", "prose"):
        one = scores[kind]
        found[f"{kind}_ar"] = one["autoregressive"]["bits_per_byte"]
        found[f"{kind}_bound"] = one["bound"][one["better"]]["calibrated"]["bits_per_byte"]
    rows = json.loads((data / "heldout_prompts.json").read_text())
    prompts = [row for row in rows if row["source"].startswith("story")][: size.prompts]
    samples = report.generate(llm, prompts, size.seeds, max_new_tokens=size.new_tokens)
    decoding, said = report.decoding(samples), report.judged(samples, judge, llm.tokenizer)
    found["judge"] = said["nats_per_token"] if said else float("nan")
    found["consistency"] = story_score([sample.prompt + sample.text for sample in samples]).consistency
    found["steps"], found["tokens_per_forward"] = decoding["steps_per_canvas"], decoding["tokens_per_forward"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/default"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=170)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, judge = Console(stderr=True), None
    if args.quick:
        args.steps, args.seeds, args.out = 2, args.seeds[:2], args.out / "quick"
    size = report.QUICK if args.quick else SIZE
    # Seeds outside: after each round every objective has been trained equally often.
    for seed in args.seeds:
        for objective in args.objectives:
            folder = args.out / f"{objective}-{seed}"
            if (folder / "scores.json").is_file():
                continue
            if not (folder / "model/config.json").is_file():
                console.print(f"{folder}: training")
                outcome = run_recipe(recipe(objective, seed, args.steps, args.data, args.quick), folder, console.print)
                if outcome.model is None:
                    raise SystemExit("interrupted; run again to go on")
            console.print(f"{folder}: measuring")
            with torch.no_grad():
                if judge is None:
                    judge = report.build_judge(args.data, load_checkpoint(folder / "model").model.config, size.training)
                scores = evaluate(folder / "model", args.data, judge, size)
            (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    runs = {
        name: [json.loads(path.read_text()) for path in sorted(args.out.glob(f"{name}-*/scores.json"))]
        for name in OBJECTIVES
    }
    runs = {name: scores for name, scores in runs.items() if scores}
    text = summary(runs) + "\n" + "\n".join(verdict(runs)) + "\n"
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
