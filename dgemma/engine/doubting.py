"""How likely a model finds each token of a given text: by its encoder, or by its denoiser. Knows ids only."""

from __future__ import annotations

from collections.abc import Sequence

from dgemma.engine.likelihood import token_logprobs
from dgemma.engine.loop import Engine
from dgemma.engine.reading import Look, read
from dgemma.errors import RequestError

WAYS = ("canvas", "encoder")
_GROUPS = 8


def doubts(engine: Engine, before: Sequence[int], ids: Sequence[int], by: str, seed: int = 0) -> list[float]:
    """Log-probability in nats of each of `ids` behind `before`.

    "encoder": given all tokens before it. "canvas": given the text on both sides, with every eighth token replaced by
    noise, in eight reads; a text longer than a canvas is read canvas by canvas.
    """
    if by == "encoder":
        return token_logprobs(engine, [*before, *ids], given=len(before))
    if by != "canvas":
        raise RequestError(f"doubt is measured by one of {', '.join(WAYS)}; got {by!r}")
    model = engine.model_config
    widest = model.trained_widths[-1]
    looks = []
    for start in range(0, len(ids), widest):
        lead, part = (*before, *ids[:start]), ids[start : start + widest]
        groups = min(_GROUPS, len(part))
        kept = [tuple((at, token) for at, token in enumerate(part) if at % groups != group) for group in range(groups)]
        # A model of one width knows no other.
        width = len(part) if model.canvas_widths else widest
        looks += [Look(lead, width, kept[at % groups], at, (token,)) for at, token in enumerate(part)]
    return [told[0][0] for told in read(engine, looks, draws=1, seed=seed)]
