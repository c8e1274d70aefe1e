"""Losses on held-out batches, with the same noise every time: the before and after of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dgemma.diffusion.loss import Objective, by_noise_level
from dgemma.model import DiffusionGemma
from dgemma.train.loop import Batches
from dgemma.train.metrics import NOISE_EDGES
from dgemma.train.objective import denoising_loss

_SEED = 20_000_003


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropies in nats a token: of the canvas (all noise levels, and by level), of the encoder."""

    canvas: float
    encoder: float
    by_t: dict[str, float]
    tokens: int


@torch.no_grad()
def measure(model: DiffusionGemma, batches: Batches, objective: Objective, count: int = 8) -> HeldOut:
    """The official losses over `count` batches (whatever weights the training gives to positions)."""
    plain = replace(objective, name="official", encoder_weight=1.0)
    parts = []
    for step in range(count):
        generator = torch.Generator().manual_seed(_SEED + step)
        parts.append(denoising_loss(model, batches.batch(step), generator, plain))
    losses = torch.cat([part.per_position.flatten() for part in parts])
    valid = torch.cat([part.valid.flatten() for part in parts])
    levels = torch.cat([part.t.flatten() for part in parts])
    return HeldOut(
        canvas=float(losses[valid].mean()),
        encoder=sum(float(part.encoder) for part in parts) / len(parts),
        by_t=by_noise_level(losses, valid, levels, NOISE_EDGES),
        tokens=int(valid.sum()),
    )
