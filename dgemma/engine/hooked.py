"""Calls the hook of a request after a denoising step, and does what it demands. Knows no text.

What it demands becomes part of the request's `Control`, so that a pin from a hook is a pin like any other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dgemma.control.hooks import Demands, StepTensors, StepView
from dgemma.diffusion.protocol import Stats, Step
from dgemma.engine.request import State, put
from dgemma.engine.runner import Runner
from dgemma.engine.shapes import without
from dgemma.errors import RequestError


def step_view(state: State, read: Tensor, stats: Stats, step: Step, row: int, vocab: int) -> StepView:
    """The step that the canvas of `state` has just taken, as a hook sees it; `read [C]` are the ids it began with."""
    canvas, config = state.canvas, state.config
    assert canvas is not None
    own = {name: getattr(stats, name)[row, : canvas.width] for name in ("argmax", "entropy", "top_logprob", "draw")}
    return StepView(
        StepTensors(ids=read, accepted=step.accepted, **own),
        request=state.id,
        canvas=canvas.index,
        step=config.max_denoising_steps - canvas.step,
        max_steps=config.max_denoising_steps,
        start=state.completion,
        limit=config.max_new_tokens,
        vocab=vocab,
        pins=dict(state.control.pins),
        bound=state.control.constraint is not None,
    )


def obey(state: State, view: StepView, step: Step, stable: bool, runner: Runner) -> tuple[Step, bool]:
    """Call the hook and do what it demands: the step as it is now, and whether the canvas is still at rest.

    A step that brought a new pin or ban is no rest: the rest of the canvas shall read it. Whatever the hook raises
    becomes a `RequestError` of its request.
    """
    hook = state.control.hook
    assert hook is not None
    try:
        hook(view)
        new = _add(state, view.demands, runner.model.config.vocab_size)
    except Exception as error:
        what = str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
        raise RequestError(f"the hook failed at step {view.step} of canvas {view.canvas}: {what}") from error
    finally:
        view.close()
    demands = view.demands
    if new or demands.accepts:
        step = _rewrite(state, view, step, runner)
    if demands.stop:
        assert state.canvas is not None
        state.canvas.ended = True
    return step, stable and not new


def _add(state: State, demands: Demands, vocab: int) -> bool:
    """Make pins and bans the request's own; whether there was a new one."""
    pins, bans = dict(state.control.pins), dict.fromkeys(state.control.bans)
    control = replace(state.control, pins=tuple((pins | demands.pins).items()), bans=tuple(bans | demands.bans))
    if control == state.control:
        return False
    control.check(state.config, vocab)
    state.control = control
    return True


@torch.inference_mode()
def _rewrite(state: State, view: StepView, step: Step, runner: Runner) -> Step:
    """What the next step reads, with accepted and pinned tokens in their places."""
    canvas, start = state.canvas, view.places.start
    assert canvas is not None
    accepts = {
        place - start: view.draw[place - start] if token is None else token
        for place, token in view.demands.accepts.items()
    }
    canvas.ids, accepted = step.canvas.clone(), step.accepted.clone()
    put(canvas.ids, accepts)
    accepted[list(accepts)] = True
    state.bind(canvas, runner.model.config.vocab_size)
    accepted[list(canvas.pins)] = False
    if canvas.soft is not None and canvas.pins:
        canvas.soft = canvas.soft.clone()
        places = torch.tensor(list(canvas.pins), device=canvas.soft.device)
        tokens = torch.tensor(list(canvas.pins.values()), device=canvas.soft.device)
        canvas.soft[places] = runner.model.embed.weight[tokens].to(canvas.soft.dtype)
    return Step(canvas=canvas.ids, accepted=accepted)


@torch.inference_mode()
def settled(state: State, final: Tensor, hidden: Tensor, runner: Runner) -> Tensor:
    """`final [C]` as it is committed: with the pins, and with nothing that the hook banned in the deciding step.

    Such a position takes the likeliest token that it may have, by the step's own hidden states `[C, H]`.
    """
    canvas = state.canvas
    assert canvas is not None
    final = final.clone()
    for place in canvas.bans(final, state.config.stop_tokens).nonzero().flatten().tolist():
        logits = runner.logits(hidden[place : place + 1])[0]
        tokens, mask = canvas.banned(place, state.config.stop_tokens), canvas.masks.get(place)
        bias = without(tokens, canvas, len(logits), logits.device, mask)
        assert bias is not None
        logits = logits + bias
        final[place] = (logits == logits.amax()).nonzero()[0, 0]  # ties go to the lowest id
    put(final, canvas.pins)
    return final
