"""What a batch is trained on: two-pass self-conditioned denoising plus the encoder's next-token loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.diffusion.loss import Objective, canvas_weights, observation_bonus
from dgemma.diffusion.noise import corrupt
from dgemma.model import DiffusionGemma
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.head import head_loss, soft_signal

T_MIN, T_MAX = 1e-4, 1 - 1e-4
OFFICIAL = Objective()


@dataclass(frozen=True)
class Batch:
    """Token ids `[B, L]`, which of them are targets `valid [B, L]`, and where the blocks lie.

    `encoder_valid [B, L]` are the encoder's targets; None means the same ones.
    """

    ids: Tensor
    valid: Tensor
    layout: Layout
    encoder_valid: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """The scalar to differentiate, its parts, and the values of every noisy position `[N, R]` for the log."""

    total: Tensor
    canvas: Tensor
    encoder: Tensor
    per_position: Tensor
    valid: Tensor
    t: Tensor


@dataclass(frozen=True)
class Noise:
    """All that chance decides about a batch: `clean, valid, t, noisy, replaced [N, R]`, who is `told [N]`, and the
    prediction of which pass they are told."""

    clean: Tensor
    valid: Tensor
    t: Tensor
    noisy: Tensor
    replaced: Tensor
    told: Tensor
    passes: int = 1

    @staticmethod
    def draw(batch: Batch, vocab: int, objective: Objective, generator: torch.Generator) -> Noise:
        """Every block gets its own noise level."""
        layout = batch.layout
        where = layout.canvas_positions()
        clean = batch.ids.repeat_interleave(layout.draws, dim=0).gather(1, where)
        valid = batch.valid.repeat_interleave(layout.draws, dim=0).gather(1, where)
        blocks = layout.region // layout.width
        t = torch.rand(len(clean), blocks, generator=generator) * (T_MAX - T_MIN) + T_MIN
        t = t.repeat_interleave(layout.width, dim=1)
        noisy, replaced = corrupt(clean, t, vocab, generator)
        told = torch.rand(len(clean), generator=generator) < objective.self_conditioning
        most, passes = objective.signal_passes, 1
        if most > 1 and told.any():
            passes = int(torch.randint(most, (1,), generator=generator)) + 1
        return Noise(clean, valid, t, noisy, replaced, told, passes)

    def rows(self, rows: Tensor) -> Noise:
        return self._each(lambda value: value[rows])

    def to(self, place: torch.device) -> Noise:
        return self._each(lambda value: value.to(place))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Noise:
        tensors = {name: change(value) for name, value in vars(self).items() if name != "passes"}
        return Noise(**tensors, passes=self.passes)


def denoising_loss(
    model: DiffusionGemma,
    batch: Batch,
    generator: torch.Generator,
    objective: Objective = OFFICIAL,
    part: tuple[int, int] = (0, 1),
) -> Losses:
    """The loss of one batch, all blocks of its layout at once, each at its own noise level.

    The official training code takes one random block per example; the expected gradient is the same up to the
    weight of long examples. A noisy row that is told gets the prediction of a first pass without gradient.
    `part = (rank, world)` computes every world-th example only; the parts' losses add up to the whole batch's.
    """
    noise = Noise.draw(batch, model.config.vocab_size, objective, generator)
    targets = batch.valid if batch.encoder_valid is None else batch.encoder_valid
    encoder_weights = targets[:, 1:].float()
    weights = canvas_weights(objective, noise.valid, noise.replaced)
    whole, anyone = (encoder_weights.sum(), weights.sum()), bool(noise.told.any())
    rank, world = part
    if world > 1:
        batch, encoder_weights = _share(batch, rank, world), encoder_weights[rank::world]
        rows = torch.arange(len(noise.t)).view(-1, batch.layout.draws)[rank::world].flatten()
        noise, weights = noise.rows(rows), weights[rows]
    # Chance is drawn on the CPU, the same for every device; the rest happens where the model is.
    place = model.embed.weight.device
    with nullcontext() if place.type == "cpu" else place:
        moved = _to(batch, place), noise.to(place), weights.to(place), encoder_weights.to(place)
        return _loss(model, *moved, objective, whole, anyone)


def _loss(
    model: DiffusionGemma,
    batch: Batch,
    noise: Noise,
    weights: Tensor,
    encoder_weights: Tensor,
    objective: Objective,
    whole: tuple[Tensor, Tensor],
    anyone: bool,
) -> Losses:
    """`weights [N, R]` and `encoder_weights [B, L - 1]` of these rows; `whole` are their sums over the whole batch.

    `anyone` says whether some row of the whole batch is told.
    """

    wanted = objective.encoder_weight > 0
    layout = batch.layout if wanted else batch.layout.without_targets()
    ids, dtype = batch.ids[:, : layout.length], model.embed.weight.dtype
    attend = BlockAttend(model.config, layout, dtype)
    hidden = model.encode(ids, torch.arange(layout.length).expand(len(ids), -1), attend.encode)
    encoder = torch.zeros(())
    if wanted:
        encoder, _ = head_loss(model, hidden[:, :-1], ids[:, 1:], encoder_weights[:, : layout.length - 1], whole[0])

    if not objective.canvas_weight:
        none, total = torch.zeros(()), objective.encoder_weight * encoder
        return Losses(total, none, encoder.detach(), torch.zeros_like(noise.t), noise.valid, noise.t)
    where = layout.canvas_positions()
    places = (torch.arange(layout.region) % layout.width).expand(len(where), -1)
    soft = torch.zeros(*where.shape, model.config.hidden_size, dtype=dtype)
    told = noise.told.nonzero().flatten()
    if anyone:
        # Every rank makes the same passes: one none of whose rows is told goes along with a row.
        rows = told if len(told) else told.new_zeros(1)
        signal = None
        with torch.no_grad():
            for _ in range(noise.passes):
                before = model.denoise(noise.noisy[rows], where[rows], attend.only(rows).denoise, signal, places[rows])
                signal = soft_signal(model, before)
        assert signal is not None
        soft[told] = signal[: len(told)]
    hidden = model.denoise(noise.noisy, where, attend.denoise, soft, places)
    bonus = observation_bonus(objective, noise.t, model.config.vocab_size)
    seen = None if bonus is None else (noise.noisy, bonus)
    canvas, losses = head_loss(model, hidden, noise.clean, weights, whole[1], seen)
    total = objective.canvas_weight * canvas + objective.encoder_weight * encoder
    return Losses(total, canvas.detach(), encoder.detach(), losses, noise.valid, noise.t)


def _share(batch: Batch, rank: int, world: int) -> Batch:
    """Every world-th example."""
    part = slice(rank, None, world)
    answers = None if batch.encoder_valid is None else batch.encoder_valid[part]
    return Batch(batch.ids[part], batch.valid[part], batch.layout.examples(part), answers)


def _to(batch: Batch, place: torch.device) -> Batch:
    answers = None if batch.encoder_valid is None else batch.encoder_valid.to(place)
    return Batch(batch.ids.to(place), batch.valid.to(place), batch.layout.to(place), answers)
