"""The model card of the default recipe, written from report.json alone: every number in it was measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LAST = 50  # training steps that the closing losses average over


def read_metrics(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """One record per step of runs that follow each other; a resumed run repeats some, of which the last counts."""
    every: list[dict[str, Any]] = []
    for path in (run / "metrics.jsonl" for run in runs):
        if not path.is_file():
            return []
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        steps, seconds = (every[-1]["step"] + 1, every[-1]["seconds"]) if every else (0, 0.0)
        for _, row in sorted({row["step"]: row for row in records}.items()):
            every.append(row | {"step": row["step"] + steps, "seconds": row["seconds"] + seconds})
    return every


def training_facts(runs: Sequence[Path], data: Path) -> dict[str, Any]:
    """Data with sizes and licences, and what the run took; without metrics the run is left out."""
    facts: dict[str, Any] = {"sources": json.loads((data / "sources.json").read_text()), "sets": {}}
    for path in sorted(data.glob("*.npz")):
        with np.load(path) as file:
            facts["sets"][path.stem] = {"documents": len(file["offsets"]) - 1, "tokens": int(file["offsets"][-1])}
    metrics = read_metrics(runs)
    if metrics:
        last: dict[str, dict[str, float]] = {}
        for source in sorted({row["source"] for row in metrics}):
            rows = [row for row in metrics if row["source"] == source][-LAST:]
            last[source] = {key: float(np.mean([row[key] for row in rows])) for key in ("canvas", "encoder")}
        facts["run"] = {
            "steps": metrics[-1]["step"] + 1,
            "canvas_tokens": sum(row["tokens"] for row in metrics),
            "hours": metrics[-1]["seconds"] / 3600,
            "last_losses": last,
        }
    return facts


def loss_curve(runs: Sequence[Path], path: Path) -> None:
    """Canvas and encoder loss over the steps, smoothed, by source."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the loss curve needs matplotlib: pip install 'dgemma[train]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(runs)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
    for axis, key in zip(axes, ("canvas", "encoder"), strict=True):
        for source in sorted({row["source"] for row in metrics}):
            rows = [row for row in metrics if row["source"] == source]
            values = [row[key] for row in rows]
            smooth = [float(np.mean(values[max(0, at - 9) : at + 1])) for at in range(len(values))]
            axis.plot([row["step"] for row in rows], smooth, label=source.removeprefix("train_"))
        axis.set(title=f"{key} loss, mean of 10 steps", xlabel="step", ylabel="nats a token", ylim=(0, None))
    axes[0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def model_card(report: dict[str, Any]) -> str:
    """Markdown. Sections whose facts are missing are left out."""
    parts = [_head(report), _settings(report), _likelihood(report), _texts(report), _samples(report), _training(report)]
    blocks = "\n\n".join(parts).strip().split("\n\n")
    return "\n\n".join(_flow(block.strip()) for block in blocks if block.strip()) + "\n"


def _flow(block: str) -> str:
    """Break lines of prose and lists anew after numbers were put in; tables, quotes and headings stay."""
    if block[0] in "|>#":
        return block
    items = block.split("\n* ") if block.startswith("* ") else [block]
    lines = [" ".join(item.removeprefix("* ").split()) for item in items]
    if block.startswith("* "):
        return "\n".join(textwrap.fill("* " + line, 118, subsequent_indent="  ") for line in lines)
    return textwrap.fill(lines[0], 118, break_on_hyphens=False, break_long_words=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(report: dict[str, Any]) -> str:
    model, count = report["model"], report["model"]["parameters"]
    config = model["config"]
    kinds = [layer["kind"] for layer in config["layers"]]
    quick = "**These figures are from a smoke run (`--quick`) and mean nothing.**" if report["quick"] else ""
    return f"""
# {model["name"]}: a tiny block-diffusion language model

{quick}

A demonstration model with the architecture of DiffusionGemma: an encoder reads the text so far, and a denoiser writes
a canvas of tokens at once, from random tokens, by repeated denoising. It was trained from scratch on the data below;
no weights and no outputs of another model went into it.

* **For:** showing and testing block diffusion on a laptop. It tells short children's stories in English.
* **Not for:** anything else. It knows no facts, answers no questions, and continues other prose only loosely.
* **Size:** {count["total"]:,} parameters, {count["active"]:,} at work on a token, {count["embedding"]:,} of them the
  tied embedding; {len(kinds)} layers ({kinds.count("sliding")} sliding, {kinds.count("full")} full attention), hidden
  size {config["hidden_size"]}, {config["num_experts"]} experts ({config["top_k_experts"]} used), vocabulary
  {config["vocab_size"]:,} (byte-level BPE).
* **Licence:** Apache-2.0.
"""


def _settings(report: dict[str, Any]) -> str:
    generation, done = report["model"]["generation"], report["decoding"]
    width = generation["canvas_length"] or report["model"]["config"]["canvas_length"]
    return f"""
## Sampler

Settings that the checkpoint carries: canvas of {width} tokens, at most {generation["max_denoising_steps"]} steps,
entropy bound {generation["entropy_bound"]}, temperature {generation["t_max"]} to {generation["t_min"]}, stop when the
prediction repeats {generation["stability_threshold"]}x and its mean entropy is below
{generation["confidence_threshold"]} nats.

On {done["canvases"]} canvases after held-out prompts: **{done["steps_per_canvas"]:.1f} steps a canvas** (quartiles
{", ".join(f"{q:.0f}" for q in done["steps_quartiles"])}), **{done["tokens_per_forward"]:.2f} tokens per forward
pass**, {done["stopped_by_rule"]:.0%} of the canvases ended by the stop rule and not by the step limit,
{done["ended_by_end_token"]:.0%} of the answers ended with the end token.
"""


def _likelihood(report: dict[str, Any]) -> str:
    found = report["likelihood"]
    rows = []
    for kind in ("prose", "stories"):
        one = found[kind]
        bound = one["bound"][one["better"]]
        texts = (
            ("encoder, autoregressive", one["autoregressive"]),
            ("the same, on the bound's tokens", one["same_tokens_autoregressive"]),
            ("diffusion bound, raw", bound["raw"]),
            ("**diffusion bound, calibrated**", bound["calibrated"]),
        )
        for name, mean in texts:
            rows.append([
                f"held-out {kind}", name, f"{mean['bits_per_byte']:.3f} ± {mean['bits_per_byte_se']:.3f}",
                f"{mean['nats_per_token']:.3f}", f"{mean['bytes'] / 1e6:.2f} MB", str(mean["documents"]),
            ])  # fmt: skip
    passes = {"single_pass": "one pass", "two_passes": "two passes (self-conditioning from the same noise)"}
    better = {kind: passes[found[kind]["better"]] for kind in ("prose", "stories")}
    ratios = ", ".join(f"{kind} {found[kind]['bound_over_autoregressive']:.2f}" for kind in ("prose", "stories"))
    levels = [[
        f"{kind}", *(f"{row['every']:.2f}" for row in found[kind]["canvas_cross_entropy"]["single_pass"])
    ] for kind in ("prose", "stories")]  # fmt: skip
    names = [f"t = {row['level']:g}" for row in found["prose"]["canvas_cross_entropy"]["single_pass"]]
    return f"""
## Likelihood of held-out text

{_table(["text", "measure", "bits per byte", "nats a token", "text", "documents"], rows)}

± is one standard error over documents. The encoder reads windows with {found["context"]} tokens of context. The bound
is of canvases of {found["width"]} tokens, each given the clean text before it; of prose, the first
{found["bound_tokens_per_document"] - 1} tokens of each document. Raw takes the denoiser's prediction as it is. It is
not told the noise level, so the calibrated bound adds one number per tenth of the noise level to the logit of the
token that stands at the position; the numbers are fitted on one half of the documents and used on the other, so it is
still a bound. Of the two ways to run the denoiser the better one is shown: prose {better["prose"]}, stories
{better["stories"]}. Calibrated bound over encoder on the same tokens: {ratios}.

Cross-entropy of the canvas in nats a token, all positions, by noise level (one pass):

{_table(["", *names], levels)}
"""


def _texts(report: dict[str, Any]) -> str:
    figures = report["texts"]
    rows = []
    for origin in ("diffusion", "autoregressive", "held-out"):
        for kind, one in figures[origin].items():
            judge, story = one["judge"], one.get("consistency")
            rows.append([
                origin, kind, str(one["samples"]), " / ".join(f"{share:.2f}" for share in one["distinct"]),
                f"{one['copied_12_grams']:.1%}",
                f"{judge['nats_per_token']:.2f} ± {judge['se']:.2f}" if judge else "-",
                f"{story['consistency']:.1%} ± {story['consistency_se']:.1%}" if story else "-",
                f"{story['faultless']:.0%}" if story else "-",
            ])  # fmt: skip
    judge = figures["judge"]
    gap = ""
    if "gap" in judge:
        gap = (
            f"Over both kinds, diffusion samples are {judge['gap']:+.2f} ± {judge['gap_se']:.2f} nats a token from "
            f"autoregressive samples of the same weights; the early gate of the recipe allows {judge['gate']:g}: "
            f"**{'passed' if judge['passed'] else 'not passed'}**."
        )
    head = ["text", "kind", "number", "distinct-1/2/3", "copied 12-grams", "judge, nats", "consistent sentences"]
    return f"""
## Samples

{_table([*head, "faultless"], rows)}

Continuations of held-out prompts; *held-out* is what really follows them. The judge is an n-gram model (Kneser-Ney,
order {judge["order"]}) of the training text, independent of the network: it tells fluent from broken and no more, and
favours safe and copied wording, so read it beside distinct-n. {gap}

*Copied 12-grams* are runs of twelve words that occur in the training text. The stories come from a grammar with
few sentences, so real held-out stories share most of theirs too: compare the rows. *Consistent sentences* are those
that the grammar could have told and that agree with what came before (names, pronouns, colours, order of events).
"""


def _samples(report: dict[str, Any]) -> str:
    shown = [
        f"**{sample['prompt']}**{sample['text']}\n\n(seed {sample['seed']}, "
        f"steps {', '.join(map(str, sample['steps']))}, finish reason {sample['finish_reason']})"
        for sample in report["samples"]
    ]
    quoted = ["\n".join(f"> {line}".rstrip() for line in text.split("\n")) for text in shown]
    return "### The first prompts, seeds 0, 1, 2, ..., unedited\n\n" + "\n\n".join(quoted)


def _training(report: dict[str, Any]) -> str:
    facts = report["training"]
    sizes = [
        [name.replace("_", " "), f"{one['documents']:,}", f"{one['tokens']:,}"] for name, one in facts["sets"].items()
    ]
    licences = [[s["name"], f"`{s['file']}`", s["licence"], f"`{s['sha256'][:16]}...`"] for s in facts["sources"]]
    run = ""
    if "run" in facts:
        one = facts["run"]
        losses = [
            [name.removeprefix("train_"), f"{loss['canvas']:.3f}", f"{loss['encoder']:.3f}"]
            for name, loss in one["last_losses"].items()
        ]
        run = f"""
{one["steps"]:,} steps, {one["canvas_tokens"] / 1e6:.1f} M canvas tokens, {one["hours"]:.1f} hours on a CPU (report
made on: {report["machine"]["cpu"]}, {report["machine"]["cores"]} cores). Losses of the last {LAST} steps of each
source, nats a token:

{_table(["source", "canvas", "encoder"], losses)}
"""
    return f"""
## Training

Stories and chats come from a seeded grammar in this repository (`dgemma/train/stories`, our own text, CC0-1.0).
Prose comes from packages:

{_table(["prose", "package", "licence", "sha256"], licences)}

{_table(["set", "documents", "tokens"], sizes)}

Held-out prose is chosen by the hash of a document's name after paragraphs were deduplicated; held-out stories have
seeds of their own and none equals a training story.
{run}
To repeat all of it: `python recipes/default/build_data.py`, `dgemma train recipes/default.yaml`,
copy `runs/default/model`, `python recipes/default/report.py`.
"""
