"""The prediction of a canvas under a constraint: what the network says of token classes, solved over all positions.

Entropies, draws and the soft embedding are of the constrained posterior; the argmax is its most likely path. Knows the
canvas's place in the answer, no automaton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.control import Ask, Constraint, Solved
from dgemma.engine.request import State
from dgemma.engine.runner import Predict
from dgemma.kernels import PackedHead, VocabStats
from dgemma.kernels.classes import Head, class_stats, weighted
from dgemma.kernels.random import Stream, uniform


def constrained(state: State) -> Predict:
    """What takes the place of the vocabulary op for the canvas that `state` is at."""
    canvas, config, constraint = state.canvas, state.config, state.control.constraint
    assert canvas is not None and constraint is not None
    places = torch.arange(canvas.width)
    marks = uniform(Stream.PATH, config.seed, config.choice, canvas.index, canvas.step, places)
    start, room = canvas.automaton, state.room

    def predict(
        hidden: Tensor,
        embed: Tensor | PackedHead,
        cap: float,
        temperature: Tensor,
        uniforms: Tensor,
        draw_temperature: Tensor | None = None,
        top_k: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        top_p: Tensor | None = None,
    ) -> VocabStats:
        # The constraint's own check keeps top-k and top-p away.
        matmul = kernels.find("linear", hidden.device.type)
        head = Head(hidden, embed, cap, temperature, matmul, bias, constraint.raw_signal)
        of, count = constraint.classes.of.to(hidden.device), constraint.classes.count

        def solve(temperature: Tensor) -> Solved:
            logsum, best = class_stats(head, of, count, temperature)
            return _solve(constraint, logsum.cpu(), best.cpu(), start, room, marks)

        solved = solve(temperature)
        drawn = solved.drawn
        if config.temperature == 0:
            drawn = solved.path
        elif config.temperature != 1:
            drawn = solve(temperature * config.temperature).drawn
        canvas.states = solved.states
        weight, path, drawn = (part.to(hidden.device) for part in (solved.weight, solved.path, drawn))
        return weighted(head, of, weight, path, drawn, uniforms, draw_temperature)

    return predict


def _solve(constraint: Constraint, logsum: Tensor, best: Tensor, state: int, room: int, uniforms: Tensor) -> Solved:
    """The posterior of a canvas of which no more than `room` positions are the answer's."""
    width = len(logsum)
    size = min(width, room)
    inside = constraint.solve(Ask(logsum[:size], best[:size], state, room - size, uniforms[:size]))
    if size == width:
        return inside
    # The answer has ended by here, so that what is behind it is filled up as behind any end.
    last = inside.states[-1]
    behind = constraint.solve(Ask(logsum[size:], best[size:], last, 0, uniforms[size:]))
    return Solved(
        torch.cat([inside.weight, behind.weight]),
        torch.cat([inside.path, behind.path]),
        torch.cat([inside.drawn, behind.drawn]),
        (*inside.states, *behind.states[1:]),
    )
