"""Canvases that stay on the device from step to step: a step is a fixed list of launches and tells the host nothing.

So it can be recorded once and replayed (`graphs`). Whatever changes between steps (step number, prefix length, seeds,
thresholds) is a tensor; whatever is a plain number here is the same in every replay. A canvas that is done is frozen:
further steps leave all of it as it is, so it does not matter how late the host looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dgemma.cache import KVCache
from dgemma.diffusion.noise import draw_uniforms, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats, Step
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.schedule import temperature
from dgemma.diffusion.stop import History, StopRule, should_stop
from dgemma.engine.attend import SharedAttend
from dgemma.engine.confidence import Changes
from dgemma.engine.lanes import LaneDenoise, LaneEncode
from dgemma.engine.request import Canvas, State
from dgemma.engine.runner import Draws, Runner
from dgemma.kernels.random import signed
from dgemma.model.attention import Attend

_STATS = ("entropy", "argmax", "top_logprob", "draw", "draw_logprob")


@dataclass(frozen=True, eq=False)
class Slots:
    """R canvases of C positions, as `Canvas`, `History`, `Changes`, `StopRule` and `GenerationConfig` have them.

    `prefix [R]` is the length of the cache behind each; `done [R]` marks canvases that take no more steps, `stable [R]`
    those that the stop rule ended.
    """

    ids: Tensor
    soft: Tensor
    argmax: Tensor
    run: Tensor
    changes: Tensor
    last_change: Tensor
    accepted: Tensor
    entropy: Tensor
    top_logprob: Tensor
    draw: Tensor
    draw_logprob: Tensor
    step: Tensor
    done: Tensor
    stable: Tensor
    prefix: Tensor
    seed: Tensor
    choice: Tensor
    index: Tensor
    steps: Tensor
    t_min: Tensor
    t_max: Tensor
    temperature: Tensor
    entropy_bound: Tensor
    accept_confidence: Tensor
    stability: Tensor
    confidence: Tensor
    jax: Tensor

    @staticmethod
    def empty(rows: int, width: int, size: int, device: torch.device, dtype: torch.dtype) -> Slots:
        """All done: a step changes nothing."""
        whole = {"ids", "argmax", "changes", "last_change", "draw"}
        single = {"entropy", "top_logprob", "draw_logprob"}
        flags, double = {"done", "stable", "jax"}, {"t_min", "t_max"}
        float32 = {"temperature", "entropy_bound", "accept_confidence", "confidence"}
        made = {}
        for field in fields(Slots):
            shape: tuple[int, ...] = (rows, width) if field.name in whole | single | {"accepted"} else (rows,)
            kind = torch.int64
            if field.name == "soft":
                shape, kind = (rows, width, size), dtype
            elif field.name in flags | {"accepted"}:
                kind = torch.bool
            elif field.name in single | float32:
                kind = torch.float32
            elif field.name in double:
                kind = torch.float64
            made[field.name] = torch.zeros(shape, dtype=kind, device=device)
        for name in ("done", "steps", "t_min", "t_max"):  # a temperature of 1, where nobody is
            made[name].fill_(1)
        return Slots(**made)

    def of(self, rows: slice) -> Slots:
        """The same memory of some rows."""
        return Slots(**{name: value[rows] for name, value in vars(self).items()})


class Resident:
    """Canvases of one width and one sampler, one for each of `lanes`: caches that never move in memory."""

    def __init__(self, runner: Runner, lanes: Sequence[KVCache], width: int, sampler: str) -> None:
        self._runner, self._lanes, self.width = runner, lanes, width
        self._sampler, config = get_sampler(sampler), runner.model.config
        self._vocab = config.vocab_size
        self.slots = Slots.empty(len(lanes), width, config.hidden_size, runner.device, runner.dtype)
        self._clean = torch.zeros(len(lanes), lanes[0].slack, dtype=torch.int64, device=runner.device)

    def load(self, row: int, state: State) -> None:
        """Put the canvas of `state` into a row, as it stands, and the tokens before it that are to be encoded."""
        canvas, config, slots = state.canvas, state.config, self.slots
        assert canvas is not None and canvas.width == self.width
        rule = StopRule.of([config])
        numbers = {
            "step": canvas.step, "done": False, "stable": False, "prefix": len(state.ids), "choice": config.choice,
            "index": canvas.index, "steps": config.max_denoising_steps, "t_min": config.t_min, "t_max": config.t_max,
            "temperature": config.temperature, "entropy_bound": config.entropy_bound,
            "accept_confidence": config.accept_confidence, "stability": rule.stability.item(),
            "confidence": rule.confidence.item(), "jax": rule.jax.item(), "run": canvas.history.run,
            "ids": canvas.ids, "argmax": canvas.history.argmax[0], "soft": 0 if canvas.soft is None else canvas.soft,
            "changes": canvas.changes.count, "last_change": canvas.changes.last,
            "seed": signed(config.seed),
        }  # fmt: skip
        for name, value in numbers.items():
            getattr(slots, name)[row] = value
        if state.pending:
            self._clean[row, : state.pending] = torch.tensor(state.ids[-state.pending :])

    def take(self, row: int, canvas: Canvas) -> tuple[Stats, Step, bool]:
        """The canvas of a row as its last step left it, written into `canvas`.

        Stats `[1, C]` and step of that, and whether the stop rule ended it.
        """
        slots, one = self.slots, slice(row, row + 1)
        own = {name: getattr(slots, name)[one].clone() for name in (*_STATS, "ids", "run", "accepted")}
        canvas.ids, canvas.soft = own["ids"][0], slots.soft[row].clone()
        canvas.history = History(own["argmax"], own["run"])
        canvas.changes = Changes(slots.changes[row].clone(), slots.last_change[row].clone())
        canvas.step = int(slots.step[row])
        return (
            Stats(**{name: own[name] for name in _STATS}),
            Step(canvas.ids, own["accepted"][0]),
            bool(slots.stable[row]),
        )

    def free(self, row: int) -> None:
        """The row takes no more steps."""
        self.slots.done[row] = True

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Steps change nothing meanwhile: a recording may have to run what it records."""
        done = self.slots.done.clone()
        self.slots.done.fill_(True)
        yield
        self.slots.done.copy_(done)

    @torch.inference_mode()
    def step(self, rows: slice, most: int, clean: int = 0) -> None:
        """A step of the canvases in `rows`, those that are done aside. No prefix is longer than `most`.

        With `clean` it is the first one of the one canvas there, and so many last tokens before it are encoded in the
        same pass.
        """
        slots, lanes, width, vocab = self.slots.of(rows), self._lanes[rows], self.width, self._vocab
        device, config = self._runner.device, self._runner.model.config
        seed, choice, index, number = (word[:, None] for word in (slots.seed, slots.choice, slots.index, slots.step))
        noise = Noise(*step_noise(seed, choice, index, number, width, vocab, device))
        # One axis more: every position has a number for each block of the vocabulary.
        seed, choice, index, number = (word[:, None] for word in (seed, choice, index, number))
        uniforms = draw_uniforms(seed, choice, index, number, width, vocab, device)
        heat = temperature(slots.step, slots.steps, slots.t_min, slots.t_max)
        draws = Draws(
            temperature=heat.repeat_interleave(width),
            uniforms=uniforms.flatten(0, 1),
            draw_temperature=slots.temperature.repeat_interleave(width),
            top_k=None,
        )
        attend: Attend = LaneDenoise(lanes, config, slots.prefix, most)
        if clean:
            attend = SharedAttend(LaneEncode(lanes[0], config, slots.prefix - clean, clean, most), attend, clean)
            out = self._runner.step(slots.ids, None, slots.prefix, attend, draws, self._clean[rows][0, :clean])
        else:
            out = self._runner.step(slots.ids, slots.soft.flatten(0, 1), slots.prefix, attend, draws)
        stats = Stats(**{name: getattr(out, name).unflatten(0, slots.ids.shape) for name in _STATS})
        self._advance(slots, stats, out.soft.unflatten(0, slots.ids.shape), noise)

    def _advance(self, slots: Slots, stats: Stats, soft: Tensor, noise: Noise) -> None:
        """Sampler and stop rule; what they say becomes the state of every row that is not done."""
        rows = Rows(
            canvas=slots.ids, valid=torch.ones_like(slots.accepted), width=torch.full_like(slots.step, self.width),
            step=slots.step, steps=slots.steps, entropy_bound=slots.entropy_bound,
            accept_confidence=slots.accept_confidence, vocab=self._vocab,
        )  # fmt: skip
        changed = stats.argmax != slots.argmax
        rule = StopRule(slots.stability, slots.confidence, slots.jax)
        stable, history = should_stop(stats, rows, History(slots.argmax, slots.run), rule)
        step = self._sampler(stats, rows, noise)
        changes = Changes(slots.changes, slots.last_change).after(changed, (slots.steps - slots.step + 1)[:, None])
        new = {name: getattr(stats, name) for name in _STATS} | {
            "ids": step.canvas, "accepted": step.accepted, "soft": soft, "run": history.run,
            "changes": changes.count, "last_change": changes.last,
            "step": slots.step - 1, "stable": stable, "done": stable | (slots.step <= 1),
        }  # fmt: skip
        done = slots.done.clone()
        for name, value in new.items():
            old = getattr(slots, name)
            old.copy_(torch.where(done.view(-1, *(1,) * (old.dim() - 1)), old, value))
