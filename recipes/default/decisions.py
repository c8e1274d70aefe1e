"""Questions about stories as a task for decision reads: makes the data, and measures a model that was trained on it.

    python recipes/default/decisions.py data                    # build/decisions: what to train on, and what to ask
    dgemma train recipes/decisions.yaml --out runs/decisions    # minutes
    python recipes/default/decisions.py report                  # docs/figures/decisions.json and .png

Run the report when nothing else runs, because it times. Stories for training and for questions have different seeds.
Questions are split by story: temperatures are fitted on one half and everything is reported on the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dgemma import LLM
from dgemma.bench.machine import Machine
from dgemma.control.decide import QUESTION, Question, prepare
from dgemma.eval.calibration import BINS, for_fitting, plot_reliability, reliability
from dgemma.eval.decisions import Item, Measured, Report, fit, load_items, measure
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.data.documents import Source
from dgemma.train.stories import make_story
from dgemma.train.stories.questions import facts_row, question_parts, story_clozes, story_questions

ROOT = Path(__file__).resolve().parents[2]
DATA, FIGURES = ROOT / "build" / "decisions", ROOT / "docs" / "figures"
# Apart from each other and from those of the default model's data.
TRAIN_SEED, OPENING_SEED, FACTS_SEED, TEST_SEED = 3_000_000, 3_200_000, 3_400_000, 4_000_000
DRAWS = (1, 2, 4, 8)


def question_rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows for `dgemma calibrate`: every question about each story, behind it."""
    for seed in range(TEST_SEED, TEST_SEED + count):
        story = make_story(seed)
        for one in story_questions(story, seed):
            labels = {"labels": list(one.labels), "text": one.text, "name": one.topic}
            yield {"template": f"{story.text}\n\n{QUESTION}", "kind": one.kind, **labels, "answer": one.answer}


def question_tokens(tokenizer: Tokenizer, seeds: Iterable[int], whole: bool) -> Source:
    """Stories with questions, of which only the answers are targets: most of what a question says is chance."""
    documents: list[list[int]] = []
    spans: list[tuple[int, int]] = []
    begin = 0
    for seed in seeds:
        ids = [tokenizer.bos]
        for asked, answer in question_parts(seed, whole=whole):
            ids += tokenizer.encode(asked)
            spans.append((begin + len(ids), begin + len(ids) + len(told := tokenizer.encode(answer))))
            ids += told
        documents.append(ids)
        begin += len(ids)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return Source("questions", np.concatenate(documents).astype(np.uint16), offsets, np.array(spans), True, None)


