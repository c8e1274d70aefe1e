"""Measure a checkpoint of the default recipe on held-out data: writes report.json and README.md into its folder.

    python recipes/default/report.py                       # dgemma/models/default, all of it
    python recipes/default/report.py FOLDER --quick        # a smoke version of less than a minute

What is measured, and how, is said in dgemma/eval. Run it when nothing trains: it uses all cores.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from card import loss_curve, model_card, training_facts
from rich.console import Console

from dgemma import LLM
from dgemma.api import Generation
from dgemma.bench.machine import Machine
from dgemma.checkpoint.load import load_checkpoint
from dgemma.config import ModelConfig
from dgemma.eval.documents import Document, byte_lengths, estimate, load_documents
from dgemma.eval.judge import NgramJudge
from dgemma.eval.likelihood import Canvas, autoregressive, canvas_cross_entropy, diffusion_bound
from dgemma.eval.samples import CopyIndex, distinct, story_score
from dgemma.model import DiffusionGemma
from dgemma.text.tokenizer import Tokenizer

REGION = CONTEXT = 256
GATE = 1.5  # nats a token that diffusion samples may be worse than autoregressive ones


@dataclass(frozen=True)
class Size:
    """How much of everything: documents (None: all), tokens of each that the bound reads, seeds per prompt."""

    stories: int | None = 1000
    prose: int | None = None
    bound_stories: int = 150
    bound_prose: int | None = 60
    bound_tokens: int = 1025
    rounds: int = 1
    losses: int = 30
    prompts: int = 20
    seeds: int = 1
    new_tokens: int | None = None
    training: int | None = None


QUICK = Size(
    stories=12, prose=3, bound_stories=4, bound_prose=4, bound_tokens=257, losses=2,
    prompts=2, seeds=1, new_tokens=48, training=2000,
)  # fmt: skip


def parameters(model: DiffusionGemma) -> dict[str, int]:
    """All, those of the (tied) embedding, and those that work on one token."""
    config, total = model.config, sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = experts * (config.num_experts - config.top_k_experts) // max(1, config.num_experts)
    return {"total": total, "embedding": model.embed.weight.numel(), "active": total - idle}


def likelihood(
    model: DiffusionGemma, documents: Sequence[Document], subset: Sequence[Document], canvas: Canvas, size: Size
) -> dict[str, Any]:
    """The encoder on all documents; on the subset the bound with and without signal, beside the encoder's number."""
    bounds = {s: diffusion_bound(model, subset, replace(canvas, signal=s), rounds=size.rounds) for s in (False, True)}
    best = min(bounds, key=lambda signal: bounds[signal].calibrated.bits_per_byte)
    same = autoregressive(model, subset, canvas)
    losses = {
        name: [asdict(row) for row in canvas_cross_entropy(model, subset[: size.losses], replace(canvas, signal=told))]
        for name, told in (("single_pass", False), ("two_passes", True))
    }
    return {
        "autoregressive": asdict(autoregressive(model, documents)),
        "same_tokens_autoregressive": asdict(same),
        "bound": {("two_passes" if s else "single_pass"): asdict(bound) for s, bound in bounds.items()},
        "better": "two_passes" if best else "single_pass",
        "bound_over_autoregressive": bounds[best].calibrated.bits_per_byte / same.bits_per_byte,
        "canvas_cross_entropy": losses,
    }


