"""What is left of a committed canvas: the tokens up to the first end token, wherever it stands."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def finalise(tokens: Sequence[int], stop_tokens: Collection[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens up to and including the first end token, and whether there was one (HF `_finalize_canvas`).

    Without stop tokens an answer never ends by itself. HF pads to the canvas width (`padded`); we trim.
    """
    for index, token in enumerate(tokens):
        if token in stop_tokens:
            return tuple(tokens[: index + 1]), True
    return tuple(tokens), False


def padded(kept: Sequence[int], width: int, pad: int) -> tuple[int, ...]:
    """`kept` as HF returns it: filled with `pad` to the canvas width."""
    return tuple(kept) + (pad,) * (width - len(kept))
