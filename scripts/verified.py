"""Mode "verified", measured: is it exact, how much of a draft stands, and what is that worth?

Writes docs/figures/verified.json, after every part, and verified.png. What the file has is not measured again, so
an interrupted run goes on where it was; `--fresh` begins anew, `--parts` takes some. Sudoku needs a model whose encoder
was trained, too: recipes/sudoku-joint.yaml, recipes/sudoku-joint-2.yaml, then `--sudoku runs/sudoku-joint-2/model`.

    python scripts/verified.py [--parts law engine greedy text sudoku time] [--prompts 500] [--sudoku MODEL]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dgemma.api import LLM, Generation  # noqa: E402
from dgemma.config import EngineConfig, GenerationConfig  # noqa: E402
from dgemma.engine import Engine, Request  # noqa: E402
from dgemma.eval.speculation import FAULTS, RULES, Chain, chi_square, simulate  # noqa: E402
from dgemma.events import Committed, Finished  # noqa: E402
from dgemma.train.stories.tell import make_story  # noqa: E402
from dgemma.train.sudoku.examples import prompt_ids  # noqa: E402
from dgemma.train.sudoku.puzzles import add_givens  # noqa: E402

CANVAS = 3.0
"""Autoregressive tokens that a forward pass over a canvas costs on an H100, by arithmetic (docs/verified.md)."""
STEPS = (1, 2, 4, 8, 16)
GREEDY: dict[str, Any] = {"temperature": 0.0}
FULLER = {"65": 65, "55": 55}
GRADES = (*FULLER, "36-46", "26-32")
"""Givens of the puzzles."""
Save = Callable[[], None]


def prompts(count: int) -> list[str]:
    """Beginnings of told stories, 4 to 11 words long."""
    return [" ".join(make_story(90_000 + seed).text.split()[: 4 + seed % 8]) for seed in range(count)]


def puzzles(folder: Path, grade: str, count: int) -> list[list[int]]:
    """Held-out puzzles of a grade; those with more givens than any set has are made of the easiest one."""
    found = []
    with np.load(folder / f"{'36-46' if grade in FULLER else grade}.npz") as file:
        for row, (puzzle, solution) in enumerate(zip(file["puzzles"][:count], file["solutions"][:count], strict=True)):
            rng = np.random.default_rng((7, row))
            more = add_givens(puzzle, solution, FULLER[grade], rng) if grade in FULLER else puzzle
            found.append(prompt_ids(more))
    return found


# --- exactness ---


def law(into: dict[str, Any], sequences: int) -> None:
    """3-grams of long simulations of the rule; of each fault, a tenth of them."""
    chain = Chain.random()
    for name, cycle in {**RULES, **FAULTS}.items():
        total = sequences if name in RULES else sequences // 10
        counts, stands = torch.zeros(chain.vocab**3, dtype=torch.int64), 0.0
        for block in range(-(-total // 100_000)):
            part, stands = simulate(chain, cycle, min(100_000, total - block * 100_000), block)
            counts += part
        value, degrees, chance = chi_square(counts, chain.law())
        into[name] = {"sequences": total, "accepted": stands, "chi_square": value, "degrees": degrees, "p": chance}
        print(f"law: {name}: {into[name]}", flush=True)


def through_engine(into: dict[str, Any], sequences: int) -> None:
    """The same of a random network with 5 tokens, through the engine: drafts of 3 drawn tokens from one step."""
    from engine_kit import tiny_model

    model, given, vocab = tiny_model(vocab_size=5), (1, 3, 2), 5
    engine = Engine(model, EngineConfig(prefix_cache_tokens=0, max_requests=1000))
    asked = GenerationConfig(
        mode="verified", verify_draft="sample", verify_pace="fixed", max_denoising_steps=1, max_new_tokens=4,
        canvas_length=4, t_min=0.02, t_max=0.2,
    )  # fmt: skip
    counts, accepted, drafts = torch.zeros(vocab**3, dtype=torch.int64), 0, 0
    for start in range(0, sequences, 1000):
        answers: dict[int, list[int]] = {}
        for choice in range(start, start + 1000):
            engine.add(Request(prompt=given, config=asked.with_(choice=choice)))
        while engine.has_work:
            for event in engine.tick():
                if isinstance(event, Committed):
                    answers.setdefault(event.request, []).extend(event.tokens)
                elif isinstance(event, Finished):
                    accepted, drafts = accepted + sum(event.accepted), drafts + len(event.accepted)
        grams = torch.tensor([answer[:3] for answer in answers.values()])
        counts += torch.bincount(grams @ torch.tensor([vocab**2, vocab, 1]), minlength=vocab**3)

    def after(*more: int) -> torch.Tensor:
        hidden = engine.runner.encode([(engine.new_cache(), [*given, *more])])[0][-1:]
        return torch.log_softmax(engine.runner.logits(hidden), -1)[0].double()

    exact = torch.cat([after()[a] + after(a)[b] + after(a, b) for a in range(vocab) for b in range(vocab)]).exp()
    value, degrees, chance = chi_square(counts, exact)
    into |= {"sequences": sequences, "accepted": accepted / drafts}
    into |= {"chi_square": value, "degrees": degrees, "p": chance}
    print(f"engine: {into}", flush=True)


def greedy(into: dict[str, Any], count: int, tokens: int, save: Save) -> None:
    """Answers of both modes, in both precisions; where they part, how near the two likeliest tokens were."""
    for dtype in ("float64", "float32"):
        llm = LLM.load("default", dtype=dtype, threads=1)
        row = into.setdefault(
            dtype, {"prompts": 0, "tokens": 0, "identical": 0, "drafts": 0, "accepted": 0, "parted": []}
        )
        for text in prompts(count)[row["prompts"] :]:
            # Every draft is made, so that as much as can be is tested.
            pace: dict[str, Any] = {"verify_pace": "fixed", "steps": 1}
            plain = llm.generate(text, mode="ar", max_new_tokens=tokens, **GREEDY)
            ours = llm.generate(text, mode="verified", max_new_tokens=tokens, logprobs=2, **pace, **GREEDY)
            row["prompts"] += 1
            row["tokens"] += len(ours.token_ids)
            row["identical"] += plain.token_ids == ours.token_ids
            row["drafts"] += len(ours.accepted)
            row["accepted"] += sum(ours.accepted)
            if plain.token_ids != ours.token_ids:
                pairs = zip(plain.token_ids, ours.token_ids, strict=False)
                at = next(place for place, (one, other) in enumerate(pairs) if one != other)
                assert ours.logprobs is not None
                top = ours.logprobs[at].top
                row["parted"].append({"prompt": text, "place": at, "margin": top[0][1] - top[1][1]})
            if row["prompts"] % 25 == 0:
                save()
        print(f"greedy: {dtype}: {row}", flush=True)


# --- worth ---


def modelled(answer: Generation) -> float:
    """What an answer cost in autoregressive tokens, if every pass over more than one token costs `CANVAS`."""
    passes = round(len(answer.token_ids) / answer.tokens_per_forward)
    drafts = len(answer.accepted)
    return CANVAS * (sum(answer.steps) + drafts) + passes - sum(answer.steps) - drafts


def table(llm: LLM, asked: Sequence[Any], **options: Any) -> dict[str, Any]:
    """Acceptance, forwards and modelled speed of fixed numbers of steps, and of the engine's own choice."""
    found: dict[str, Any] = {}
    for name, choice in [
        *((str(steps), {"verify_pace": "fixed", "steps": steps}) for steps in STEPS),
        ("adaptive", {"verify_pace": "adaptive", "steps": STEPS[-1]}),
    ]:
        answers = [llm.generate(one, mode="verified", seed=seed, **choice, **options) for seed, one in enumerate(asked)]
        drafts = [count for answer in answers for count in answer.accepted]
        tokens = sum(len(answer.token_ids) for answer in answers)
        passes = sum(round(len(answer.token_ids) / answer.tokens_per_forward) for answer in answers)
        found[name] = {
            "answers": len(answers),
            "tokens": tokens,
            "drafts": len(drafts),
            "accepted": sum(drafts) / max(1, len(drafts)),
            "steps": sum(sum(answer.steps) for answer in answers) / max(1, len(drafts)),
            "forwards": passes,
            "tokens_per_forward": tokens / passes,
            "modelled_speed": tokens / sum(map(modelled, answers)),
        }
        print(f"  {name}: {found[name]}", flush=True)
    return found