def make_data(out: Path, train: int, test: int) -> None:
    """Write what to train on, of different stories, and what to ask."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = LLM.load("default").tokenizer
    for name, first, whole in (("train_openings", OPENING_SEED, False), ("train_questions", TRAIN_SEED, True)):
        question_tokens(tokenizer, range(first, first + train), whole).save(out / f"{name}.npz")
    told = (facts_row(FACTS_SEED + seed) for seed in range(train))
    for name, rows in (("train_facts", told), ("questions", question_rows(test))):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cloze_items(count: int) -> list[Item]:
    """What a story says next, without any training."""
    return [
        Item(one.text, Question("choice", one.labels, name=one.topic), one.labels.index(one.answer))
        for seed in range(TEST_SEED, TEST_SEED + count)
        for one in story_clozes(make_story(seed))
    ]


def by_topic(measured: Sequence[Measured]) -> dict[str, Any]:
    """Untempered accuracy and NLL of each topic, on the test split."""
    told = {}
    for topic in sorted({one.item.question.name for one in measured}):
        own = [one for one in measured if one.item.question.name == topic and not for_fitting(one.item.template)]
        denoiser, encoder = (reliability([getattr(one, who) for one in own]) for who in ("denoiser", "encoder"))
        told[topic] = {
            "kind": own[0].kind,
            "questions": len(own),
            "accuracy": round(denoiser.accuracy, 4),
            "encoder_accuracy": round(encoder.accuracy, 4),
            "nll": round(denoiser.nll, 4),
            "encoder_nll": round(encoder.nll, 4),
        }
    return told


def rates(llm: LLM, items: Sequence[Item], rounds: int) -> dict[str, Any]:
    """Answers per second: reads of one story's questions together, of one alone, and autoregressive ones to the same.

    The autoregressive answers are greedy, two tokens long (a label and the full stop), and share a batch where the
    reads do. Nothing is taken from earlier prompts. All ways take turns; medians over rounds.
    """
    passages = list(dict.fromkeys(item.template for item in items))[: rounds + 1]
    seconds: dict[str, list[float]] = {}
    passes: dict[str, list[int]] = {}
    together: list[int] = []
    for round_, template in enumerate(passages):
        questions = [item.question for item in items if item.template == template]
        together.append(len(questions))
        asked = prepare(llm.tokenizer.encode, template, questions, llm.encode_prompt(""))
        greedy = {"mode": "ar", "temperature": 0.0, "max_new_tokens": 2, "reuse": False}
        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "reads, 1 draw": (len(asked), lambda t=template, q=questions: llm.decide(t, q, draws=1)),
            "reads, 4 draws": (len(asked), lambda t=template, q=questions: llm.decide(t, q, draws=4)),
            "autoregressive": (len(asked), lambda a=asked, g=greedy: llm.generate([list(one.lead) for one in a], **g)),
            "one read, 1 draw": (1, lambda t=template, q=questions: llm.decide(t, q[0], draws=1)),
            "one read, 4 draws": (1, lambda t=template, q=questions: llm.decide(t, q[0], draws=4)),
            "one autoregressive": (1, lambda a=asked, g=greedy: llm.generate(list(a[0].lead), **g)),
        }
        for name, (count, work) in ways.items():
            before, begun = llm.engine.counters, time.perf_counter()
            work()
            if round_:  # the first round warms up
                seconds.setdefault(name, []).append((time.perf_counter() - begun) / count)
                after = llm.engine.counters
                passes.setdefault(name, []).append(after.denoise_passes - before.denoise_passes)
    told = {name: round(1 / statistics.median(values), 2) for name, values in seconds.items()}
    return {
        "rounds": len(passages) - 1,
        "questions_together": round(statistics.fmean(together), 2),
        "answers_per_second": told,
        "denoise_passes": {name: round(statistics.fmean(counts), 2) for name, counts in passes.items()},
        "ratio_together": round(told["reads, 4 draws"] / told["autoregressive"], 3),
        "ratio_together_1_draw": round(told["reads, 1 draw"] / told["autoregressive"], 3),
        "ratio_alone": round(told["one read, 4 draws"] / told["one autoregressive"], 3),
        "ratio_alone_1_draw": round(told["one read, 1 draw"] / told["one autoregressive"], 3),
    }


def table(reports: Sequence[Report]) -> str:
    """For a page: what the test split says."""
    rows = ["| kind | questions | accuracy | ECE raw | ECE fitted | T | encoder: accuracy | ECE raw | ECE fitted | T |"]
    rows.append("|---|" + "--:|" * 9)
    for one in reports:
        own = f"{one.raw.accuracy:.1%} | {one.raw.ece:.3f} | {one.calibrated.ece:.3f} | {one.temperature:.2f}"
        encoder = f"{one.encoder_raw.accuracy:.1%} | {one.encoder_raw.ece:.3f} | {one.encoder_calibrated.ece:.3f}"
        rows.append(f"| {one.kind} | {one.raw.count} | {own} | {encoder} | {one.encoder_temperature:.2f} |")
    return "\n".join(rows)


def make_report(arguments: argparse.Namespace) -> None:
    """Measure, write the figures, print the table."""
    llm, shipped = (LLM.load(name, threads=arguments.threads) for name in (arguments.model, "default"))
    items = load_items(arguments.data / "questions.jsonl")
    if arguments.stories:
        kept = set(list(dict.fromkeys(item.template for item in items))[: arguments.stories])
        items = [item for item in items if item.template in kept]
    measured = measure(llm, items, draws=4)
    calibration, reports = fit(measured)
    few = [item for item in items if not for_fitting(item.template)][: arguments.few]
    told = {
        "model": Path(arguments.model).resolve().as_posix().removeprefix(f"{ROOT}/"),
        "machine": asdict(Machine.of(llm.device, llm.dtype)),
        "draws": 4,
        "bins": BINS,
        "kinds": [one.json() for one in reports],
        "topics": by_topic(measured),
        "by_draws": {
            str(draws): {
                "accuracy": round(found.accuracy, 4),
                "nll": round(found.nll, 4),
                "ece": round(found.ece, 4),
            }
            for draws in DRAWS
            for found in [reliability([one.denoiser for one in measure(llm, few, draws=draws)])]
        },
        "shipped_model_clozes": by_topic(measure(shipped, cloze_items(arguments.clozes), draws=4)),
        "rates": rates(llm, items, arguments.rounds),
    }
    arguments.figures.mkdir(parents=True, exist_ok=True)
    (arguments.figures / "decisions.json").write_text(json.dumps(told, indent=1) + "\n")
    curves = {
        one.kind: {
            "denoiser": one.raw,
            f"denoiser, T {one.temperature:.2f}": one.calibrated,
            "encoder": one.encoder_raw,
            f"encoder, T {one.encoder_temperature:.2f}": one.encoder_calibrated,
        }
        for one in reports
    }
    plot_reliability(curves, arguments.figures / "decisions.png")
    calibration.save(Path(llm.folder) / "calibration.json")
    print(table(reports), json.dumps(told["topics"], indent=1), json.dumps(told["rates"], indent=1), sep="\n\n")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "report"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--train", type=int, default=3_000, help="stories of each file to train on")
    parser.add_argument("--test", type=int, default=400, help="stories to ask about")
    parser.add_argument("--model", default=ROOT / "runs" / "decisions" / "model")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--stories", type=int, help="report on so many of them only")
    parser.add_argument("--clozes", type=int, default=300, help="stories that the shipped model completes")
    parser.add_argument("--few", type=int, default=800, help="questions to compare numbers of draws on")
    parser.add_argument("--rounds", type=int, default=30, help="of the speed comparison")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "data":
        make_data(arguments.data, arguments.train, arguments.test)
    else:
        make_report(arguments)


if __name__ == "__main__":
    main()
