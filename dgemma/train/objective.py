"""The official objective on one batch: two-pass self-conditioned denoising plus the encoder's next-token loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.diffusion.noise import corrupt
from dgemma.model import DiffusionGemma
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.head import head_loss, soft_signal

T_MIN, T_MAX = 1e-4, 1 - 1e-4


@dataclass(frozen=True)
class Batch:
    """Token ids `[B, L]`, which of them are real targets `valid [B, L]`, and where the blocks lie."""

    ids: Tensor
    valid: Tensor
    layout: Layout


@dataclass(frozen=True)
class Losses:
    """Scalars to differentiate, and the per-position values for the log."""

    total: Tensor
    canvas: Tensor
    encoder: Tensor
    per_position: Tensor
    valid: Tensor
    t: Tensor


def official_loss(
    model: DiffusionGemma,
    batch: Batch,
    generator: torch.Generator,
    *,
    self_conditioning: float = 0.5,
    encoder_weight: float = 1.0,
) -> Losses:
    """The official objective, with all blocks of the region trained at once, each at its own noise level.

    The references train one random block per example, which has the same expected gradient. A share
    `self_conditioning` of the examples gets a signal: the prediction of a first pass without gradient.
    """
    layout, dtype = batch.layout, model.embed.weight.dtype
    count, blocks = batch.ids.shape[0], layout.region // layout.width
    attend = BlockAttend(model.config, layout, dtype)
    positions = torch.arange(layout.length).expand(count, -1)
    hidden = model.encode(batch.ids, positions, attend.encode)
    encoder, _ = head_loss(model, hidden[:, :-1], batch.ids[:, 1:], batch.valid[:, 1:])

    where = layout.canvas_positions()
    clean, valid = batch.ids.gather(1, where), batch.valid.gather(1, where)
    t = torch.rand(count, blocks, generator=generator) * (T_MAX - T_MIN) + T_MIN
    t = t.repeat_interleave(layout.width, dim=1)
    noisy, _ = corrupt(clean, t, model.config.vocab_size, generator)
    places = (torch.arange(layout.region) % layout.width).expand(count, -1)

    soft = torch.zeros(count, layout.region, model.config.hidden_size, dtype=dtype)
    told = torch.nonzero(torch.rand(count, generator=generator) < self_conditioning).flatten()
    if len(told):
        with torch.no_grad():
            first = model.denoise(noisy[told], where[told], attend.only(told).denoise, None, places[told])
            soft[told] = soft_signal(model, first)
    hidden = model.denoise(noisy, where, attend.denoise, soft, places)
    canvas, losses = head_loss(model, hidden, clean, valid)
    return Losses(canvas + encoder_weight * encoder, canvas.detach(), encoder.detach(), losses, valid, t)
