"""Fields of a story filled into JSON: how many are right, and how likely the answers are. Adds to a JSON file.

    python scripts/extraction.py --model runs/decisions/model --name trained --out docs/figures/constraints.json

The answer's schema names seven fields, each of them one of all values that 400 stories have. No model was trained on
these stories. `recipes/decisions.yaml` trains one on others; the shipped model has never seen such a task. An
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from constraints import DRAWS, Run, difference, interval, summary

from dgemma.api import LLM
from dgemma.train.stories import Story, make_story
from dgemma.train.stories.questions import FACTS, story_facts

FIRST_SEED = 4_500_000
WAYS = ("canvas", "mask", "mask_greedy")


def cases(count: int) -> tuple[list[Story], dict[str, Any]]:
    """Stories that tell every field, and the schema."""
    stories = [make_story(FIRST_SEED + seed) for seed in range(400)]
    values = {name: sorted({getattr(story, name) for story in stories} - {""}) for name in FACTS}
    schema = {
        "type": "object",
        "properties": {name: {"enum": options} for name, options in values.items()},
        "required": list(FACTS),
    }
    return [story for story in stories if len(story_facts(story)) == len(FACTS)][:count], schema


def answers(run: Run, story: Story, schema: dict[str, Any], seed: int, draws: int) -> dict[str, Any]:
    """One story by every way, and the true object's own log-probability under the encoder."""
    prompt = story.text + "\n"
    truth = [*run.llm.tokenizer.encode(json.dumps(story_facts(story))), run.llm.generation.stop_tokens[0]]
    return {
        "canvas": [run.canvas(prompt, schema, seed)],
        "mask": [run.masked(prompt, schema, seed + 1_000 * again) for again in range(draws)],
        "mask_greedy": [run.masked(prompt, schema, None)],
        "facts": story_facts(story),
        "truth_logprob": run.llm.score(truth, prompt=prompt).total,
    }


def right(rows: Sequence[dict[str, Any]], way: str) -> dict[str, Any]:
    """Shares filled right: of all fields, with an interval over stories, of each, and of whole objects."""
    hits = [[{n: told[n] == row["facts"][n] for n in FACTS} for told in _told(row, way)] for row in rows]
    each = {name: round(_mean([_mean([one[name] for one in row]) for row in hits]), 3) for name in FACTS}
    fields = interval([_mean([_mean(list(one.values())) for one in row]) for row in hits], _mean)
    return {"fields": fields, "whole": round(_mean([_mean([all(one.values()) for one in row]) for row in hits]), 3)} | {
        "each": each
    }


def _told(row: dict[str, Any], way: str) -> list[dict[str, str]]:
    return [json.loads(answer["text"]) for answer in row[way]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--name", default="default", help="what the result is called in the file")
    parser.add_argument("--out", type=Path, default=Path("constraints.json"))
    parser.add_argument("--rows", type=Path, default=Path("build/constraints"), help="folder of what is already done")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--draws", type=int, default=DRAWS, help="answers of the mask beside its greedy one")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    run = Run(LLM.load(arguments.model, threads=arguments.threads))
    stories, schema = cases(arguments.cases)
    kept = arguments.rows / f"extraction-{arguments.name}.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in kept.open(encoding="utf-8")][: len(stories)] if kept.exists() else []
    for number, story in enumerate(stories[len(rows) :], start=len(rows)):
        rows.append(answers(run, story, schema, number, arguments.draws))
        with kept.open("a", encoding="utf-8") as out:
            out.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
        print(f"{number + 1}/{len(stories)} {rows[-1]['canvas'][0]['text']} {rows[-1]['facts']}", flush=True)
    ways = [way for way in WAYS if rows[0][way]]
    chance = {name: round(1 / len(of["enum"]), 4) for name, of in schema["properties"].items()}
    found = {
        "cases": len(rows),
        "right": {way: right(rows, way) for way in ways},
        "ways": {way: summary([answer for row in rows for answer in row[way]]) for way in ways},
        "truth_logprob_per_answer": round(_mean([row["truth_logprob"] for row in rows]), 3),
        **{f"canvas_minus_{way}": difference(rows, "canvas", way) for way in ways[1:]},
        "chance": {"fields": round(_mean(list(chance.values())), 4), "each": chance},
    }
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    result["extraction"] = result.get("extraction", {}) | {arguments.name: found}
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
