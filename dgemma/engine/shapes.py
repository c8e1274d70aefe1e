"""Which positions of a canvas are predicted otherwise than by the plain vocabulary op, and how."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.control import Mask
from dgemma.engine.constrained import constrained
from dgemma.engine.request import Canvas, State
from dgemma.engine.runner import Shape


def shapes(state: State, vocab: int, device: torch.device) -> list[Shape]:
    """The shapes of the canvas of `state`; empty if nothing is asked for."""
    canvas, config = state.canvas, state.config
    assert canvas is not None
    if state.control.constraint is not None:  # its draws are of the step
        return [Shape(canvas.bias, config.top_p, predict=constrained(state))]
    if canvas.shapes is None:
        canvas.shapes = _made(canvas, config, vocab, device)
    return canvas.shapes


def _made(canvas: Canvas, config: GenerationConfig, vocab: int, device: torch.device) -> list[Shape]:
    alike = [] if canvas.bias is None and config.top_p == 1 else [Shape(canvas.bias, config.top_p)]
    if not canvas.places and not canvas.masks and not (canvas.reach and config.stop_tokens):
        return alike
    groups: dict[tuple[tuple[int, ...], Mask | None], list[int]] = {}
    for place in range(canvas.width):
        if place not in canvas.pins:
            key = canvas.banned(place, config.stop_tokens), canvas.masks.get(place)
            groups.setdefault(key, []).append(place)
    return [
        Shape(without(tokens, canvas, vocab, device, mask), config.top_p, places=torch.tensor(places, device=device))
        for (tokens, mask), places in groups.items()
        if tokens or mask or alike
    ]


def without(
    tokens: tuple[int, ...], canvas: Canvas, vocab: int, device: torch.device, mask: Mask | None = None
) -> Tensor | None:
    """The bias of a canvas `[V]`, where `tokens` and those of `mask` are banned besides; None if nothing is to add."""
    if not tokens and mask is None:
        return canvas.bias
    bias = torch.zeros(vocab, device=device) if canvas.bias is None else canvas.bias.clone()
    bias[list(tokens)] = -torch.inf
    if mask is not None:
        bias[mask.tokens.to(device)] = -torch.inf
    return bias
