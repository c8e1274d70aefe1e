"""Whole-canvas constraints, measured: validity, steps, time, and likelihood beside a left-to-right mask. Writes JSON.

    python scripts/constraints.py --suite FOLDER --out constraints.json

FOLDER is `tests/draft2020-12` of the public JSON-Schema-Test-Suite (it is also in the source package of `jsonschema`,
under `json/`); without it, that part is left out. The left-to-right baseline masks the encoder's tokens one by one.
Every schema is a line of `--rows` as soon as it is done, so that an interrupted run goes on where it stopped.
`extraction.py` measures what is filled in from a text.
"""

from __future__ import annotations

import argparse
import json
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

PROMPT = "Once upon a time there was a girl named Lily. Lily had a brown dog.\n"
BUDGET, DRAWS = 96, 2


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


def compare(run: Run, schemas: Sequence[tuple[str, Any]], rows: Path, more: int) -> dict[str, Any]:
    """Every schema by every way; the ways that are not compared only for one schema of `more`."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    known = done_before(rows)
    for number, (name, schema) in enumerate(schemas):
        if name not in known:
            known[name] = {"name": name} | _row(run, schema, number, number % more == 0)
            with rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps(known[name], ensure_ascii=False) + "\n")
            print(f"{number + 1}/{len(schemas)} {known[name].get('canvas', [])}"[:160], flush=True)
    done = [known[name] for name, _ in schemas]
    found = [row for row in done if "canvas" in row]
    ways = ("canvas", "mask", "mask_greedy", "raw", "free")
    return {
        "schemas": len(schemas),
        "ways": {way: summary([answer for row in found for answer in row.get(way, [])]) for way in ways},
        **differences(found),
        "invalid": [f"{row['name']}: {way}" for row in found for way in row["invalid"]],
        "skipped": [f"{row['name']}: {row['skipped']}" for row in done if "skipped" in row],
        "names": [name for name, _ in schemas],
    }


def done_before(rows: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file by name; none if there is none."""
    return {row["name"]: row for row in map(json.loads, rows.open(encoding="utf-8"))} if rows.exists() else {}


def differences(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The canvas beside each other way."""
    return {
        f"canvas_minus_{way}": difference([row for row in rows if way in row], "canvas", way)
        for way in ("mask", "mask_greedy", "raw")
    }


def _row(run: Run, schema: Any, seed: int, more: bool) -> dict[str, Any]:
    try:
        row: dict[str, Any] = {"canvas": [run.canvas(PROMPT, schema, seed)]}
    except RequestError as error:  # no answer within the budget
        return {"skipped": str(error)}
    row["mask"] = [run.masked(PROMPT, schema, seed + 1_000 * again) for again in range(DRAWS)]
    row["mask_greedy"] = [run.masked(PROMPT, schema, None)]
    if more:
        row["raw"] = [run.canvas(PROMPT, schema, seed, raw=True)]
    row["invalid"] = [way for way, told in row.items() if not all(valid(answer["text"], schema) for answer in told)]
    if more:
        row["free"] = [run.free(PROMPT, row["canvas"][0]["tokens"], seed)]
    return row


def summary(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the answers of one way."""
    tokens = max(1, sum(answer["tokens"] for answer in answers))
    return {
        "answers": len(answers),
        "tokens": tokens,
        "steps_per_token": round(sum(answer["steps"] for answer in answers) / tokens, 3),
        "seconds_per_token": round(sum(answer["seconds"] for answer in answers) / tokens, 4),
        "logprob_per_answer": round(sum(answer["logprob"] for answer in answers) / max(1, len(answers)), 3),
        "logprob_per_token": round(sum(answer["logprob"] for answer in answers) / tokens, 4),
    }


def difference(rows: Sequence[dict[str, Any]], left: str, right: str) -> dict[str, Any]:
    """Paired by prompt and schema: how much more log-probability `left` has, with 95 % bootstrap intervals over pairs.

    Of answers and of their mean per token; `not_less` is the share of pairs whose left answer has at least as much
    (each of several right answers is a part of its pair), `equal` that of equal texts. Long answers rule the mean.
    """

    def over(worth: Callable[[dict[str, Any], dict[str, Any]], float]) -> list[float]:
        return [statistics.fmean(worth(a, b) for a in row[left] for b in row[right]) for row in rows]

    whole = over(lambda a, b: a["logprob"] - b["logprob"])
    each = over(lambda a, b: a["logprob"] / a["tokens"] - b["logprob"] / b["tokens"])
    return {
        "pairs": len(rows),
        "mean": interval(whole, statistics.fmean),
        "median": interval(whole, statistics.median),
        "per_token_mean": interval(each, statistics.fmean),
        "per_token_median": interval(each, statistics.median),
        "not_less": interval(over(lambda a, b: a["logprob"] >= b["logprob"] - 1e-4), statistics.fmean),
        "per_token_not_less": interval(
            over(lambda a, b: a["logprob"] / a["tokens"] >= b["logprob"] / b["tokens"] - 1e-6), statistics.fmean
        ),
        "equal": round(statistics.fmean(over(lambda a, b: a["text"] == b["text"])), 4),
    }


def interval(values: Sequence[float], of: Callable[[Sequence[float]], float], rounds: int = 2_000) -> dict[str, float]:
    """A statistic of the values and where 95 % of its bootstrap values lie."""
    chance = random.Random(0)
    found = sorted(of(chance.choices(values, k=len(values))) for _ in range(rounds))
    low, high = found[rounds // 40], found[-rounds // 40 - 1]
    return {"value": round(of(values), 4), "low": round(low, 4), "high": round(high, 4)}


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
    parser.add_argument("--rows", type=Path, default=Path("build/constraints/rows.jsonl"))
    parser.add_argument("--public", type=int, default=60)
    parser.add_argument("--generated", type=int, default=200)
    parser.add_argument("--more", type=int, default=4, help="plain signal and no constraint for one schema of so many")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    llm = LLM.load(arguments.model, threads=arguments.threads)
    run = Run(llm)
    result: dict[str, Any] = {"model": arguments.model, "threads": arguments.threads, "budget": BUDGET, "draws": DRAWS}
    if arguments.suite:
        chosen, told = suite(arguments.suite, arguments.public)
        result["suite"] = told | compare(run, chosen, arguments.rows, arguments.more)
    chance = random.Random(7)
    made = [(f"generated {number}", random_schema(chance)) for number in range(arguments.generated)]
    result["generated"] = compare(run, made, arguments.rows, arguments.more)
    names = [name for part in ("suite", "generated") for name in result.get(part, {}).get("names", [])]
    rows = done_before(arguments.rows)
    result["all"] = differences([rows[name] for name in names if "canvas" in rows[name]])
    result["compile"] = list(compile_times(llm))
    kept = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    arguments.out.write_text(json.dumps(kept | result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
