"""The table of the ablation: means over seeds with 95 % intervals, and the rule that chooses. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Runs = Mapping[str, Sequence[Mapping[str, float]]]
"""Objective -> the scores of its seeds."""

# name -> what the column says, and whether more is better (None: only shown)
YARDSTICKS: Mapping[str, tuple[str, bool | None]] = {
    "stories_ar": ("stories: encoder, bits a byte", False),
    "stories_bound": ("stories: calibrated bound, bits a byte", False),
    "prose_ar": ("prose: encoder, bits a byte", False),
    "prose_bound": ("prose: calibrated bound, bits a byte", False),
    "judge": ("samples: judge, nats a token", False),
    "consistency": ("samples: faultless sentences", True),
    "tokens_per_forward": ("tokens a forward", True),
    "steps": ("steps a canvas", None),
}

# 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); infinite for a single value."""
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return mean, math.inf
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, _T[min(count - 1, len(_T)) - 1] * spread / math.sqrt(count)


def summary(runs: Runs) -> str:
    """A Markdown table: a row per yardstick, a column per objective."""
    heads = [f"{name} ({len(scores)} seeds)" for name, scores in runs.items()]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for key, (said, _) in YARDSTICKS.items():
        cells = ["{:.3f} ± {:.3f}".format(*interval([one[key] for one in scores])) for scores in runs.values()]
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def verdict(runs: Runs) -> list[str]:
    """The rule: a rival replaces the official objective only if its interval lies wholly on the better side on some
    yardstick, and wholly on the worse side on none. Overlapping intervals leave the official one in place."""
    if "official" not in runs:
        return ["No runs of the official objective: nothing to compare with."]
    lines, better = [], []
    for name in runs:
        if name == "official":
            continue
        won, lost = [], []
        for key, (said, more) in YARDSTICKS.items():
            (mine, half), (theirs, other) = (interval([one[key] for one in runs[n]]) for n in (name, "official"))
            if more is not None and abs(mine - theirs) > half + other:
                (won if (mine > theirs) == more else lost).append(said)
        lines.append(f"{name}: better on {', '.join(won) or 'nothing'}; worse on {', '.join(lost) or 'nothing'}.")
        if won and not lost:
            better.append(name)
    choice = " or ".join(better) or "official"
    return [*lines, f"Default by the rule: {choice}."]
