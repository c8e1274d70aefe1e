"""Infill on held-out stories of the default model's grammar: are pins kept, are there echoes, how likely are the fills.

    python scripts/infill.py [--cases 1000] [--model default] [--out build/infill.json]

Each case is a story of the held-out seeds, cut at words: a prompt, a hole of 1 to 6 words, 5 to 14 words behind it. It
is filled in several ways, with the same seed (after the first `--compare` cases in the first way only):
    pins         the denoiser with the text behind the hole pinned, the hole as long as the original
    paste        the same without pins, the text pasted into the committed canvas
    ar           left to right by the encoder (mode "ar", drawn), as long as the original, then the text pasted
    ar_greedy    the same with the likeliest token at each place
    search       pins with a hole of unknown length (`LLM.infill`)
    true         the original
    shuffled     another case's original of the same length, as a floor
Reported: the encoder's log-likelihood of fill and text behind it, paired differences with bootstrap intervals, pins
kept (in ids and in decoded text), echoes. Written after every case: a run that was stopped goes on. Ends with status 1
if a claim does not hold. --figure writes docs/figures/infill.png and .json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402

from dgemma.api import LLM  # noqa: E402
from dgemma.control.lexicon import Lexicon, echoes  # noqa: E402
from dgemma.control.template import Hole, Template  # noqa: E402
from dgemma.train.stories import make_story  # noqa: E402

HELD_OUT_SEED = 1_000_000_000  # as in recipes/default/build_data.py
STORIES = 4_000
WAYS = ("pins", "paste", "ar", "ar_greedy", "search", "true", "shuffled")


def case(number: int) -> dict[str, Any]:
    """Case `number`: the same on every run."""
    rng = random.Random(number)
    while True:
        story = HELD_OUT_SEED + rng.randrange(STORIES)
        words = make_story(story).text.split(" ")
        size, behind = rng.randint(1, 6), rng.randint(5, 14)
        if len(words) > size + behind + 9:
            at = rng.randint(8, len(words) - size - behind)
            before, after = " ".join(words[:at]) + " ", " " + " ".join(words[at + size : at + size + behind])
            return {"story": story, "before": before, "hole": " ".join(words[at : at + size]), "after": after}


def measure(llm: LLM, lexicon: Lexicon, number: int, compare: bool) -> dict[str, Any]:
    """All ways of one case, or `pins` alone."""
    one = case(number)
    prompt = [llm.tokenizer.bos, *llm.tokenizer.encode(one["before"][:-1])]
    original, tail = list(lexicon.held(" " + one["hole"])), list(lexicon.held(one["after"]))
    size, out = len(original), {}

    def judged(fill: list[int]) -> dict[str, Any]:
        text = llm.tokenizer.decode_after(fill)
        return {
            "fill": text,
            "nats": -llm.score([*fill, *tail], prompt=prompt).total,
            "echo": echoes(text, one["after"]),
        }

    for name, hole in (("pins", Hole(size, size)), ("search", Hole()))[: 2 if compare else 1]:
        begun, template = time.perf_counter(), Template((one["before"], one["after"]), (hole,))
        filled = llm.filler.infill(llm.generation, template, seed=number)
        ids = list(filled.token_ids)
        whole = one["before"] + filled.fills[0] + one["after"]
        out[name] = judged(ids[: len(ids) - len(tail)]) | {
            "kept": ids[len(ids) - len(tail) :] == tail,
            "verbatim": llm.tokenizer.decode([*filled.prompt_token_ids, *ids]) == whole == filled.text,
            "steps": sum(filled.candidates[0].steps),
            "tries": len(filled.candidates),
            "seconds": time.perf_counter() - begun,
        }
    if not compare:
        return {"case": number, "tokens": size, "behind": len(tail), **out}
    width = size + len(tail)
    free = llm.generate(prompt, seed=number, max_new_tokens=width, canvas_length=width, stop_tokens=())
    left = llm.generate(prompt, seed=number, max_new_tokens=size, mode="ar", stop_tokens=())
    other = next(c for n in range(number + 1, number + 500) if len(lexicon.held(" " + (c := case(n))["hole"])) == size)
    out["paste"] = judged(list(free.token_ids[:size])) | {"steps": sum(free.steps)}
    greedy = llm.generate(prompt, seed=number, max_new_tokens=size, mode="ar", stop_tokens=(), temperature=0.0)
    out["ar"] = judged(list(left.token_ids))
    out["ar_greedy"] = judged(list(greedy.token_ids))
    out["true"] = judged(original)
    out["shuffled"] = judged(list(lexicon.held(" " + other["hole"])))
    return {"case": number, "tokens": size, "behind": len(tail), **out}


def interval(values: np.ndarray, draws: int = 10_000) -> list[float]:
    """Mean and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    return [float(values.mean()), *(float(x) for x in np.quantile(means, (0.025, 0.975)))]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    compared = [row for row in rows if "search" in row]

    def nats(way: str, rows: list[dict[str, Any]]) -> np.ndarray:
        return np.array([row[way]["nats"] for row in rows if way in row])

    def mean(values: Iterable[float]) -> float:
        return float(np.mean([*values]))

    def gains(one: str, ways: Sequence[str], rows: list[dict[str, Any]]) -> dict[str, list[float]]:
        """Positive: `one` is likelier."""
        return {way: interval(nats(way, rows) - nats(one, rows)) for way in ways}

    answers = [row[way] for row in rows for way in ("pins", "search") if way in row]
    return {
        "cases": len(rows),
        "compared": len(compared),
        "pins_kept": sum(answer["kept"] and answer["verbatim"] for answer in answers),
        "of": len(answers),
        "echoes": {way: sum(row[way]["echo"] for row in rows if way in row) for way in WAYS},
        "nats": {way: interval(nats(way, compared)) for way in WAYS},
        "pins_gain_over": gains("pins", ("paste", "ar", "ar_greedy", "true", "shuffled"), compared),
        "search_gain_over": gains("search", ("pins", "ar", "ar_greedy", "true"), compared),
        "steps": {way: mean(row[way]["steps"] for row in rows if way in row) for way in ("pins", "search", "paste")},
        "length_found": mean(row["search"]["fill"].strip() == row["true"]["fill"].strip() for row in compared),
    }


