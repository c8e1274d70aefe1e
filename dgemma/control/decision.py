"""From what was read to a decision: each noise draw's law over the labels, a fitted temperature, mean and spread.

Plain numbers in and out. Knows no model and no text but the labels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.control.decide import KINDS, Asked, Question
from dgemma.errors import CheckpointError, RequestError

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Decision:
    """What the denoiser says to a question.

    `probabilities` are means over `draws` noise draws at `temperature`, `spread` is their standard deviation from draw
    to draw (0 of one draw). `answer` is the most likely label, the first of equals. `value` is the expectation of a
    score, with a spread of its own. `mass` is the probability that the model gives to all labels together where they
    first differ: near 0, the template does not fit the question. `encoder` has the autoregressive probabilities.
    """

    question: Question
    answer: str
    probabilities: Mapping[str, float]
    spread: Mapping[str, float]
    draws: int
    temperature: float
    mass: float
    value: float | None = None
    value_spread: float | None = None
    encoder: Mapping[str, float] | None = None

    @property
    def confidence(self) -> float:
        """The probability of the answer."""
        return self.probabilities[self.answer]


@dataclass(frozen=True)
class Calibration:
    """A temperature for each kind of question, for the denoiser and for the encoder; 1 changes nothing."""

    temperatures: Mapping[str, float] = field(default_factory=dict)
    encoder_temperatures: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def of(self, kind: str, temperature: float | None = None) -> float:
        """The denoiser's temperature for a kind, unless one is given."""
        if temperature is None:
            return self.temperatures.get(kind, 1.0)
        if isinstance(temperature, bool) or not (math.isfinite(temperature) and temperature > 0):
            raise RequestError(f"temperature must be a number above 0, got {temperature!r}")
        return float(temperature)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; complete or not at all."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.tmp")
        try:
            draft.write_text(json.dumps({"version": 1, **vars(self)}, indent=2) + "\n", encoding="utf-8")
            os.replace(draft, path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise CheckpointError(f"{path} cannot be written: {error.strerror}; name another file") from None
        return path

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read what `save` wrote. A checkpoint folder without the file has no calibration."""
        path = Path(path)
        folder = path.is_dir()
        path = path / CALIBRATION if folder else path
        if folder and not path.exists():
            return Calibration()
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["version"] != 1:
                raise CheckpointError(f"{path} has version {told['version']!r}; this dgemma reads version 1")
            names = ("temperatures", "encoder_temperatures")
            tables = [{kind: float(t) for kind, t in told[name].items()} for name in names]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} is no calibration that dgemma calibrate has written") from None
        for table in tables:
            for kind, temperature in table.items():
                if kind not in KINDS or not (math.isfinite(temperature) and temperature > 0):
                    raise CheckpointError(f"{path} gives {kind!r} the temperature {temperature}; it must be above 0")
        return Calibration(tables[0], tables[1], told.get("measured", {}))


def label_law(asked: Asked, reads: Sequence[Sequence[Sequence[float]]]) -> tuple[Tensor, float]:
    """Log-probabilities of the labels by draw `[K, L]`, float64, and the mass.

    `reads[b][k]` are those of the tokens of branch b in draw k. Each branching is renormalised over its own tokens.
    """
    total = torch.zeros(len(reads[0]), len(asked.question.labels), dtype=torch.float64)
    for branch, draws in zip(asked.branches, reads, strict=True):
        ways = torch.log_softmax(torch.tensor(draws, dtype=torch.float64), dim=-1)
        for column, labels in enumerate(branch.labels):
            total[:, list(labels)] += ways[:, column, None]
    first = torch.tensor(reads[0], dtype=torch.float64)
    return total, float(first.logsumexp(dim=-1).exp().mean())


def tempered(logp: Tensor, temperature: float) -> Tensor:
    """Probabilities `[K, L]` at a temperature."""
    return torch.softmax(logp / temperature, dim=-1)


def conclude(
    asked: Asked,
    logp: Tensor,
    mass: float,
    temperature: float,
    encoder: Sequence[float] | None = None,
    encoder_temperature: float = 1.0,
) -> Decision:
    """The decision that log-probabilities by draw `[K, L]` come to; `encoder` are log-likelihoods of the labels."""
    question, law = asked.question, tempered(logp, temperature)
    draws = law.shape[0]
    mean, spread = law.mean(dim=0), _spread(law)
    value = value_spread = own = None
    if question.values:
        values = law @ torch.tensor(question.values, dtype=torch.float64)
        value, value_spread = float(values.mean()), float(_spread(values[:, None])[0])
    if encoder is not None:
        likelihood = torch.tensor(encoder, dtype=torch.float64)[None]
        own = _named(question, tempered(likelihood, encoder_temperature)[0])
    probabilities = _named(question, mean)
    answer = max(probabilities, key=lambda label: probabilities[label])
    spreads = _named(question, spread)
    return Decision(question, answer, probabilities, spreads, draws, temperature, mass, value, value_spread, own)


def _spread(law: Tensor) -> Tensor:
    """Standard deviation between draws (of a sample)."""
    return law.std(dim=0) if law.shape[0] > 1 else torch.zeros_like(law[0])


def _named(question: Question, values: Tensor) -> dict[str, float]:
    return dict(zip(question.labels, values.tolist(), strict=True))