def all_likelihoods(model: DiffusionGemma, tokenizer: Tokenizer, data: Path, width: int, size: Size) -> dict[str, Any]:
    eos = model.config.eos_tokens[0]
    lengths = byte_lengths(tokenizer.decode_after, model.config.vocab_size)
    stories = load_documents(data / "heldout_stories.npz", lengths, end_token=eos)
    prose = load_documents(data / "heldout_prose.npz", lengths)
    begun = [Document(d.ids[: size.bound_tokens], d.bytes[: size.bound_tokens]) for d in prose[: size.bound_prose]]
    region = max(width, REGION // width * width)
    canvas = Canvas(width, region, CONTEXT)
    prose = [Document(d.ids[:512], d.bytes[:512]) for d in prose[: size.prose]] if size.prose else prose
    return {
        "width": width,
        "region": region,
        "context": CONTEXT,
        "bound_tokens_per_document": size.bound_tokens,
        "prose": likelihood(model, prose, begun, canvas, size),
        "stories": likelihood(
            model, stories[: size.stories], stories[: size.bound_stories], replace(canvas, fill=eos), size
        ),
    }


@dataclass(frozen=True)
class Sample:
    """A continuation of a held-out prompt, and its kind: "stories" or "prose"."""

    kind: str
    prompt: str
    text: str
    answer: Generation | None = None


def generate(llm: LLM, prompts: Sequence[dict[str, str]], seeds: int, **overrides: Any) -> list[Sample]:
    """Prompt number i gets the seeds i, i + 100, ...; in this order, so the first samples are seeds 0, 1, 2, ..."""
    samples = []
    for turn in range(seeds):
        for number, row in enumerate(prompts):
            answer = llm.generate(row["prompt"], seed=number + 100 * turn, **overrides)
            samples.append(Sample(_kind(row), row["prompt"], answer.text, answer))
    return samples


def _kind(row: dict[str, str]) -> str:
    return "stories" if row["source"].startswith("story") else "prose"


def held_out(prompts: Sequence[dict[str, str]], data: Path, tokenizer: Tokenizer, limit: int) -> list[Sample]:
    """What really follows each prompt, at most `limit` tokens of it."""
    texts = {}
    for name in ("stories", "prose"):
        for line in (data / f"heldout_{name}.jsonl").open():
            row = json.loads(line)
            texts[row["source"]] = row["text"]
    samples = []
    for row in prompts:
        said = r"\s+".join(map(re.escape, row["prompt"].split()))
        match = re.match(said, texts[row["source"]])
        assert match, f"{row['source']} does not begin with its prompt"
        rest = tokenizer.decode_after(tokenizer.encode(texts[row["source"]][match.end() :])[:limit])
        samples.append(Sample(_kind(row), row["prompt"], rest))
    return samples


def decoding(samples: Sequence[Sample]) -> dict[str, Any]:
    """Steps, stops and tokens per forward pass of diffusion samples."""
    answers = [sample.answer for sample in samples if sample.answer]
    steps = [step for answer in answers for step in answer.steps]
    stops = [stop for answer in answers for stop in answer.stops]
    return {
        "canvases": len(steps),
        "steps_per_canvas": float(np.mean(steps)),
        "steps_quartiles": [float(q) for q in np.percentile(steps, [25, 50, 75])],
        "stopped_by_rule": stops.count("stable") / len(stops),
        "tokens_per_forward": float(np.mean([answer.tokens_per_forward for answer in answers])),
        "ended_by_end_token": sum(answer.finish_reason == "stop" for answer in answers) / len(answers),
        "tokens": sum(len(answer.token_ids) for answer in answers),
    }


def judged(samples: Sequence[Sample], judge: NgramJudge, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Nats per token of the continuations, re-tokenised from their text; None if nothing was written."""
    nats, tokens = [], []
    for sample in samples:
        ids = [tokenizer.bos, *tokenizer.encode(sample.prompt + sample.text)]
        given = [tokenizer.bos, *tokenizer.encode(sample.prompt)]
        start = next((n for n, (a, b) in enumerate(zip(ids, given, strict=False)) if a != b), min(len(ids), len(given)))
        values = judge.nats(ids, start)
        nats.append(float(values.sum()))
        tokens.append(len(values))
    if not sum(tokens):
        return None
    mean = estimate(np.array(nats), np.array(tokens), np.ones(len(tokens)))
    return {"nats_per_token": mean.nats_per_token, "se": mean.nats_per_token_se, "tokens": mean.tokens}


def text_figures(
    kinds: dict[str, list[Sample]], judge: NgramJudge, index: CopyIndex, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Everything about texts: by where they are from (diffusion, autoregressive, held-out) and by kind."""
    figures: dict[str, Any] = {}
    for origin, samples in kinds.items():
        figures[origin] = {}
        for kind in ("stories", "prose"):
            chosen = [sample for sample in samples if sample.kind == kind]
            if not chosen:
                continue
            texts = [sample.text for sample in chosen]
            found, total = index.copied(texts)
            one: dict[str, Any] = {
                "samples": len(chosen),
                "distinct": [distinct(texts, n) for n in (1, 2, 3)],
                "copied_12_grams": found / max(1, total),
                "12_grams": total,
                "judge": judged(chosen, judge, tokenizer),
            }
            if kind == "stories":
                one["consistency"] = asdict(story_score([sample.prompt + sample.text for sample in chosen]))
            figures[origin][kind] = one
    both = {origin: judged(samples, judge, tokenizer) for origin, samples in kinds.items()}
    figures["judge"] = {"order": judge.order, **both}
    if both["diffusion"] and both["autoregressive"]:
        gap = both["diffusion"]["nats_per_token"] - both["autoregressive"]["nats_per_token"]
        error = (both["diffusion"]["se"] ** 2 + both["autoregressive"]["se"] ** 2) ** 0.5
        figures["judge"] |= {"gap": gap, "gap_se": error, "gate": GATE, "passed": gap <= GATE}
    return figures


def build_judge(data: Path, config: ModelConfig, limit: int | None) -> NgramJudge:
    sources = []
    for name in ("stories", "prose"):
        with np.load(data / f"train_{name}.npz") as file:
            offsets = file["offsets"][: None if limit is None else limit + 1]
            sources.append((file["ids"][: offsets[-1]], offsets))
    return NgramJudge.fit(sources, config.vocab_size, bos=config.bos_token, eos=config.eos_tokens[0])


def build_index(data: Path, limit: int | None) -> CopyIndex:
    def texts() -> Iterator[str]:
        for name, field in (("stories", "text"), ("prose", "text"), ("chat", "answer")):
            with (data / f"train_{name}.jsonl").open() as lines:
                for number, line in enumerate(lines):
                    if limit is not None and number >= limit:
                        break
                    yield json.loads(line)[field]

    return CopyIndex.build(texts())


@contextlib.contextmanager
def _stage(console: Console, name: str) -> Iterator[None]:
    began = time.monotonic()
    with console.status(name):
        yield
    console.print(f"{name}: {time.monotonic() - began:.0f} s")


def report(
    folder: Path, data: Path, runs: Sequence[Path], size: Size, width: int | None, console: Console
) -> dict[str, Any]:
    llm = LLM.load(folder, device="cpu", dtype="float32")
    model = load_checkpoint(folder, dtype=torch.float32).model.requires_grad_(False)
    width = width or llm.generation.canvas_length or llm.config.canvas_length
    result: dict[str, Any] = {
        "model": {
            "name": llm.name,
            "parameters": parameters(model),
            "config": asdict(llm.config),
            "generation": asdict(llm.generation),
            "weights_sha256": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")
            },
        },
        "machine": asdict(Machine.of(llm.device, llm.dtype)),
        "quick": size == QUICK,
        "size": asdict(size),
        "training": training_facts(runs, data),
    }
    with _stage(console, "samples"):
        prompts = json.loads((data / "heldout_prompts.json").read_text())
        prompts = prompts if size.prompts >= len(prompts) else [*prompts[: size.prompts], prompts[-1]]
        limit = size.new_tokens or llm.generation.max_new_tokens
        made = {
            "diffusion": generate(llm, prompts, size.seeds, max_new_tokens=limit),
            "autoregressive": generate(llm, prompts, size.seeds, max_new_tokens=limit, mode="ar"),
            "held-out": held_out(prompts, data, llm.tokenizer, limit),
        }
        result["samples"] = [
            {"prompt": sample.prompt, "seed": sample.answer.seed, "text": sample.text, "steps": sample.answer.steps,
             "finish_reason": sample.answer.finish_reason}
            for sample in made["diffusion"][:5] if sample.answer
        ]  # fmt: skip
        result["decoding"] = decoding(made["diffusion"][: len(prompts)])
    with _stage(console, "judge and copies"):
        judge, index = build_judge(data, llm.config, size.training), build_index(data, size.training)
        result["texts"] = text_figures(made, judge, index, llm.tokenizer)
        del judge, index
    with _stage(console, "likelihood"):
        result["likelihood"] = all_likelihoods(model, llm.tokenizer, data, width, size)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("dgemma/models/default"))
    parser.add_argument("--data", type=Path, default=Path("build/default"))
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[Path("runs/default"), Path("runs/default-2")],
        help="where metrics.jsonl is, of the parts of the training in their order",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="where to write; default: the checkpoint's folder")
    parser.add_argument("--width", type=int, help="canvas width of losses and bound; default: the checkpoint's")
    parser.add_argument("--figure", type=Path, help="write the loss curve there (PNG, needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that it runs")
    args = parser.parse_args()
    console, out = Console(stderr=True), args.out or args.folder
    result = report(args.folder, args.data, args.runs, QUICK if args.quick else Size(), args.width, console)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "README.md").write_text(model_card(result))
    if args.figure:
        loss_curve(args.runs, args.figure)
    console.print(f"{out}/report.json, {out}/README.md")


if __name__ == "__main__":
    main()
