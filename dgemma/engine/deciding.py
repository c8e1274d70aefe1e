"""Runs prepared questions: which canvases to read for them, and the decisions that come of it. Knows no text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dgemma.config import is_whole
from dgemma.control.decide import Asked
from dgemma.control.decision import Calibration, Decision, conclude, label_law
from dgemma.engine.loop import Engine
from dgemma.engine.reading import Look, continuations, narrowest, read
from dgemma.errors import RequestError

MOST_DRAWS = 256


def laws(
    engine: Engine, asked: Sequence[Asked], *, draws: int, seed: int, canvas_length: int | None = None
) -> list[tuple[Tensor, float]]:
    """Of each question: log-probabilities of its labels by draw `[K, L]`, and the mass (see `control.decision`)."""
    if not is_whole(draws, 1, MOST_DRAWS):
        raise RequestError(f"draws must be a whole number of 1..{MOST_DRAWS}, got {draws!r}")
    if not is_whole(seed):
        raise RequestError(f"seed must be a whole number, got {seed!r}")
    looks = [
        Look(
            one.lead,
            narrowest(engine, one.reach, canvas_length),
            branch.pins,
            branch.position,
            branch.tokens,
        )
        for one in asked
        for branch in one.branches
    ]
    told = iter(read(engine, looks, draws=draws, seed=seed))
    return [label_law(one, [next(told) for _ in one.branches]) for one in asked]


def decide(
    engine: Engine,
    asked: Sequence[Asked],
    calibration: Calibration,
    *,
    draws: int = 4,
    seed: int = 0,
    joint: bool = False,
    temperature: float | None = None,
    encoder: bool = False,
    canvas_length: int | None = None,
) -> list[Decision]:
    """A decision for each question. `temperature` instead of the calibration's, for all kinds."""
    if joint and encoder:
        raise RequestError(
            "encoder needs joint=False: it reads left to right, and earlier answers are open in a joint one"
        )
    scales = [calibration.of(one.question.kind, temperature) for one in asked]
    found = laws(engine, asked, draws=draws, seed=seed, canvas_length=canvas_length)
    decisions = []
    for one, (logp, mass), scale in zip(asked, found, scales, strict=True):
        own = continuations(engine, one.lead, one.tails) if encoder else None
        own_scale = calibration.encoder_temperatures.get(one.question.kind, 1.0)
        decisions.append(conclude(one, logp, mass, scale, own, own_scale if temperature is None else 1.0))
    return decisions
