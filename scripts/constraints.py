"""Whole-canvas constraints, measured: validity, steps, time, likelihood, fields filled from a text. Writes JSON.

    python scripts/constraints.py --suite FOLDER --out constraints.json

FOLDER is `tests/draft2020-12` of the public JSON-Schema-Test-Suite (it is also in the source package of `jsonschema`,
under `json/`); without it, that part is left out. The left-to-right baseline masks the encoder's tokens one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import torch

from dgemma.api import LLM
from dgemma.control import Control
from dgemma.control.language.json_schema import schema_regex
from dgemma.control.language.machine import Machine
from dgemma.errors import RequestError
from dgemma.train.stories import make_story

PROMPT = "Once upon a time there was a girl named Lily. Lily had a brown dog.\n"
FIELDS = ("hero", "kind", "companion", "companion_kind", "place", "thing", "colour")
BUDGET = 96


def suite(folder: Path, count: int) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Schemas that can be compiled, spread over the files, and what all of them say about our expressions."""
    found: dict[str, list[tuple[str, Any]]] = {}
    told = {"supported": 0, "refused": 0, "valid": 0, "valid_accepted": 0, "invalid": 0, "invalid_accepted": 0}
    for file in sorted(folder.rglob("*.json")):
        for group in json.loads(file.read_text(encoding="utf-8")):
            try:
                made = re.compile(schema_regex(group["schema"]))
            except RequestError:
                told["refused"] += 1
                continue
            told["supported"] += 1
            for test in group["tests"]:
                kind = "valid" if test["valid"] else "invalid"
                told[kind] += 1
                told[f"{kind}_accepted"] += bool(made.fullmatch(json.dumps(test["data"], ensure_ascii=False)))
            found.setdefault(file.stem, []).append((f"{file.stem}: {group['description']}", group["schema"]))
    chosen: list[tuple[str, Any]] = []
    while found and len(chosen) < count:
        for name in list(found):
            chosen.append(found[name].pop(0))
            if not found[name]:
                del found[name]
    return chosen[:count], told


