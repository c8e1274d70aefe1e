"""How far probabilities can be trusted: accuracy, expected calibration error, and the temperature that mends it.

Works on laws over labels, whoever gave them: log-probabilities by noise draw `[K, L]`, where the probability is the
mean over draws, and the number of the right label. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.control.decision import tempered
from dgemma.errors import DataError

BINS = 10
"""Bins of equal width over the probability of the answer, 0 to 1; the highest holds 1."""
LEAST, MOST = 0.05, 20.0
"""Between these a temperature is looked for."""


@dataclass(frozen=True, eq=False)
class Case:
    """One question that was read: `logp [K, L]` by draw, and the right label's number."""

    logp: Tensor
    truth: int


@dataclass(frozen=True)
class Bin:
    """Of the questions whose answer has a probability in `low..high`: how many, its mean, the share answered right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """`ece` is the mean distance of confidence and accuracy over bins, weighted by their counts; `nll` in nats."""

    count: int
    accuracy: float
    ece: float
    nll: float
    bins: tuple[Bin, ...]

    def json(self) -> dict[str, Any]:
        return asdict(self)


def expected_error(
    confidence: Sequence[float], right: Sequence[bool], bins: int = BINS
) -> tuple[float, tuple[Bin, ...]]:
    """ECE (Guo et al., arXiv 1706.04599, eq. 3) of the probabilities of answers, and its bins that are not empty."""
    if not confidence:
        raise DataError("there are no answers to measure calibration on")
    members: dict[int, list[int]] = {}
    for number, value in enumerate(confidence):
        members.setdefault(min(int(value * bins), bins - 1), []).append(number)
    found = []
    for at in sorted(members):
        own = members[at]
        mean = math.fsum(confidence[number] for number in own) / len(own)
        share = sum(right[number] for number in own) / len(own)
        found.append(Bin(at / bins, (at + 1) / bins, len(own), mean, share))
    total = math.fsum(one.count * abs(one.confidence - one.accuracy) for one in found)
    return total / len(confidence), tuple(found)


def reliability(cases: Sequence[Case], temperature: float = 1.0, bins: int = BINS) -> Reliability:
    """What cases look like at a temperature. Of equal labels the first is the answer."""
    means = [tempered(case.logp, temperature).mean(dim=0) for case in cases]
    answers = [int((mean == mean.max()).nonzero()[0]) for mean in means]
    right = [answer == case.truth for answer, case in zip(answers, cases, strict=True)]
    confidence = [float(mean[answer]) for mean, answer in zip(means, answers, strict=True)]
    ece, found = expected_error(confidence, right, bins)
    return Reliability(len(cases), sum(right) / len(cases), ece, _nll(cases, temperature), found)


def _nll(cases: Sequence[Case], temperature: float) -> float:
    """Mean of minus the log-probability of the right label; in log space, so that none becomes infinite."""
    losses = [
        math.log(case.logp.shape[0]) - float(torch.log_softmax(case.logp / temperature, -1)[:, case.truth].logsumexp(0))
        for case in cases
    ]
    return math.fsum(losses) / len(losses)


def fit_temperature(cases: Sequence[Case], tolerance: float = 1e-4) -> float:
    """The temperature of least NLL in `LEAST..MOST`, by golden section over its logarithm."""
    if not cases:
        raise DataError("there are no answers to fit a temperature to")
    return math.exp(_minimum(lambda log: _nll(cases, math.exp(log)), math.log(LEAST), math.log(MOST), tolerance))


def _minimum(f: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = f(left), f(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = f(right)
    return (low + high) / 2


def for_fitting(text: str, share: float = 0.5) -> bool:
    """Whether what is asked about `text` is for fitting, by its hash: all questions about it fall on one side."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") < share * 2**64


def plot_reliability(curves: Mapping[str, Mapping[str, Reliability]], path: str | Path) -> Path:
    """A reliability diagram for each entry of `curves`, with a line for each of its entries; `.png`, `.svg`, `.pdf`."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise DataError("the plot needs matplotlib: pip install 'dgemma[train]'") from None
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.4 * len(curves), 3.6), dpi=110, squeeze=False)
    for axis, (title, lines) in zip(axes[0], curves.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        for name, told in lines.items():
            spots = [(one.confidence, one.accuracy, one.count) for one in told.bins]
            (line,) = axis.plot(*zip(*(spot[:2] for spot in spots), strict=True), label=f"{name}: ECE {told.ece:.3f}")
            sizes = [6 + 60 * spot[2] / told.count for spot in spots]
            axis.scatter(*zip(*(spot[:2] for spot in spots), strict=True), s=sizes, color=line.get_color())
        axis.set(title=title, xlabel="probability of the answer", xlim=(0, 1.02), ylim=(0, 1.02))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=7)
    axes[0][0].set_ylabel("share answered right")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be written: {error}") from None
    finally:
        pyplot.close(figure)
    return Path(path)
