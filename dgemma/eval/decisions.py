"""Decision reads on questions whose answers are known: the fit of a calibration on one split, its report on another.

A row of data is one question: `template`, `kind`, `labels`, `answer`, and whatever else `control.decide.Question.of`
takes. Rows with the same template share a passage, and one split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dgemma.api import LLM
from dgemma.control.decide import Question, prepare
from dgemma.control.decision import Calibration
from dgemma.engine.deciding import laws
from dgemma.engine.reading import continuations
from dgemma.errors import DataError, RequestError
from dgemma.eval.calibration import BINS, Case, Reliability, fit_temperature, for_fitting, reliability

LEAST_CASES = 10
"""Questions of a kind that a split must have."""
Advance = Callable[[int, int], object]


@dataclass(frozen=True)
class Item:
    """A question about a passage, and the number of its right label."""

    template: str
    question: Question
    truth: int

    @staticmethod
    def of(row: Mapping[str, Any]) -> Item:
        """From the fields of a row; `RequestError` for what is wrong with them."""
        fields = dict(row)
        template, answer = fields.pop("template", None), fields.pop("answer", None)
        if not isinstance(template, str):
            raise RequestError(f"template must be a text with [[answer]] in it, got {template!r}")
        question = Question.of(fields)
        if answer not in question.labels:
            raise RequestError(f"answer must be one of the labels {list(question.labels)[:20]!r}, got {answer!r}")
        return Item(template, question, question.labels.index(answer))


@dataclass(frozen=True, eq=False)
class Measured:
    """What denoiser and encoder say of one item."""

    item: Item
    denoiser: Case
    encoder: Case

    @property
    def kind(self) -> str:
        return self.item.question.kind


def load_items(path: str | Path) -> list[Item]:
    """The rows of a JSON Lines file; a `DataError` names the line that cannot be used."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise RequestError("a row must be a JSON object")
            items.append(Item.of(row))
        except (ValueError, TypeError, RequestError) as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not items:
        raise DataError(f"{path} has no rows")
    return items


def measure(
    llm: LLM, items: Iterable[Item], *, draws: int = 4, seed: int = 0, advance: Advance | None = None
) -> list[Measured]:
    """Read every item, those of one template together; untempered."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.template, []).append(item)
    found: list[Measured] = []
    total = sum(map(len, groups.values()))
    for template, own in groups.items():
        asked = prepare(llm.tokenizer.encode, template, [item.question for item in own], llm.encode_prompt(""))
        read = laws(llm.engine, asked, draws=draws, seed=seed)
        for item, one, (logp, _) in zip(own, asked, read, strict=True):
            likelihood = torch.tensor([continuations(llm.engine, one.lead, one.tails)], dtype=torch.float64)
            encoder = Case(torch.log_softmax(likelihood, dim=-1), item.truth)
            found.append(Measured(item, Case(logp, item.truth), encoder))
        if advance:
            advance(len(found), total)
    return found


@dataclass(frozen=True)
class Report:
    """Of one kind, on the test split: denoiser and encoder as they are, and at the temperatures fitted on the other."""

    kind: str
    fitted_on: int
    temperature: float
    encoder_temperature: float
    raw: Reliability
    calibrated: Reliability
    encoder_raw: Reliability
    encoder_calibrated: Reliability
    spread: float
    """Mean over questions of the answer's standard deviation between draws, untempered."""

    def json(self) -> dict[str, Any]:
        told = {name: value.json() if isinstance(value, Reliability) else value for name, value in vars(self).items()}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in told.items()}


def fit(measured: Sequence[Measured], *, share: float = 0.5, bins: int = BINS) -> tuple[Calibration, list[Report]]:
    """A temperature for each kind from one split of the passages, `share` of them, and what it does to the other."""
    if not 0 < share < 1:
        raise RequestError(f"the share of questions to fit on must lie between 0 and 1, got {share}")
    reports = [_report(kind, measured, share, bins) for kind in sorted({one.kind for one in measured})]
    told = {"split": "by hash of the template", "fit_share": share, "bins": bins}
    calibration = Calibration(
        {one.kind: round(one.temperature, 4) for one in reports},
        {one.kind: round(one.encoder_temperature, 4) for one in reports},
        {**told, "test": {one.kind: _short(one) for one in reports}},
    )
    return calibration, reports


def _report(kind: str, measured: Sequence[Measured], share: float, bins: int) -> Report:
    own = [one for one in measured if one.kind == kind]
    fitting = [one for one in own if for_fitting(one.item.template, share)]
    test = [one for one in own if not for_fitting(one.item.template, share)]
    if min(len(fitting), len(test)) < LEAST_CASES:
        raise DataError(
            f"kind {kind!r} has {len(fitting)} questions to fit on and {len(test)} to test on; each needs at least "
            f"{LEAST_CASES}, about different passages (templates)"
        )
    temperature = fit_temperature([one.denoiser for one in fitting])
    encoder_temperature = fit_temperature([one.encoder for one in fitting])
    cases, encoder = [one.denoiser for one in test], [one.encoder for one in test]
    return Report(
        kind,
        len(fitting),
        temperature,
        encoder_temperature,
        reliability(cases, 1.0, bins),
        reliability(cases, temperature, bins),
        reliability(encoder, 1.0, bins),
        reliability(encoder, encoder_temperature, bins),
        sum(_spread(case) for case in cases) / len(cases),
    )


def _spread(case: Case) -> float:
    law = case.logp.exp()
    return float(law[:, law.mean(0).argmax()].std()) if len(law) > 1 else 0.0


def _short(report: Report) -> dict[str, Any]:
    names = ("raw", "calibrated", "encoder_raw", "encoder_calibrated")
    told = {
        name: {"accuracy": round(one.accuracy, 4), "ece": round(one.ece, 4), "nll": round(one.nll, 4)}
        for name in names
        for one in [getattr(report, name)]
    }
    return {"questions": report.raw.count, "fitted_on": report.fitted_on, **told}
