"""Which positions of a canvas are predicted otherwise than by the plain vocabulary op, and how."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.engine.request import Canvas, State
from dgemma.engine.runner import Shape


def shapes(state: State, vocab: int, device: torch.device) -> list[Shape]:
    """The shapes of the canvas of `state`; empty if nothing is asked for."""
    canvas, config = state.canvas, state.config
    assert canvas is not None
    alike = [] if canvas.bias is None and config.top_p == 1 else [Shape(canvas.bias, config.top_p)]
    if not canvas.reach or not config.stop_tokens:
        return alike
    free = torch.ones(canvas.width, dtype=torch.bool, device=device)
    free[list(canvas.pins)] = False
    early = torch.arange(canvas.width, device=device) < canvas.reach
    bias = _without(config.stop_tokens, canvas, vocab, device)
    out = [Shape(bias, config.top_p, places=(free & early).nonzero().flatten())]
    out += [Shape(canvas.bias, config.top_p, places=(~early).nonzero().flatten()) for _ in alike]
    return [shape for shape in out if shape.places is not None and len(shape.places)]


def _without(tokens: tuple[int, ...], canvas: Canvas, vocab: int, device: torch.device) -> Tensor:
    bias = torch.zeros(vocab, device=device) if canvas.bias is None else canvas.bias.clone()
    bias[list(tokens)] = -torch.inf
    return bias
