"""Compare canvas widths at equal steps a canvas: quality, ends, cost, and the time to the first text.

    python recipes/default/widths.py --json build/default/widths.json
    python recipes/default/widths.py --quick               # two prompts, few steps; shows that it runs

Every canvas takes exactly `--steps` steps (no stop rule), whatever its width; the rows `short` and `adaptive` choose
widths up to the largest one asked for. Columns: `nll`, nats a token of the answers under the encoder of the same
model; `ends`, the share of answers that came to an end token within the budget; `steps`, denoising steps an answer;
`positions`, what passed the network a token of text; `first` and `all`, median seconds to the first committed text and
to the last; `approximate`, whether the checkpoint does not say that it was trained so. All settings answer a prompt in
turn, one at a time, in an order that moves on with every prompt. Run it when nothing else does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dgemma import LLM
from dgemma.engine.request import is_approximate
from dgemma.events import Committed, Draft, Finished

OPENINGS = (
    "Once upon a time there was a fox who",
    "Once upon a time",
    "Lily lived by the river and she",
    "One day a boy named Tom found",
    "The old king had",
    "In a small village there",
    "Ben and his dog went",
    "It was a cold morning and",
)
COLUMNS = ("nll", "ends", "tokens", "steps", "positions", "first", "all", "approximate")


@dataclass
class Answer:
    """One answer: its tokens, their total log-probability, widths of its canvases, and seconds from the start."""

    tokens: int
    nats: float
    ended: bool
    widths: list[int]
    first: float
    all: float


def answer(llm: LLM, prompt: str, **settings: Any) -> Answer:
    """Generate and score. Nothing is reused from earlier prompts, so that every first text costs the same encoding."""
    widths, ids, first = dict[int, int](), list[int](), 0.0
    begun = time.perf_counter()
    end: Finished | None = None
    for event in llm.stream(prompt, reuse=False, **settings):
        if isinstance(event, Draft):
            widths[event.canvas] = len(event.tokens)
        elif isinstance(event, Committed):
            ids += event.tokens
            first = first or time.perf_counter() - begun
        else:
            end = event
    seconds = time.perf_counter() - begun
    assert end is not None
    nats = -llm.score(ids, prompt=prompt).total
    return Answer(len(ids), nats, end.reason == "stop", list(widths.values()), first, seconds)


def summary(answers: list[Answer], steps: int) -> dict[str, float]:
    tokens = sum(one.tokens for one in answers)
    return {
        "nll": sum(one.nats for one in answers) / tokens,
        "ends": sum(one.ended for one in answers) / len(answers),
        "tokens": tokens / len(answers),
        "steps": statistics.mean(steps * len(one.widths) for one in answers),
        "positions": sum(steps * sum(one.widths) for one in answers) / tokens,
        "first": statistics.median(one.first for one in answers),
        "all": statistics.median(one.all for one in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--widths", type=int, nargs="+", help="default: those that the checkpoint names")
    parser.add_argument("--steps", type=int, default=24, help="of every canvas")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256], help="budgets of an answer")
    parser.add_argument("--seeds", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    llm, console = LLM.load(args.model, threads=args.threads), Console()
    widths = sorted(args.widths or llm.config.canvas_widths or [llm.config.canvas_length])
    openings, seeds, steps, budgets = list(OPENINGS), args.seeds, args.steps, args.tokens
    if args.quick:
        openings, seeds, steps, budgets = openings[:2], 1, 3, [16, 40]
    fixed = {"max_denoising_steps": steps, "confidence_threshold": None}
    rules: dict[str, dict[str, Any]] = {str(width): {"canvas_length": width, "narrow": "never"} for width in widths}
    rules |= {rule: {"canvas_length": widths[-1], "narrow": rule} for rule in ("short", "adaptive")}
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        answers: dict[str, list[Answer]] = {name: [] for name in rules}
        jobs = [(opening, seed) for seed in range(seeds) for opening in openings]
        for place, (opening, seed) in enumerate(track(jobs, f"{budget} tokens", console=console)):
            names = list(rules)
            shift = place % len(names)
            for name in names[shift:] + names[:shift]:
                chosen = fixed | rules[name] | {"max_new_tokens": budget, "seed": seed}
                answers[name].append(answer(llm, opening, **chosen))
        for name, rule in rules.items():
            rough = is_approximate(llm.generation.with_(**fixed, **rule), llm.config)
            rows.append({"budget": budget, "width": name, **summary(answers[name], steps), "approximate": rough})
    table = Table("budget", "width", *COLUMNS, box=None, padding=(0, 1))
    for row in rows:
        cells = (f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in COLUMNS)
        table.add_row(str(row["budget"]), row["width"], *cells)
    console.print(table)
    if args.json:
        settings = {"model": args.model, "steps": steps, "prompts": len(openings), "seeds": seeds}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
