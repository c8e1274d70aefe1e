"""When a canvas is done before its last step. Stateless: what a row remembers is a `History`, a value.

Two conventions, chosen per row (they differ in the reference implementations):
* hf: the last `stability_threshold + 1` argmax canvases are equal, and mean entropy < `confidence_threshold`;
* jax: the argmax equals the canvas that the step read, and mean entropy <= `confidence_threshold`.
A threshold of None switches adaptive stopping off; a stability threshold of 0 only the stability test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.diffusion.protocol import Rows, Stats


@dataclass(frozen=True)
class History:
    """How long predictions have stood still: `argmax [R, C]` of the last step, seen `run [R]` times on end.

    This says all that HF's stack of the last k canvases says (they all equal the newest exactly when the run
    is longer than k), in one canvas for every k. Rows stack and split along the first axis. A new canvas
    starts a new history.
    """

    argmax: Tensor
    run: Tensor

    @staticmethod
    def start(canvas: Tensor) -> History:
        """The history of canvases `[R, C]` that were never predicted."""
        return History(torch.full_like(canvas, -1), torch.zeros_like(canvas[:, 0]))


@dataclass(frozen=True)
class StopRule:
    """Thresholds per row `[R]`: `stability` int64, `confidence` float32 nats (-inf: never), `jax` bool."""

    stability: Tensor
    confidence: Tensor
    jax: Tensor

    @staticmethod
    def of(configs: Sequence[GenerationConfig], device: torch.device | str = "cpu") -> StopRule:
        """One row per configuration."""
        never = [c.stability_threshold is None or c.confidence_threshold is None for c in configs]
        confidence = [-math.inf if n else c.confidence_threshold for n, c in zip(never, configs, strict=True)]
        return StopRule(
            stability=torch.tensor([c.stability_threshold or 0 for c in configs], dtype=torch.int64, device=device),
            confidence=torch.tensor(confidence, dtype=torch.float32, device=device),
            jax=torch.tensor([c.convention == "jax" for c in configs], dtype=torch.bool, device=device),
        )


def should_stop(stats: Stats, rows: Rows, history: History, rule: StopRule) -> tuple[Tensor, History]:
    """After a step: which rows are done `[R]` bool, and the history to hand to the next step.

    `rows` is what the step read and `history` what the previous call returned (`History.start` at first).
    Rows that are done leave the batch; what they commit is the argmax (hf) or the sampler's canvas (jax).
    """
    history = push_history(stats.argmax, history, rows.valid)
    entropy = mean_entropy(stats.entropy, rows.valid, rows.width)
    hf = stopped_hf(history, entropy, rule)
    jax = stopped_jax(stats.argmax, rows.canvas, rows.valid, entropy, rule)
    return torch.where(rule.jax, jax, hf), history


def push_history(argmax: Tensor, history: History, valid: Tensor) -> History:
    """The history after one more prediction `[R, C]`; padding is ignored."""
    same = ((argmax == history.argmax) | ~valid).all(dim=-1)
    return History(argmax, torch.where(same, history.run, 0) + 1)


def mean_entropy(entropy: Tensor, valid: Tensor, width: Tensor) -> Tensor:
    """Mean of `entropy [R, C]` over valid positions, float32 `[R]`; padding and other rows change no bit."""
    # A running sum passes zeros unchanged; torch's sum regroups with the width.
    total = entropy.double().masked_fill(~valid, 0.0).cumsum(dim=-1)[:, -1]
    return (total / width.clamp(min=1)).float()


def stopped_hf(history: History, entropy: Tensor, rule: StopRule) -> Tensor:
    """HF `StableAndConfidentStoppingCriteria`; `history` and mean `entropy [R]` are the newest step's."""
    return (history.run > rule.stability) & (entropy < rule.confidence)


def stopped_jax(argmax: Tensor, canvas_read: Tensor, valid: Tensor, entropy: Tensor, rule: StopRule) -> Tensor:
    """JAX `TokenStabilityEarlyStop` and `EntropyEarlyStop`; stability thresholds above 0 are all alike."""
    same = ((argmax == canvas_read) | ~valid).all(dim=-1)
    return (same | (rule.stability == 0)) & (entropy <= rule.confidence)
