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

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.diffusion.noise import draw_uniforms, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats, Step
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.schedule import temperature
from dgemma.diffusion.stop import History, StopRule, should_stop
from dgemma.engine.confidence import Changes
from dgemma.engine.request import Canvas, State
from dgemma.engine.runner import Draws, Runner
from dgemma.kernels.random import signed

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

    def first(self, rows: int) -> Slots:
        """The same memory of the first `rows`."""
        return Slots(**{name: value[:rows] for name, value in vars(self).items()})


class LaneAttend:
    """`DenoiseAttend` for caches whose lengths the device knows: `[R, 2]` and the most it is, by kind of layer."""

    def __init__(self, lanes: Sequence[KVCache], kinds: Sequence[str], where: dict[str, tuple[Tensor, int]]) -> None:
        self._lanes, self._kinds, self._where = lanes, kinds, where

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        where, most = self._where[self._kinds[layer]]
        out = []
        rows = zip(self._lanes, *(x.chunk(len(self._lanes)) for x in (q, k, v)), where, strict=True)
        for lane, own_q, own_k, own_v, place in rows:
            old_k, old_v, scales = lane.slots(layer)
            out.append(kernels.canvas_attention(own_q, own_k, own_v, old_k, old_v, 0, most, scales=scales, where=place))
        return torch.cat(out)


class Resident:
    """Canvases of one width and one sampler, one for each of `lanes`: caches that never move in memory."""

    def __init__(self, runner: Runner, lanes: Sequence[KVCache], width: int, sampler: str) -> None:
        self._runner, self._lanes, self.width = runner, lanes, width
        self._sampler, config = get_sampler(sampler), runner.model.config
        self._vocab = config.vocab_size
        self.slots = Slots.empty(len(lanes), width, config.hidden_size, runner.device, runner.dtype)

    def load(self, row: int, state: State) -> None:
        """Put the canvas of `state` into a row, as it stands."""
        canvas, config, slots = state.canvas, state.config, self.slots
        assert canvas is not None and canvas.width == self.width
        rule = StopRule.of([config])
        numbers = {
            "step": canvas.step, "done": False, "stable": False, "prefix": state.cache.length, "choice": config.choice,
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
    def step(self, rows: int, most: int) -> None:
        """A step of the first `rows` canvases, those that are done aside. No prefix is longer than `most`."""
        slots, width, vocab, device = self.slots.first(rows), self.width, self._vocab, self._runner.device
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
        out = self._runner.step(slots.ids, slots.soft.flatten(0, 1), slots.prefix, self._attend(slots, most), draws)
        stats = Stats(**{name: getattr(out, name).unflatten(0, (rows, width)) for name in _STATS})
        self._advance(slots, stats, out.soft.unflatten(0, (rows, width)), noise)

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

    def _attend(self, slots: Slots, most: int) -> LaneAttend:
        """Where the prefixes lie, for both kinds of layers; see `KVCache.stored`."""
        lanes, config = self._lanes[: len(slots.prefix)], self._runner.model.config
        seen = config.sliding_window - 1
        first = (slots.prefix - seen).clamp(min=0)
        where = {
            "full": (torch.stack([torch.zeros_like(first), slots.prefix], dim=-1), most),
            "sliding": (torch.stack([first % lanes[0].ring, slots.prefix - first], dim=-1), min(seen, most)),
        }
        return LaneAttend(lanes, [layer.kind for layer in config.layers], where)
