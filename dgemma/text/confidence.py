"""How sure a canvas was of each token of an answer, with the token's text. Knows events and a tokenizer, no model."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from dgemma.events import Committed
from dgemma.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class TokenConfidence:
    """One committed token; see `events.Committed` for the four numbers.

    The texts of an answer's tokens, joined, are its text: an end token has none, and a character in several tokens
    stands with its last. `steps` are those of the token's `canvas`.
    """

    token: int
    text: str
    canvas: int
    steps: int
    entropy: float
    top_logprob: float
    revisions: int
    last_change: int


def of_event(event: Committed) -> list[TokenConfidence]:
    """The same of one event, without texts."""
    rows = zip(event.entropy, event.top_logprob, event.revisions, event.last_change, strict=True)
    return [
        TokenConfidence(token, "", event.canvas, event.steps, *numbers)
        for token, numbers in zip(event.tokens, rows, strict=False)
    ]


def token_confidence(
    committed: Iterable[Committed], tokenizer: Tokenizer, ends: Container[int]
) -> tuple[TokenConfidence, ...]:
    """One entry a token, in mode "diffusion" only. `ends` are the tokens that end an answer."""
    decoder, found = StreamDecoder(tokenizer), list[TokenConfidence]()
    for event in committed:
        for place, one in enumerate(of_event(event)):
            last = place == len(event.tokens) - 1 and one.token in ends
            found.append(one if last else replace(one, text=decoder.push([one.token])))
    if found and (rest := decoder.flush()):
        found[-1] = replace(found[-1], text=found[-1].text + rest)
    return tuple(found)