def text_table(into: dict[str, Any], count: int, tokens: int, save: Save) -> None:
    llm = LLM.load("default", threads=1, engine=EngineConfig(canvas_cost=CANVAS))
    for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        if name not in into:
            print(f"text, {name}")
            into[name] = table(llm, prompts(count), temperature=temperature, max_new_tokens=tokens)
            save()


def sudoku_table(into: dict[str, Any], model: str, folder: Path, count: int, save: Save) -> None:
    """Whole grids from their puzzles, one answer of 81 tokens each."""
    llm = LLM.load(model, threads=1, engine=EngineConfig(canvas_cost=CANVAS))
    for name in GRADES:
        if name not in into:
            print(f"sudoku, {name} givens")
            into[name] = table(llm, puzzles(folder, name, count), max_new_tokens=81, **GREEDY)
            save()


def timed(into: dict[str, Any], model: str | None, folder: Path, count: int, tokens: int, save: Save) -> None:
    """Seconds of both modes in turn on this machine, prices measured by the engine itself. For a quiet machine."""
    jobs: list[tuple[str, str, list[Any], dict[str, Any]]] = [
        ("text, greedy", "default", prompts(count), {"max_new_tokens": tokens, **GREEDY}),
        ("text, drawn", "default", prompts(count), {"max_new_tokens": tokens, "temperature": 1.0}),
    ]
    if model is not None:
        for grade in GRADES:
            options = {"max_new_tokens": 81, "steps": STEPS[-1], **GREEDY}
            jobs.append((f"sudoku, {grade} givens", model, puzzles(folder, grade, count), options))
    for name, which, asked, options in jobs:
        llm = LLM.load(which, threads=1, engine=EngineConfig(prefix_cache_tokens=0))
        for mode in ("ar", "verified"):
            llm.generate(asked[0], mode=mode, **options)
        seconds = {"ar": 0.0, "verified": 0.0}
        for seed, one in enumerate(asked):
            for mode in ("ar", "verified") if seed % 2 else ("verified", "ar"):
                begun = time.perf_counter()
                llm.generate(one, mode=mode, seed=seed, **options)
                seconds[mode] += time.perf_counter() - begun
        into[name] = {"answers": len(asked), **seconds, "speed": seconds["ar"] / seconds["verified"]}
        print(f"time: {name}: {into[name]}", flush=True)
        save()


