"""The values that pass between engine, samplers and stop rules. Samplers keep no state: all of it is in `Rows`.

A row is one canvas at one denoising step. Rows of different widths share a batch: tensors are `[R, C]` with C the
widest, and `valid` is false on the padding. Per-row parameters are `[R]`, so every request brings its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dgemma.config import GenerationConfig


@dataclass(frozen=True)
class Stats:
    """What a sampler may know of the prediction, `[R, C]` each (see `kernels.VocabStats`; padding holds anything)."""

    entropy: Tensor
    argmax: Tensor
    top_logprob: Tensor
    draw: Tensor
    draw_logprob: Tensor


@dataclass(frozen=True)
class Rows:
    """Where each canvas stands before a step.

    `canvas [R, C]` is what the network read, `valid [R, C]` marks real positions, `width [R]` counts them.
    `step [R]` counts down N..1 as in the reference; `steps [R]` is N. `vocab` is the vocabulary size.
    """

    canvas: Tensor
    valid: Tensor
    width: Tensor
    step: Tensor
    steps: Tensor
    entropy_bound: Tensor
    accept_confidence: Tensor
    vocab: int

    @staticmethod
    def single(canvas: Tensor, config: GenerationConfig, step: int, vocab: int) -> Rows:
        """Rows for canvases `[R, C]` of equal width that share one configuration (tests, simple loops)."""
        count, width = canvas.shape
        device = canvas.device

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((count,), value, dtype=dtype, device=device)

        return Rows(
            canvas=canvas,
            valid=torch.ones_like(canvas, dtype=torch.bool),
            width=full(width, torch.int64),
            step=full(step, torch.int64),
            steps=full(config.max_denoising_steps, torch.int64),
            entropy_bound=full(config.entropy_bound, torch.float32),
            accept_confidence=full(config.accept_confidence, torch.float32),
            vocab=vocab,
        )


@dataclass(frozen=True)
class Noise:
    """Fresh randomness of a step: `tokens [R, C]` uniform over the vocabulary, `uniforms [R, C]` float64 in [0, 1)."""

    tokens: Tensor
    uniforms: Tensor


@dataclass(frozen=True)
class Step:
    """A sampler's answer: the next canvas to read `[R, C]`, and which positions hold an accepted token now."""

    canvas: Tensor
    accepted: Tensor


class Sampler(Protocol):
    """Decides what the next step reads. Frozen, stateless, the same for every row it is given."""

    name: ClassVar[str]

    def __call__(self, stats: Stats, rows: Rows, noise: Noise) -> Step: ...
