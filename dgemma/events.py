"""What the outside sees of a running request: plain data, no tensors, no text.

Ids are token ids. A `Draft` is a snapshot that may still change anywhere; only `Committed` tokens are final.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Draft:
    """One denoising step of one canvas.

    `step` counts up from 1. `tokens` is the current prediction (argmax) of the whole canvas, `canvas_tokens` what the
    next step will read (accepted draws and fresh noise). `entropy` is in nats, per position, at the step's temperature.
    """

    request: int
    canvas: int
    step: int
    max_steps: int
    temperature: float
    tokens: tuple[int, ...]
    canvas_tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    entropy: tuple[float, ...]
    states: tuple[int, ...] = ()
    """Under a constraint, its automaton's states along `tokens`, one more than positions; else empty."""


@dataclass(frozen=True, slots=True)
class Committed:
    """Tokens that are final: one canvas (trimmed at the end token and at the budget) or one autoregressive token.

    In autoregressive mode `canvas` is the token's place in the answer and `steps` is 0.
    """

    request: int
    canvas: int
    tokens: tuple[int, ...]
    steps: int
    stop: str
    """Why denoising stopped: `"stable"` (the stop rule), `"cap"` (the step limit), `"hook"` or `"ar"`."""
    entropy: tuple[float, ...] = ()
    """In nats, of each token's position at the step that decided; this and the next three only in mode "diffusion"."""
    top_logprob: tuple[float, ...] = ()
    """Of the likeliest token there, in nats, at that step's temperature; not the encoder's (see `Scored`)."""
    revisions: tuple[int, ...] = ()
    """How often the prediction (argmax) of the position changed from one step of the canvas to the next."""
    last_change: tuple[int, ...] = ()
    """The step, counted from 1, that first predicted what was predicted last; 1 if that never changed."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities in nats of the tokens of the `Committed` with the same `canvas`; only for who asked.

    Comes after it, before the next `Committed` and before `Finished`; an aborted request may lack the last one.
    """

    request: int
    canvas: int
    logprobs: tuple[float, ...]
    """Of each token, by the encoder at temperature 1, with nothing that shapes the draw: exact."""
    top: tuple[tuple[tuple[int, float], ...], ...]
    """At each token's place the most likely tokens, as many as were asked for, the same way; ties by the lowest id."""
    canvas_logprobs: tuple[float, ...]
    """Of each token, by the denoiser in its canvas's last step, at temperature 1: of its own position alone, given a
    canvas that was not final. Empty in autoregressive mode. Not to be mixed with the encoder's."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request. `reason` is `"stop"` (end token), `"length"` (budget) or `"abort"`."""

    request: int
    reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    steps: tuple[int, ...]
    """Denoising steps of every canvas, in order; empty in autoregressive mode."""
    encode_passes: int
    """Passes that encoded committed tokens; the prompt's own are not counted."""
    accepted: tuple[int, ...] = ()
    """Only in mode verified: how many drafted tokens of every canvas were accepted."""


Event = Draft | Committed | Scored | Finished
