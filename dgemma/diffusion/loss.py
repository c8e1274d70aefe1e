"""Training losses of a uniform-noise diffusion language model.

The official objective: unweighted cross-entropy over *all* positions of a noisy canvas, corrupted or not, plus the
encoder's next-token cross-entropy with weight 1 (Google's training code for DiffusionGemma). Two variants beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dgemma.errors import ConfigError

OBJECTIVES = ("official", "leave_one_out", "reweighted")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the canvas is trained on, and what stands beside it.

    `official`: the denoising posterior. `leave_one_out` (arXiv 2605.22765): the network predicts each token without
    its own noisy observation; the observation is added where the loss is taken. `reweighted`: positions that kept
    their token count `kept_weight` times the others (0 is the loss of arXiv 2510.22926).
    `encoder_weight` scales the next-token loss, `canvas_weight` the canvas's (0 skips the denoising passes: an
    ordinary autoregressive model); `self_conditioning` is the share of rows that get a signal. The signal is the
    prediction of a first pass, or of the last of up to `signal_passes`, each told the one before (ours: a sampler
    tells the network dozens of times, and training on one pass alone leaves that unpractised).
    """

    name: str = "official"
    encoder_weight: float = 1.0
    canvas_weight: float = 1.0
    self_conditioning: float = 0.5
    kept_weight: float = 0.1
    signal_passes: int = 1

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ConfigError(f"objective name must be one of {', '.join(OBJECTIVES)}; got {self.name!r}")
        inf = float("inf")
        for field, high in (
            ("encoder_weight", inf), ("canvas_weight", inf), ("self_conditioning", 1.0), ("kept_weight", 1.0),
        ):  # fmt: skip
            value = getattr(self, field)
            if not 0 <= value <= high:
                raise ConfigError(f"objective {field} must be a number from 0 to {high:g}, got {value!r}")
        if self.signal_passes < 1:
            raise ConfigError(f"objective signal_passes must be at least 1, got {self.signal_passes!r}")


def canvas_weights(objective: Objective, valid: Tensor, replaced: Tensor) -> Tensor:
    """How much each noisy position counts, float32 `[...]`; only ratios matter. `replaced [...]` drew a noise token."""
    weights = valid.float()
    if objective.name == "reweighted":
        weights = torch.where(replaced, weights, weights * objective.kept_weight)
    return weights


def observation_bonus(objective: Objective, t: Tensor, vocab: int) -> Tensor | None:
    """What a leave-one-out logit of the observed token gains to become the posterior's (None otherwise), nats `[...]`.

    Noise keeps a token with probability alpha = 1 - t, else draws among all `vocab`: the observed token is
    1 + V alpha / (1 - alpha) times as likely as any other to be the source.
    """
    if objective.name != "leave_one_out":
        return None
    return torch.log1p(vocab * (1 - t) / t)


def cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Per-position cross-entropy `[...]` in nats, float32, zero where `valid [...]` is false.

    `logits [..., V]` are softcapped float32; used for the canvas and, shifted by one, for the encoder.
    """
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none"
    )
    return losses.view(targets.shape) * valid


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of `values` over true entries of `valid` (0 when there are none)."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


def by_noise_level(losses: Tensor, valid: Tensor, t: Tensor, edges: tuple[float, ...]) -> dict[str, float]:
    """Mean loss per bin of the noise level `t` (shaped as `losses`); keys like `"0.25-0.50"`, no empty bins."""
    out = {}
    for low, high in pairwise(edges):
        chosen = valid & (t >= low) & (t < high)
        if chosen.any():
            out[f"{low:.2f}-{high:.2f}"] = float(losses[chosen].mean())
    return out