# --- picture ---


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, rows in _rows(found):
        fixed = [rows[str(steps)] for steps in STEPS]
        line = left.plot(STEPS, [row["accepted"] for row in fixed], marker="o", label=name)[0]
        right.plot(STEPS, [row["modelled_speed"] for row in fixed], marker="o", color=line.get_color())
        right.axhline(rows["adaptive"]["modelled_speed"], color=line.get_color(), linestyle=":")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axes.set_xlabel("at most so many steps a draft")
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.set_ylabel("drafted tokens that stand, mean")
    left.legend()
    right.axhline(1, color="black", linewidth=0.8)
    right.set_yscale("log")
    right.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    right.set_ylabel(f"speed over mode ar, a canvas pass costing {CANVAS:g} tokens\n(dotted: adaptive)")
    figure.savefig(path, dpi=110)


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for part, label in (("text", "stories, {}"), ("sudoku", "Sudoku, {} givens")):
        for name, rows in found.get(part, {}).items():
            yield label.format(name), rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ("law", "engine", "greedy", "text", "sudoku", "time")
    parser.add_argument("--parts", nargs="+", choices=every, default=list(every))
    parser.add_argument("--sequences", type=int, default=2_000_000, help="of the simulated chain (2,000,000)")
    parser.add_argument("--engine-sequences", type=int, default=50_000, help="through the engine (50,000)")
    parser.add_argument("--prompts", type=int, default=500, help="for greedy (500)")
    parser.add_argument("--answers", type=int, default=40, help="for each row of a table, and for time (40)")
    parser.add_argument("--tokens", type=int, default=128, help="of a text (128)")
    parser.add_argument("--sudoku", metavar="MODEL", help="a model whose encoder was trained to write solutions")
    parser.add_argument("--boards", type=Path, default=ROOT / "build" / "sudoku", help="held-out puzzles")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file has")
    arguments = parser.parse_args()
    path = arguments.out / "verified.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save() -> None:
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(path)

    model, boards, answers, tokens = arguments.sudoku, arguments.boards, arguments.answers, arguments.tokens
    jobs: dict[str, Callable[[dict[str, Any]], None]] = {
        "law": partial(law, sequences=arguments.sequences),
        "engine": partial(through_engine, sequences=arguments.engine_sequences),
        "greedy": partial(greedy, count=arguments.prompts, tokens=tokens, save=save),
        "text": partial(text_table, count=answers, tokens=tokens, save=save),
        "sudoku": partial(sudoku_table, model=model, folder=boards, count=answers, save=save),
        "time": partial(timed, model=model, folder=boards, count=answers, tokens=tokens, save=save),
    }
    for name in arguments.parts:
        if name == "sudoku" and model is None:
            print("sudoku: left out, no model was named (--sudoku)")
            continue
        if arguments.fresh or not found.get(name):
            found[name] = {}
        elif name in ("law", "engine", "time"):
            continue
        jobs[name](found[name])
        save()
    if found.get("text") or found.get("sudoku"):
        draw(found, arguments.out / "verified.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
