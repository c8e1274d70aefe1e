"""Self-distillation: the model learns to see at once what its own sampler finds in many steps.

Teacher: a frozen copy of the weights at the start of the stage, run by the deployed sampler with many small steps on
the noisy blocks of an ordinary batch, all blocks at once, each after its clean prefix. Student: the weights in
training, at states of those trajectories, which learn the tokens that the trajectory committed. Its predictions then
know where the sampler will settle, entropies fall sooner, and a bound accepts more per step. The ordinary loss stands
beside it, so that the model stays one of the data. It knows neither files nor recipes and keeps nothing between steps.

The teacher must not move: whoever learns from its own present trajectories finds that predicting the canvas as it
stands is always right in the end, and unlearns the language (docs/objectives.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.config import GenerationConfig
from dgemma.diffusion.loss import Objective
from dgemma.diffusion.noise import draw_uniforms, first_canvas, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.schedule import temperature
from dgemma.diffusion.stop import History, StopRule, should_stop
from dgemma.errors import ConfigError, RequestError
from dgemma.model import DiffusionGemma
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.head import head_loss
from dgemma.train.objective import OFFICIAL, Batch, Losses, denoising_loss


@dataclass(frozen=True)
class Trajectory:
    """Canvases on their way, B examples of K blocks of C positions; step 0 is the first.

    `canvas [S, B, K, C]` is what each step read and `soft [S, B, K, C, H]` its signal; `taken [B, K]` counts the steps
    until the block was stable (what is kept of later ones means nothing); `final [B, K, C]` was committed. Blocks that
    the stop rule did not end before the last step are not `settled [B, K]`.
    """

    canvas: Tensor
    soft: Tensor
    taken: Tensor
    settled: Tensor
    final: Tensor


@dataclass(frozen=True)
class DistilLosses(Losses):
    """`Losses` of the ordinary part; `total` has the weighted distillation in it.

    `distil` is the student's cross-entropy in nats a rolled-out position (0 where the teacher did not settle),
    `teacher_steps` the mean steps of the teacher's canvases.
    """

    distil: Tensor
    teacher_steps: Tensor


@dataclass(frozen=True, kw_only=True)
class SelfDistillation:
    """A loss for the training loop. Blocks are as wide as the batch's: give it those of deployment.

    `steps`, `entropy_bound`, `t_min`, `t_max`, `confidence_threshold`: the teacher's sampler settings (see
    `GenerationConfig`); a smaller bound makes a better and slower teacher, a t_min below 1 sharpens it. `examples` of a
    batch are rolled out. The student sees `states` of each trajectory, one from each equal part of it (the first part
    begins with pure noise); trajectories that did not settle teach nothing. `weight` multiplies the student's loss
    beside the ordinary one.
    """

    steps: int = 24
    entropy_bound: float = 0.1
    t_min: float = 0.6
    t_max: float = 1.0
    confidence_threshold: float = 0.05
    examples: int = 8
    states: int = 3
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("examples", "states"):
            if getattr(self, name) < 1:
                raise ConfigError(f"distil.{name} must be at least 1, got {getattr(self, name)}")
        if not self.weight >= 0:
            raise ConfigError(f"distil.weight must not be negative, got {self.weight}")
        try:
            self.sampler()
        except RequestError as error:
            raise ConfigError(f"distil: {error}") from None

    def sampler(self) -> GenerationConfig:
        """The teacher's sampler settings."""
        return GenerationConfig(
            max_denoising_steps=self.steps,
            entropy_bound=self.entropy_bound,
            t_min=self.t_min,
            t_max=self.t_max,
            confidence_threshold=self.confidence_threshold,
        )

    def __call__(
        self,
        model: DiffusionGemma,
        batch: Batch,
        generator: torch.Generator,
        *,
        teacher: DiffusionGemma,
        objective: Objective = OFFICIAL,
        part: tuple[int, int] = (0, 1),
    ) -> DistilLosses:
        """The loss of one batch; see `denoising_loss` for `objective` and `part`. `teacher` is left as it is."""
        plain = denoising_loss(model, batch, generator, objective, part)
        distil, steps = self._distil(model, teacher, batch, generator, part)
        values = vars(plain) | {"total": plain.total + self.weight * distil}
        return DistilLosses(**values, distil=distil.detach(), teacher_steps=steps)

    def _distil(
        self,
        model: DiffusionGemma,
        teacher: DiffusionGemma,
        batch: Batch,
        generator: torch.Generator,
        part: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """The student's loss of this part, and the mean steps of its teacher."""
        seed = int(torch.randint(2**62, (), generator=generator))
        order = torch.randperm(len(batch.ids), generator=generator)[: self.examples]
        if model.embed.weight.device.type != "cpu":
            raise ConfigError("self-distillation runs on the CPU only so far")
        rank, world = part
        width, chosen = batch.layout.width, order[rank::world]
        # A block is rolled out where the text has not ended before it.
        begun = batch.valid.gather(1, replace(batch.layout, draws=1).canvas_positions())[:, ::width]
        wanted = begun[chosen]
        layout = replace(batch.layout.examples(chosen).without_targets(), draws=1)
        ids = batch.ids[chosen, : layout.length]
        path = roll_out(teacher, ids, layout, wanted, self.sampler(), seed + rank)

        at = _states(path.taken, self.states, generator)
        example, block = torch.arange(len(ids))[:, None, None], torch.arange(wanted.shape[1])
        canvas, soft = (kept[at, example, block].flatten(0, 1).flatten(1, 2) for kept in (path.canvas, path.soft))
        layout = replace(layout, draws=self.states)
        attend = _encoded(model, ids, layout)
        where = layout.canvas_positions()
        hidden = model.denoise(canvas, where, attend.denoise, soft, _places(layout).expand_as(where))
        targets = path.final.flatten(1).repeat_interleave(self.states, dim=0)
        weights = path.settled.float().repeat_interleave(width, dim=1).repeat_interleave(self.states, dim=0)
        loss, _ = head_loss(model, hidden, targets, weights, begun[order].sum() * float(width * self.states))
        return loss, path.taken[wanted].float().sum() / wanted.sum().clamp(min=1)


@torch.no_grad()
def roll_out(
    model: DiffusionGemma, ids: Tensor, layout: Layout, wanted: Tensor, config: GenerationConfig, seed: int
) -> Trajectory:
    """Denoise the blocks `wanted [B, K]` of a layout from pure noise as the engine would, each on its own.

    `ids [B, L]` are the clean tokens that blocks follow. Draws are keyed as those of one canvas that is as wide as all
    blocks together, so the first block gets the very draws of the engine's first canvas.
    """
    examples, blocks = wanted.shape
    width, vocab, total = layout.width, model.config.vocab_size, config.max_denoising_steps
    attend, where = _encoded(model, ids, layout), layout.canvas_positions()
    places, device = _places(layout).expand_as(where), model.embed.weight.device
    sampler = get_sampler(config.sampler)

    canvas = first_canvas(seed, 0, 0, where.numel(), vocab, device).view(-1, width)
    soft = torch.zeros(*canvas.shape, model.config.hidden_size, dtype=model.embed.weight.dtype, device=device)
    history, final = History.start(canvas), canvas.clone()
    going, taken = wanted.flatten(), torch.zeros(len(canvas), dtype=torch.int64, device=device)
    canvases, softs = [], []
    for step in range(total, 0, -1):
        canvases.append(canvas)
        softs.append(soft)
        if not going.any():
            break
        # Examples whose blocks have all settled rest.
        some = going.view(examples, blocks).any(dim=1).nonzero().flatten()
        read, signal = canvas.view(examples, -1)[some], soft.view(examples, where.shape[1], -1)[some]
        hidden = model.denoise(read, where[some], attend.only(some).denoise, signal, places[some])
        # The vocabulary is the cost: a settled block leaves it at once, though it shares its example's pass.
        live = going.nonzero().flatten()
        hidden = hidden.view(-1, width, hidden.shape[-1])[going.view(examples, blocks)[some].flatten()]
        heat = temperature(step, total, config.t_min, config.t_max).to(device).expand(len(live) * width)
        draws = draw_uniforms(seed, 0, 0, step, where.numel(), vocab, device).view(len(canvas), width, -1)[live]
        embed, cap = model.embed.weight, model.config.softcap
        out = kernels.vocab(hidden.flatten(0, 1), embed, cap, heat, draws.flatten(0, 1))
        stats = Stats(**{name: getattr(out, name).view(-1, width) for name in Stats.__dataclass_fields__})
        rows = Rows.single(canvas[live], config, step, vocab)
        past = History(history.argmax[live], history.run[live])
        stable, past = should_stop(stats, rows, past, StopRule.of([config] * len(live), device))
        history.argmax[live], history.run[live] = past.argmax, past.run
        noise = (x.view(-1, width)[live] for x in step_noise(seed, 0, 0, step, where.numel(), vocab, device))
        # What a canvas would commit, should it end here.
        final[live], taken[live] = stats.argmax, total - step + 1
        canvas = canvas.index_copy(0, live, sampler(stats, rows, Noise(*noise)).canvas)
        soft = soft.index_copy(0, live, out.soft.view(-1, width, soft.shape[-1]))
        going = going.index_fill(0, live[stable], False)
    shape = (-1, examples, blocks, width)
    return Trajectory(
        canvas=torch.stack(canvases).view(shape),
        soft=torch.stack(softs).view(*shape, soft.shape[-1]),
        taken=taken.view(examples, blocks),
        settled=(wanted.flatten() & ~going).view(examples, blocks),
        final=final.view(shape[1:]),
    )


def _encoded(model: DiffusionGemma, ids: Tensor, layout: Layout) -> BlockAttend:
    """The memory of clean tokens `ids [B, L]`."""
    attend = BlockAttend(model.config, layout, model.embed.weight.dtype)
    model.encode(ids, torch.arange(ids.shape[1]).expand_as(ids), attend.encode)
    return attend


def _places(layout: Layout) -> Tensor:
    """Positions inside the canvas `[R]`."""
    return torch.arange(layout.region) % layout.width


def _states(taken: Tensor, states: int, generator: torch.Generator) -> Tensor:
    """Steps to learn from `[B, states, K]`: a random one of each of `states` equal parts of every trajectory."""
    share = torch.rand(len(taken), states, taken.shape[1], generator=generator)
    share = (share + torch.arange(states)[:, None]) / states
    return (share * taken[:, None]).long()
