"""Does it mean anything? What a canvas tells of its tokens, against the encoder's log-probability of the same tokens.

The encoder reads the finished text from left to right: it saw neither the steps nor their entropies. Writes
docs/figures/confidence.json and confidence.png: rank correlations over stories of the shipped model, with an interval
by resampling whole stories, and the encoder's mean surprise (nats) by tenth of each signal.

    python scripts/confidence.py [--stories 100] [--tokens 128] [--steps 48 12] [--out docs/figures]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from dgemma.api import LLM  # noqa: E402

PROMPTS = (
    "Tell me a story.",
    "Tell me a story about a fox.",
    "Write a bedtime story.",
    "Write a story about two friends.",
)
SIGNALS = {
    "entropy": "entropy (nats)",
    "top_logprob": "-log p of the likeliest token",
    "revisions": "revisions",
    "last_change": "step of last change",
}
RESAMPLES = 1000


def collect(llm: LLM, stories: int, tokens: int, steps: int) -> dict[str, list[np.ndarray]]:
    """Of every story, an array a signal and the encoder's surprise, with an entry for each of its tokens."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*SIGNALS, "surprise")}
    for seed in range(stories):
        message = {"role": "user", "content": PROMPTS[seed % len(PROMPTS)]}
        answer = llm.chat([message], seed=1000 + seed, max_new_tokens=tokens, steps=steps, logprobs=0)
        assert answer.logprobs is not None and len(answer.logprobs) == len(answer.confidence)
        sign = {"top_logprob": -1.0}
        for name in SIGNALS:
            values = [sign.get(name, 1.0) * getattr(one, name) for one in answer.confidence]
            found[name].append(np.array(values))
        found["surprise"].append(np.array([-one.logprob for one in answer.logprobs]))
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; ties share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[place]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def measured(found: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Correlations with their 95 % interval, and surprise by tenth (ties at a border fall into the lower one)."""
    random = np.random.default_rng(0)
    surprise = np.concatenate(found["surprise"])
    out: dict[str, Any] = {"stories": len(found["surprise"]), "tokens": len(surprise), "signals": {}}
    for name in SIGNALS:
        whole = np.concatenate(found[name])
        again = []
        for _ in range(RESAMPLES):
            chosen = random.integers(0, len(found[name]), len(found[name]))
            pairs = [np.concatenate([part[one] for one in chosen]) for part in (found[name], found["surprise"])]
            again.append(spearman(*pairs))
        tenths = np.minimum((ranks(whole) * 10 / len(whole)).astype(int), 9)
        low, high = np.percentile(again, [2.5, 97.5])
        out["signals"][name] = {
            "spearman": round(spearman(whole, surprise), 4),
            "interval": [round(float(low), 4), round(float(high), 4)],
            "tenths": [
                {
                    "tokens": int((tenths == tenth).sum()),
                    "signal": round(float(whole[tenths == tenth].mean()), 4),
                    "surprise": round(float(surprise[tenths == tenth].mean()), 4),
                }
                for tenth in range(10)
                if (tenths == tenth).any()
            ],
        }
    return out


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SIGNALS), figsize=(13, 3.4), sharey=True, layout="constrained")
    for axis, (name, label) in zip(axes, SIGNALS.items(), strict=True):
        for steps, result in results.items():
            told = result["signals"][name]
            sizes = np.cumsum([0, *(tenth["tokens"] for tenth in told["tenths"])]) / result["tokens"]
            low, high = told["interval"]
            axis.plot(
                (sizes[:-1] + sizes[1:]) / 2,
                [tenth["surprise"] for tenth in told["tenths"]],
                marker="o",
                markersize=3,
                label=f"{steps} steps: {told['spearman']:.2f} ({low:.2f} to {high:.2f})",
            )
        axis.set(xlabel=f"share of tokens, by {label}", xlim=(0, 1), ylim=(0, None))
        axis.legend(frameon=False, fontsize=8, title="rank correlation", title_fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("encoder's surprise (nats a token)")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[48, 12])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args(arguments)
    llm = LLM.load("default")
    results = {str(steps): measured(collect(llm, options.stories, options.tokens, steps)) for steps in options.steps}
    for steps, result in results.items():
        for name, told in result["signals"].items():
            print(f"{steps} steps, {result['tokens']} tokens, {name}: {told['spearman']:.3f} {told['interval']}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "confidence.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, options.out / "confidence.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
