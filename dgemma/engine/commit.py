"""What a denoising step leads to: the event that tells of it, and the tokens that it makes final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dgemma.diffusion.finalise import finalise
from dgemma.diffusion.protocol import Stats, Step
from dgemma.engine.confidence import confidence
from dgemma.engine.hooked import settled
from dgemma.engine.request import State
from dgemma.engine.runner import Runner
from dgemma.engine.verified import propose
from dgemma.events import Committed, Draft


def conclude(
    state: State, stats: Stats, step: Step, row: int, stable: bool, hidden: Tensor, runner: Runner, drafter: Runner
) -> Committed | None:
    """After a step with the hidden states `[C, H]` of this canvas: what it commits, if it was the canvas's last.

    None where the canvas goes on, and in mode verified, whose canvases become drafts.
    """
    canvas = state.canvas
    assert canvas is not None
    if canvas.step > 0 and not stable and not canvas.ended:
        return None
    taken = state.config.max_denoising_steps - canvas.step
    if state.drafting:
        propose(state, canvas, stats.argmax[row], hidden, taken, "stable" if stable else "cap", drafter)
        return None
    # HF commits the argmax; JAX commits the sampled and renoised canvas.
    final = argmax = stats.argmax[row, : canvas.width]
    if state.config.convention == "jax":
        # Fresh noise may hit a banned token, which is committed by nobody.
        final = torch.where(canvas.bans(step.canvas, state.config.stop_tokens), argmax, step.canvas)
    if state.control.hook is not None:
        final = settled(state, final, hidden, runner)
    state.steps.append(taken)
    state.canvas = None
    stop = "hook" if canvas.ended else "stable" if stable else "cap"
    committed = commit(state, canvas.index, final.tolist(), taken, stop, canvas.reach)
    sure = confidence(canvas.changes, stats, row, len(committed.tokens), canvas.pins)
    if state.scoring:
        state.scoring.commit(runner, canvas.index, committed.tokens, hidden)
    return replace(committed, **sure)


def commit(state: State, canvas: int, tokens: Sequence[int], steps: int, stop: str, reach: int = 0) -> Committed:
    """Make tokens final: cut at the first end token from place `reach` on (it stays) and at the budget."""
    kept, ended = finalise(tokens[reach:], state.config.stop_tokens)
    kept = (*tokens[:reach], *kept)
    if len(kept) > state.room:
        kept, ended = kept[: state.room], False
    state.ids.extend(kept)
    state.counts.update(kept)
    state.commits += 1
    if ended or not state.room:
        state.ending = "stop" if ended else "length"
    return Committed(state.id, canvas, kept, steps, stop)


def draft(state: State, stats: Stats, step: Step, row: int, temperature: float) -> Draft:
    """The event of the step just taken; steps are counted up from 1 here, for people."""
    canvas = state.canvas
    assert canvas is not None
    lead, width, total = canvas.lead, canvas.width, state.config.max_denoising_steps
    return Draft(
        request=state.id,
        canvas=canvas.index,
        step=total - canvas.step,
        max_steps=total,
        temperature=temperature,
        tokens=tuple(stats.argmax[row, lead:width].tolist()),
        canvas_tokens=tuple(step.canvas[lead:].tolist()),
        accepted=tuple(step.accepted[lead:].tolist()),
        entropy=tuple(stats.entropy[row, lead:width].tolist()),
        states=canvas.states,
    )