def faults(told: dict[str, Any]) -> Iterator[str]:
    """The claims that do not hold."""
    if told["pins_kept"] != told["of"]:
        yield f"pins kept in {told['pins_kept']} of {told['of']} answers"
    if echoing := told["echoes"]["pins"] + told["echoes"]["search"]:
        yield f"{echoing} echoes"
    mean, low, _ = told["pins_gain_over"]["paste"]
    if low <= 0:
        yield f"pins over paste: {mean:.2f} nats, interval from {low:.2f}"


def draw(told: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "shuffled": "another story's words",
        "paste": "no pins, then paste",
        "ar": "left to right (drawn), then paste",
        "ar_greedy": "left to right (greedy), then paste",
        "pins": "pins",
        "search": "pins, length searched",
        "true": "the original",
    }
    figure, axes = pyplot.subplots(figsize=(7.2, 3.0), layout="constrained")
    for row, way in enumerate(reversed(names)):
        mean, low, high = told["nats"][way]
        axes.barh(row, mean, color="#376bfd" if way in ("pins", "search") else "#9aa4b2")
        axes.plot([low, high], [row, row], color="black", linewidth=1.2)
        axes.text(high + 0.6, row, f"{mean:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(names)), list(reversed(names.values())))
    axes.set_xlabel(f"nats of fill and text behind it, by the encoder ({told['compared']} cases)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--compare", type=int, default=416, help="the first so many cases in all ways, the rest in one")
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, default=REPO / "build" / "infill.json")
    parser.add_argument("--figure", action="store_true", help="write docs/figures/infill.png and .json")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    if len(rows) < arguments.cases:
        llm = LLM.load(arguments.model, device="cpu", threads=1)
        lexicon = Lexicon(llm.tokenizer, llm.config.vocab_size)
    while len(rows) < arguments.cases:
        rows.append(measure(llm, lexicon, len(rows), len(rows) < arguments.compare))
        partial = arguments.out.with_suffix(".tmp")
        partial.write_text(json.dumps({"rows": rows}))
        partial.replace(arguments.out)
        print(f"\r{len(rows)}/{arguments.cases}", end="", file=sys.stderr, flush=True)
    told = summary(rows[: arguments.cases])
    arguments.out.write_text(json.dumps({"summary": told, "rows": rows}))
    print(json.dumps(told, indent=1))
    if arguments.figure:
        draw(told, REPO / "docs" / "figures" / "infill.png")
        (REPO / "docs" / "figures" / "infill.json").write_text(json.dumps(told, indent=1) + "\n")
    if found := list(faults(told)):
        sys.exit("; ".join(found))


if __name__ == "__main__":
    main()
