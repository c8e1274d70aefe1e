"""What the next step reads: which draws are accepted, and what stands at the other positions.

Samplers are stateless and decide every position afresh: an accepted token may be noise again one step later.
Rows see neither padding nor each other. Shapes are in `protocol`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from dgemma.diffusion.protocol import Noise, Rows, Sampler, Stats, Step
from dgemma.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class EntropyBound:
    """Accept low entropies while nearly independent (arXiv 2505.24857; HF `EntropyBoundSampler`).

    Sorted ascending (ties by position), a position is accepted while the cumulative entropy without its own
    stays <= `rows.entropy_bound` (nats, a total per canvas and step). So the lowest is always accepted. The
    rest is renoised.
    """

    name: ClassVar[str] = "entropy_bound"

    def __call__(self, stats: Stats, rows: Rows, noise: Noise) -> Step:
        entropy = stats.entropy.float().masked_fill(~rows.valid, math.inf)
        entropy, order = entropy.sort(dim=-1, stable=True)
        # Double sums, rounded: the reference's numbers on a CPU, and hardly bound to a scan's order.
        before = entropy.double().cumsum(dim=-1).float() - entropy
        accepted = torch.zeros_like(rows.valid).scatter(1, order, before <= rows.entropy_bound[:, None])
        return _renoise(accepted & rows.valid, stats, rows, noise)


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Accept positions whose top probability reaches `rows.accept_confidence`, at least the most confident.

    Accepted positions take their draw, the rest is renoised. Ties for the most confident go to the lowest
    position. Ours: the simplest rule that knows no budget.
    """

    name: ClassVar[str] = "confidence"

    def __call__(self, stats: Stats, rows: Rows, noise: Noise) -> Step:
        score = stats.top_logprob.float().exp().masked_fill(~rows.valid, -1.0)
        _, order = score.sort(dim=-1, descending=True, stable=True)
        accepted = score >= rows.accept_confidence[:, None]
        accepted = accepted.scatter(1, order[:, :1], True)
        return _renoise(accepted & rows.valid, stats, rows, noise)


@dataclass(frozen=True, kw_only=True)
class Ancestral:
    """The exact reverse step of uniform-noise D3PM (arXiv 2107.03006), mixed over the model's x_0.

    With alpha = 1 - t and t = s/N, the draw d as x_0 and x the token that was read, q(x' | x, d) is a mixture
    with weights (m = N - s + 1):  x' = d: 1 + V (N - s) [x = d];  x' = x: (N - s)(s - 1)/m;  a uniform token:
    (s - 1)/m. They sum to s + V (N - s) [x = d]. `accepted` marks the positions that hold d now: at s = 1
    that is everywhere.
    """

    name: ClassVar[str] = "ancestral"

    def __call__(self, stats: Stats, rows: Rows, noise: Noise) -> Step:
        step, ahead = rows.step[:, None].double(), (rows.steps - rows.step)[:, None].double()
        agreement = rows.vocab * ahead * (rows.canvas == stats.draw)
        mark = noise.uniforms * (step + agreement)
        as_drawn = 1 + agreement
        as_read = as_drawn + ahead * (step - 1) / (ahead + 1)
        canvas = torch.where(mark < as_read, rows.canvas, noise.tokens)
        canvas = torch.where(mark < as_drawn, stats.draw, canvas)
        canvas = torch.where(rows.valid, canvas, rows.canvas)
        return Step(canvas=canvas, accepted=(canvas == stats.draw) & rows.valid)


def _renoise(accepted: Tensor, stats: Stats, rows: Rows, noise: Noise) -> Step:
    """Draws where accepted, fresh tokens elsewhere, padding untouched."""
    canvas = torch.where(accepted, stats.draw, noise.tokens)
    return Step(canvas=torch.where(rows.valid, canvas, rows.canvas), accepted=accepted)


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {sampler.name: sampler for sampler in (EntropyBound(), Confidence(), Ancestral())}
)


def get_sampler(name: str) -> Sampler:
    """The sampler of that name; `RequestError` names the known ones."""
    if name not in SAMPLERS:
        raise RequestError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
