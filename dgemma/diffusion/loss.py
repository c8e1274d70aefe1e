"""Training losses of a uniform-noise diffusion language model.

The official objective: unweighted cross-entropy over *all* positions of a noisy canvas, corrupted or not, plus the
encoder's next-token cross-entropy with weight 1 (Google's training code for DiffusionGemma).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


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