def random_schema(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of the supported kinds."""
    kinds = ["string", "integer", "number", "boolean", "enum", "format"] + ["object", "array", "anyOf"] * (depth > 0)
    match chance.choice(kinds):
        case "string":
            low = chance.randint(0, 3)
            return {"type": "string", "minLength": low, "maxLength": low + chance.randint(0, 12)}
        case "integer":
            low = chance.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 500)}
        case "number":
            return {"type": "number", "minimum": chance.randint(-9, 0), "exclusiveMaximum": chance.randint(1, 99)}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": chance.sample(["red", "green", 1, 2.5, None, True, ["a"], {"b": 1}], chance.randint(1, 4))}
        case "format":
            return {"type": "string", "format": chance.choice(["date", "time", "uuid", "ipv4", "email"])}
        case "array":
            low = chance.randint(0, 2)
            return {"type": "array", "items": random_schema(chance, depth - 1), "minItems": low, "maxItems": low + 2}
        case "anyOf":
            return {"anyOf": [random_schema(chance, depth - 1) for _ in range(2)]}
    names = chance.sample(["name", "age", "kind", "tags", "date", "ok"], chance.randint(1, 3))
    required = [name for name in names if chance.random() < 0.7]
    return {
        "type": "object",
        "properties": {name: random_schema(chance, depth - 1) for name in names},
        "required": required,
    }


@torch.inference_mode()
def left_to_right(llm: LLM, machine: Machine, ids: Sequence[int], budget: int, seed: int | None) -> list[int]:
    """The encoder's tokens one by one, each among those that still lead to an end in the budget.

    A `seed` of None takes the likeliest.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    cache, state, answer = llm.engine.new_cache(), machine.start, []
    pending = list(ids)
    while state != machine.ended:
        part, pending = pending[: llm.engine.config.encode_chunk], pending[llm.engine.config.encode_chunk :]
        (hidden,) = llm.engine.runner.encode([(cache, part)])
        if pending:
            continue
        logits = llm.engine.runner.logits(hidden[-1:])[0].double()
        allowed = torch.zeros(machine.edges.count, dtype=torch.bool)
        mine = machine.edges.source == state
        fits = machine.distance[machine.edges.target] <= budget - len(answer) - 1
        allowed[torch.from_numpy(machine.edges.by[mine & fits])] = True
        logits[~allowed[machine.classes.of]] = -torch.inf
        probs = torch.softmax(logits, 0)
        token = int(probs.argmax()) if seed is None else int(torch.multinomial(probs, 1, generator=generator))
        answer.append(token)
        state, pending = machine.advance(state, [token]), [token]
    return answer


class Run:
    """One answer by each way, and what is told of it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def canvas(self, prompt: str, schema: Any, seed: int, raw: bool = False) -> dict[str, Any]:
        request = self.llm.request(prompt, schema=schema, seed=seed, max_new_tokens=BUDGET)
        constraint = request.control.constraint
        assert isinstance(constraint, Machine)
        request = replace(request, control=Control(constraint=replace(constraint, raw_signal=raw)))
        begin = time.perf_counter()
        (answer,) = self.llm._answers([request])
        return self._told(prompt, answer.token_ids, time.perf_counter() - begin) | {"steps": sum(answer.steps)}

    def masked(self, prompt: str, schema: Any, seed: int | None) -> dict[str, Any]:
        config = self.llm.generation.with_(max_new_tokens=BUDGET)
        machine = self.llm.compiler.constraint(config, {"schema": schema})
        assert machine is not None
        begin = time.perf_counter()
        ids = left_to_right(self.llm, machine, self.llm.encode_prompt(prompt), BUDGET, seed)
        return self._told(prompt, ids, time.perf_counter() - begin) | {"steps": len(ids)}

    def free(self, prompt: str, tokens: int, seed: int) -> dict[str, Any]:
        begin = time.perf_counter()
        answer = self.llm.generate(prompt, seed=seed, max_new_tokens=tokens, stop_tokens=())
        return self._told(prompt, answer.token_ids, time.perf_counter() - begin) | {"steps": sum(answer.steps)}

    def _told(self, prompt: str, ids: Sequence[int], seconds: float) -> dict[str, Any]:
        text = self.llm.tokenizer.decode(list(ids))
        logprob = self.llm.score(list(ids), prompt=prompt).total
        return {"text": text, "tokens": len(ids), "seconds": seconds, "logprob": logprob}


def valid(text: str, schema: Any) -> bool:
    try:
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=checker)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def compare(run: Run, schemas: Sequence[tuple[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    """Every schema by every way."""
    ways: dict[str, list[dict[str, Any]]] = {name: [] for name in ("canvas", "raw", "mask", "mask_greedy", "free")}
    failed, skipped = [], []
    for number, (name, schema) in enumerate(schemas):
        try:
            canvas = run.canvas(PROMPT, schema, number)
        except RequestError as error:  # no answer within the budget
            skipped.append(f"{name}: {error}")
            continue
        ways["canvas"].append(canvas)
        ways["raw"].append(run.canvas(PROMPT, schema, number, raw=True))
        ways["mask"].append(run.masked(PROMPT, schema, number))
        ways["mask_greedy"].append(run.masked(PROMPT, schema, None))
        ways["free"].append(run.free(PROMPT, canvas["tokens"], number))
        failed += [f"{name}: {way}" for way in ("canvas", "raw", "mask") if not valid(ways[way][-1]["text"], schema)]
        say(f"{number + 1}/{len(schemas)} {canvas['text'][:60]!r}")
    told: dict[str, Any] = {name: _summary(answers) for name, answers in ways.items()}
    told["canvas_minus_mask"] = _difference(ways["canvas"], ways["mask"])
    told["canvas_minus_raw"] = _difference(ways["canvas"], ways["raw"])
    return told | {
        "schemas": len(schemas),
        "invalid": failed,
        "skipped": skipped,
        "names": [name for name, _ in schemas],
    }


def _summary(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    tokens = sum(answer["tokens"] for answer in answers)
    return {
        "answers": len(answers),
        "tokens": tokens,
        "steps_per_token": round(sum(answer["steps"] for answer in answers) / max(1, tokens), 3),
        "seconds_per_token": round(sum(answer["seconds"] for answer in answers) / max(1, tokens), 4),
        "logprob_per_answer": round(statistics.fmean(answer["logprob"] for answer in answers), 3),
        "logprob_per_token": round(sum(answer["logprob"] for answer in answers) / max(1, tokens), 4),
    }


def _difference(left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of the paired differences of answers' log-probabilities, and half of its 95 % interval."""
    gaps = [one["logprob"] - other["logprob"] for one, other in zip(left, right, strict=True)]
    half = 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    return {"mean": round(statistics.fmean(gaps), 3), "half_width": round(half, 3)}


def extraction(run: Run, cases: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Fields of a story's facts, each one of all values that 400 stories have; shares filled right, and by chance."""
    stories = [make_story(90_000 + seed) for seed in range(400)]
    values = {name: sorted({getattr(story, name) for story in stories} - {""}) for name in FIELDS}
    schema = {
        "type": "object",
        "properties": {name: {"enum": options} for name, options in values.items()},
        "required": list(FIELDS),
    }
    right: dict[str, dict[str, int]] = {way: dict.fromkeys(FIELDS, 0) for way in ("canvas", "mask_greedy")}
    whole = [story for story in stories if all(getattr(story, name) for name in FIELDS)][:cases]
    for number, story in enumerate(whole):
        for way, answer in (
            ("canvas", run.canvas(story.text + "\n", schema, number)),
            ("mask_greedy", run.masked(story.text + "\n", schema, None)),
        ):
            told = json.loads(answer["text"])
            for name in FIELDS:
                right[way][name] += told[name] == getattr(story, name)
        say(f"case {number + 1}/{len(whole)}")
    return {
        "cases": len(whole),
        "share": {way: {name: round(hits / len(whole), 3) for name, hits in of.items()} for way, of in right.items()},
        "mean": {way: round(sum(of.values()) / len(whole) / len(FIELDS), 3) for way, of in right.items()},
        "chance": {name: round(1 / len(options), 4) for name, options in values.items()},
    }


def compile_times(llm: LLM) -> Iterator[dict[str, Any]]:
    """Seconds to compile for the model's vocabulary and for a synthetic one of 262,144 tokens."""
    from dgemma.control.language.automaton import compile_tokens
    from dgemma.control.language.languages import expression
    from dgemma.control.language.regex import compile_regex
    from dgemma.control.language.vocabulary import Vocabulary

    chance = random.Random(0)
    alphabet = 'abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,":{}[]\né€'
    words = ["".join(chance.choices(alphabet, k=chance.randint(2, 9))).encode() for _ in range(262_144 - 256)]
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}}}
    languages: list[tuple[str, dict[str, Any]]] = [
        ("schema of two fields", {"schema": schema}),
        ("any object", {"schema": "object"}),
        ("1,000 choices", {"choices": ["".join(chance.choices(alphabet[:26], k=9)) for _ in range(1000)]}),
    ]
    for pieces in (llm.tokenizer.token_bytes(), [*(bytes([byte]) for byte in range(256)), *words]):
        begin = time.perf_counter()
        vocabulary = Vocabulary.of(pieces)
        tree = time.perf_counter() - begin
        for name, language in languages:
            begin = time.perf_counter()
            text = compile_regex(expression(**language) or "")
            middle = time.perf_counter()
            edges = compile_tokens(text, vocabulary)
            yield {
                "vocabulary": len(pieces), "vocabulary_seconds": round(tree, 3), "language": name,
                "states": edges.states, "classes": edges.count, "edges": len(edges.source),
                "bytes_seconds": round(middle - begin, 3), "tokens_seconds": round(time.perf_counter() - middle, 3),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--out", type=Path, default=Path("constraints.json"))
    parser.add_argument("--public", type=int, default=60)
    parser.add_argument("--generated", type=int, default=200)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    llm = LLM.load(arguments.model)
    run, say = Run(llm), (lambda text: None) if arguments.quiet else print
    result: dict[str, Any] = {
        "model": llm.name,
        "threads": torch.get_num_threads(),
        "compile": list(compile_times(llm)),
    }
    if arguments.suite:
        chosen, told = suite(arguments.suite, arguments.public)
        result["suite"] = told | compare(run, chosen, say)
    chance = random.Random(7)
    made = [(f"generated {number}", random_schema(chance)) for number in range(arguments.generated)]
    result["generated"] = compare(run, made, say)
    result["extraction"] = extraction(run, arguments.cases, say)
    arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: part for name, part in result.items() if name != "compile"}, ensure_ascii=False)[:4000])


if __name__ == "__main__":
    main()
