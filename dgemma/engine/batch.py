"""Canvases of any requests, steps and widths as one batch. Knows no cache and no network.

Packed end to end `[T]` for the network, padded `[R, C]` for samplers and stop rules, and back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dgemma import kernels
from dgemma.diffusion.noise import draw_uniforms, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats, Step
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.schedule import temperature
from dgemma.diffusion.stop import History, StopRule, should_stop
from dgemma.engine.attend import spans
from dgemma.engine.request import Canvas, State
from dgemma.engine.runner import Draws
from dgemma.engine.shapes import shapes


class CanvasBatch:
    """One denoising step of R canvases: `draws` before the pass, `finish` after it."""

    def __init__(self, states: Sequence[State], vocab: int, device: torch.device) -> None:
        self._vocab, self._device = vocab, device
        self.states, self._configs = states, [state.config for state in states]
        self.canvases: list[Canvas] = []
        for state in states:
            assert state.canvas is not None
            self.canvases.append(state.canvas)
        self.widths = [canvas.width for canvas in self.canvases]
        self.temperature = temperature(
            [canvas.step for canvas in self.canvases],
            [config.max_denoising_steps for config in self._configs],
            [config.t_min for config in self._configs],
            [config.t_max for config in self._configs],
        ).to(device)

    def draws(self) -> Draws:
        """What the vocabulary op needs, per packed position."""
        keys = zip(self._configs, self.canvases, self.widths, strict=True)
        uniforms = [
            draw_uniforms(config.seed, config.choice, canvas.index, canvas.step, width, self._vocab, self._device)
            for config, canvas, width in keys
        ]
        limited = any(config.top_k for config in self._configs)  # to look on the device would wait for it
        return Draws(
            temperature=self._packed(self.temperature),
            uniforms=torch.cat(uniforms),
            draw_temperature=self._packed(self._column([c.temperature for c in self._configs], torch.float32)),
            top_k=self._packed(self._column([c.top_k for c in self._configs], torch.int64)) if limited else None,
            shapes=[shapes(state, self._vocab, self._device) for state in self.states],
            pins=self._pins(),
        )

    def finish(self, out: kernels.VocabStats) -> tuple[Stats, list[Step], list[bool]]:
        """Sampler and stop rule after the pass: the padded stats, each canvas's step `[C]`, and which are stable.

        The canvases move on: next ids, signal, history and step.
        """
        fields = ("entropy", "argmax", "top_logprob", "draw", "draw_logprob")
        stats = Stats(**{name: self._padded(getattr(out, name).split(self.widths)) for name in fields})
        rows, noise = self._rows(), self._noise()
        history = History(
            self._padded([canvas.history.argmax[0] for canvas in self.canvases]),
            torch.cat([canvas.history.run for canvas in self.canvases]),
        )
        changed = stats.argmax != history.argmax
        done, history = should_stop(stats, rows, history, StopRule.of(self._configs, self._device))
        # Samplers are cheap and see rows apart: run each on the whole batch, take the rows it is for.
        taken = {name: get_sampler(name)(stats, rows, noise) for name in {c.sampler for c in self._configs}}
        steps = []
        softs = out.soft.split(self.widths)
        for row, (config, canvas, width) in enumerate(zip(self._configs, self.canvases, self.widths, strict=True)):
            step = taken[config.sampler]
            steps.append(Step(canvas=step.canvas[row, :width], accepted=step.accepted[row, :width]))
            canvas.ids, canvas.soft = steps[-1].canvas, softs[row]
            canvas.history = History(history.argmax[row : row + 1, :width], history.run[row : row + 1])
            canvas.changes = canvas.changes.after(changed[row, :width], config.max_denoising_steps - canvas.step + 1)
            canvas.step -= 1
        return stats, steps, done.tolist()

    def _rows(self) -> Rows:
        width = self._column(self.widths, torch.int64)
        # A pinned position is like padding: nothing is decided or measured there.
        valid = torch.arange(max(self.widths), device=self._device) < width[:, None]
        for row, canvas in enumerate(self.canvases):
            if canvas.pins:  # a list of places waits for the device, an empty one, too
                valid[row, list(canvas.pins)] = False
        return Rows(
            canvas=self._padded([canvas.ids for canvas in self.canvases]),
            valid=valid,
            width=valid.sum(dim=-1),
            step=self._column([canvas.step for canvas in self.canvases], torch.int64),
            steps=self._column([config.max_denoising_steps for config in self._configs], torch.int64),
            entropy_bound=self._column([config.entropy_bound for config in self._configs], torch.float32),
            accept_confidence=self._column([config.accept_confidence for config in self._configs], torch.float32),
            vocab=self._vocab,
        )

    def _pins(self) -> tuple[Tensor, Tensor] | None:
        pairs = [
            (span.start + place, token)
            for span, canvas in zip(spans(self.widths), self.canvases, strict=True)
            for place, token in canvas.pins.items()
        ]
        if not pairs:
            return None
        rows, tokens = zip(*pairs, strict=True)
        return self._column(rows, torch.int64), self._column(tokens, torch.int64)

    def _noise(self) -> Noise:
        keys = zip(self._configs, self.canvases, self.widths, strict=True)
        pairs = [
            step_noise(config.seed, config.choice, canvas.index, canvas.step, width, self._vocab, self._device)
            for config, canvas, width in keys
        ]
        return Noise(self._padded([tokens for tokens, _ in pairs]), self._padded([uniforms for _, uniforms in pairs]))

    def _column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _packed(self, per_row: Tensor) -> Tensor:
        return per_row.repeat_interleave(torch.tensor(self.widths, device=self._device), output_size=sum(self.widths))

    def _padded(self, parts: Sequence[Tensor]) -> Tensor:
        return pad_sequence(list(parts), batch_first=True)
