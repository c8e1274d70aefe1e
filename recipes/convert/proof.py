"""What an autoregressive start is worth: our small model trained from scratch, and converted from its AR twin.

python recipes/default/build_data.py                                # once: build/default
python recipes/convert/proof.py --figure docs/figures/convert.png   # one core, about 18 minutes; resumes by pieces

A piece is one training run; its result is a file in `--out`, and a piece whose file exists is not run again.
  ar        next-token loss only, learning rate from 3 short runs
  scratch   diffusion (official objective) from random weights, learning rate from 3 short runs
  converted the same, from the AR weights (`add_diffusion_parts`), learning rate from 3 short runs of its own
  warm      as converted, but for the first fifth of the steps only self-conditioning and norms train
A grid whose best value is its largest or smallest is extended by one value on that side; the longest run from scratch
is made at half of its best rate too, and the better one is the target. Every run has its own warm-up and its own decay
to zero, so each point of a curve is a finished model. Measured on held-out stories: the canvas cross-entropy at five
fixed noise levels with fixed noise, the mean of "no signal" and "told its own first prediction" (the objective tells
half of the rows). Compute is counted in FLOPs (lab.py).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lab import NOISE_LEVELS, QUICK, Lab, Piece, Point, Size


def crossing(points: list[Point], target: float) -> tuple[float | None, bool]:
    """FLOPs at which the loss reaches `target`, log-linear between finished runs; (None, ...) if it never does.

    The flag says that already the shortest run is there, so the number is an upper bound.
    """
    ordered = sorted(points, key=lambda point: point.flops)
    if ordered[0].canvas <= target:
        return ordered[0].flops, True
    for short, long in pairwise(ordered):
        if long.canvas <= target:
            share = (short.canvas - target) / (short.canvas - long.canvas)
            return math.exp(math.log(short.flops) + share * math.log(long.flops / short.flops)), False
    return None, False


def experiment(lab: Lab) -> dict[str, Any]:
    size = lab.size

    def runs(name: str, start: str, shares: tuple[float, ...], lr: float, warm: bool = False) -> Iterator[Point]:
        for share in shares:
            steps = round(share * size.steps)
            yield lab.point(Piece(f"{name}_{share:g}", "diffusion", start, steps, lr, warm))

    lr_ar, tune_ar = lab.tuned("ar", "random", "ar")
    ar = lab.point(Piece("ar", "ar", "random", round(size.ar * size.steps), lr_ar))
    lr_scratch, tune_scratch = lab.tuned("diffusion", "random", "scratch")
    lr_converted, tune_converted = lab.tuned("diffusion", "ar", "converted")

    def curve(points: list[Point], lr: float, more: Iterator[Point]) -> list[Point]:
        best = [point for point in points if point.piece.lr == lr]
        return sorted([*best, *more], key=lambda point: point.flops)

    scratch = curve(tune_scratch, lr_scratch, runs("scratch", "random", size.scratch, lr_scratch))
    converted = curve(tune_converted, lr_converted, runs("converted", "ar", size.converted, lr_converted))
    warm = list(runs("warm", "ar", (size.warm,), lr_converted, warm=True))
    # Short runs may flatter a rate that is too large for a long one; the target gets the benefit of the doubt.
    longest = [scratch.pop(), *runs("scratch_half", "random", size.scratch[-1:], lr_scratch / 2)]
    target = min(longest, key=lambda point: point.canvas)
    scratch.append(target)
    flops, bound = crossing(converted, target.canvas)
    return {
        "size": asdict(size),
        "seed": lab.seed,
        "torch": torch.__version__,
        "learning_rates": {"ar": lr_ar, "scratch": target.piece.lr, "converted": lr_converted},
        "target": target.canvas,
        "fraction_without_ar": flops and flops / target.flops,
        "fraction_with_ar": flops and (flops + ar.flops) / target.flops,
        "fraction_is_upper_bound": bound,
        "ar_share": ar.flops / target.flops,
        "tuning": {
            name: [(point.piece.lr, point.encoder if name == "ar" else point.canvas) for point in points]
            for name, points in (
                ("ar", tune_ar),
                ("scratch", tune_scratch),
                ("scratch at full length", longest),
                ("converted", tune_converted),
            )
        },
        "points": {
            name: [asdict(point) for point in points]
            for name, points in (("ar", [ar]), ("scratch", scratch), ("converted", converted), ("warm", warm))
        },
    }


def show(result: dict[str, Any]) -> Iterator[str]:
    """The result as Markdown, line by line. Compute is relative to the longest from-scratch run."""
    levels = [f"t={t:g}" for t in NOISE_LEVELS]
    yield "| run | steps | lr | compute | with AR | " + " | ".join(levels) + " | canvas | encoder |"
    yield "|---|" + "--:|" * (len(levels) + 6)
    whole = result["points"]["scratch"][-1]["flops"]
    for name, points in result["points"].items():
        for p in points:
            share, more = p["flops"] / whole, result["ar_share"] if p["piece"]["start"] == "ar" else 0.0
            canvas = [*(f"{sum(pair) / 2:.2f}" for pair in p["by_t"].values()), f"{p['canvas']:.3f}"]
            cells = [name, str(p["piece"]["steps"]), f"{p['piece']['lr']:g}", f"{share:.3f}", f"{share + more:.3f}"]
            cells += [""] * len(canvas) if name == "ar" else canvas
            yield "| " + " | ".join([*cells, f"{p['encoder']:.3f}"]) + " |"
    yield ""
    for name, tried in result["tuning"].items():
        yield f"Learning rates tried, {name}: " + ", ".join(f"{lr:g} gives {loss:.3f}" for lr, loss in tried) + "."
    yield ""
    if result["fraction_without_ar"] is None:
        yield "The converted runs never reach the from-scratch loss."
        return
    sign = "at most " if result["fraction_is_upper_bound"] else ""
    yield (
        f"The from-scratch loss of {result['target']:.3f} is reached with {sign}{result['fraction_without_ar']:.1%} of "
        f"its compute, {sign}{result['fraction_with_ar']:.1%} with the AR pre-training."
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Loss against compute, both relative to the longest from-scratch run, as a small PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points, whole = result["points"], result["points"]["scratch"][-1]["flops"]
    figure, axes = plt.subplots(figsize=(5.2, 3.2), dpi=110)
    lines = (
        ("from scratch", "scratch", 0.0, "o-"),
        ("converted", "converted", 0.0, "s-"),
        ("converted, AR counted", "converted", result["ar_share"], "s:"),
        ("converted, frozen first", "warm", 0.0, "^"),
    )
    for label, name, more, style in lines:
        compute = [p["flops"] / whole + more for p in points[name]]
        axes.plot(compute, [p["canvas"] for p in points[name]], style, label=label, markersize=4)
    axes.axhline(result["target"], color="grey", linewidth=0.7)
    axes.set(xscale="log", xlabel="compute (1 = the longest run from scratch)", ylabel="canvas cross-entropy, nats")
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/default"))
    parser.add_argument("--out", type=Path, default=Path("runs/convert"))
    parser.add_argument("--steps", type=int, help=f"length of the longest run from scratch (default {Size.steps})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="write the curves there (PNG, needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else Size()
    size = replace(size, steps=args.steps or size.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    result = experiment(Lab(args.data, args.out, size, args.seed, print))
    (args.out / "proof.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(show(result)))
    if args.figure:
        draw(result, args.figure)


if __name__ == "__main__":
    main()
