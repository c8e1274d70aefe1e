"""Fit the sampler settings of a checkpoint: generate held-out prompts under a grid, score, and print a table.

Scores: agreement with the story grammar (share of faultless sentences), nats per token under the n-gram judge,
distinct bigrams (collapse shows there), steps per canvas and the share of canvases ended by the stop rule.

    python recipes/default/fit.py dgemma/models/default --widths 16 32 64 --bounds 0.1 0.5 --json build/default/fit.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from report import Sample, build_judge, decoding, judged
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dgemma.api import LLM
from dgemma.eval.judge import NgramJudge
from dgemma.eval.samples import distinct, story_score

COLUMNS = ("consistency", "faultless", "judge", "distinct2", "steps", "stopped", "tokens_per_forward")


def score(llm: LLM, judge: NgramJudge, prompts: list[str], **settings: Any) -> dict[str, Any]:
    """One setting: all prompts as one batch, seeds 1000, 1001, ... (the card's seeds are others)."""
    requests = [llm.generate(prompt, seed=1000 + n, **settings) for n, prompt in enumerate(prompts)]
    samples = [Sample("stories", p, answer.text, answer) for p, answer in zip(prompts, requests, strict=True)]
    texts = [sample.prompt + sample.text for sample in samples]
    stories, verdict = story_score(texts), judged(samples, judge, llm.tokenizer)
    row: dict[str, Any] = {
        "consistency": stories.consistency,
        "faultless": stories.faultless,
        "judge": verdict["nats_per_token"] if verdict else float("nan"),
        "distinct2": distinct(texts, 2),
    }
    if settings.get("mode") != "ar":
        figures = decoding(samples)
        row |= {"steps": figures["steps_per_canvas"], "stopped": figures["stopped_by_rule"]}
    row["tokens_per_forward"] = sum(answer.tokens_per_forward for answer in requests) / len(requests)
    return settings | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--data", type=Path, default=Path("build/default"))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--steps", type=int, nargs="+", default=[48])
    parser.add_argument("--confidence", type=float, nargs="+", default=[0.05])
    parser.add_argument("--t", type=str, nargs="+", default=["0.4:0.8"], help="t_min:t_max pairs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    llm, console = LLM.load(args.model), Console()
    torch.set_grad_enabled(False)
    judge = build_judge(args.data, llm.config, None)
    rows = json.loads((args.data / "heldout_prompts.json").read_text())
    prompts = [row["prompt"] for row in rows if row["source"].startswith("story")]
    prompts = [prompts[n % len(prompts)] for n in range(args.prompts)]
    grid: list[dict[str, Any]] = [{"mode": "ar", "temperature": t} for t in (0.0, 1.0)]
    for width, bound, steps, confident, span in itertools.product(
        args.widths, args.bounds, args.steps, args.confidence, args.t
    ):
        low, high = map(float, span.split(":"))
        chosen = {"canvas_length": width, "entropy_bound": bound, "max_denoising_steps": steps}
        grid.append(chosen | {"confidence_threshold": confident, "t_min": low, "t_max": high})
    results = [score(llm, judge, prompts, max_new_tokens=224, **setting) for setting in track(grid, console=console)]
    table = Table("setting", *COLUMNS)
    for row in results:
        setting = " ".join(f"{k}={v}" for k, v in row.items() if k not in (*COLUMNS, "max_new_tokens"))
        table.add_row(setting, *(f"{row[c]:.3f}" if c in row else "" for c in COLUMNS))
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
