"""The bodies of POST /v1/infill and POST /v1/edit: what a search over the library's fields takes."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dgemma.control.infill import USUAL_MOST
from dgemma.control.template import MOST_TOKENS
from dgemma.engine.infilling import MOST_CANDIDATES, USUAL_CANDIDATES
from dgemma.server.schemas import Penalised, Sampling, Strict, fault_of

LONGEST_TEXT = 100_000


class _Searched(Sampling):
    """What both have beside the fields of generation."""

    stream: bool | None = Field(None, description="False or null: the best fill is known at the end only.")
    prompt: str = Field("", max_length=LONGEST_TEXT)
    """What stands before the text and is no part of it."""
    candidates: int = Field(USUAL_CANDIDATES, ge=1, le=MOST_CANDIDATES)
    """Choices of lengths that are tried at once; the likeliest one is the answer."""
    truncate: bool = False
    """Allow a text that needs several canvases: a hole does not see what is behind its canvas."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.stream:
            raise fault_of("stream", "a fill cannot be streamed: which one is the best is known at the end only")
        for name in ("trace", "confidence"):
            if self.dgemma is not None and getattr(self.dgemma, name):
                raise fault_of(f"dgemma.{name}", "is for the routes that give one answer")
        return self


class InfillRequest(_Searched):
    """A text with holes."""

    text: str = Field(max_length=LONGEST_TEXT)
    """`[[...]]` is a hole; `[[... 3 words ...]]`, `[[... 2-6 tokens ...]]` say how long, other text in it says with
    what. A backslash before the brackets makes them text."""
    most: int = Field(USUAL_MOST, ge=1, le=MOST_TOKENS)
    """Tokens at most in a hole that tells no length."""


class Span(Strict):
    """Characters of the text, `end` not included."""

    start: int = Field(ge=0)
    end: int = Field(ge=1)


class EditRequest(_Searched):
    """A text, and what of it is to be written anew."""

    text: str = Field(max_length=LONGEST_TEXT)
    spans: list[Span] | None = Field(None, min_length=1, max_length=1000)
    """What to write anew; or `doubt`."""
    doubt: float | None = Field(None, gt=0, le=1)
    """The words around this share of the tokens, the least likely ones."""
    by: Literal["canvas", "encoder"] = "canvas"
    """Who doubts: the denoiser, which sees both sides, or the encoder, which sees what is before."""
    instruction: str = Field("", max_length=LONGEST_TEXT)
    """What to do, for models that know conversations."""
    keep_prefix: int = Field(0, ge=0)
    """Characters at the begin that stay."""
    keep_suffix: int = Field(0, ge=0)
    """Characters at the end that stay."""
    resize: int = Field(0, ge=0, le=MOST_TOKENS)
    """Tokens that a span may grow or shrink by."""


def check_suffix(body: Penalised, prompts: list[Any], refused: dict[str, bool]) -> None:
    """What a completion with text behind it cannot have; `refused` are further fields that are set."""
    if len(prompts) != 1 or not isinstance(prompts[0], str):
        raise fault_of("suffix", "needs one prompt, and as a text")
    asked = {
        "n": (body.n or 1) > 1,
        "stream": bool(body.stream),
        "stop": bool(body.stop),
        "dgemma.trace": bool(body.dgemma and body.dgemma.trace),
        "dgemma.confidence": bool(body.dgemma and body.dgemma.confidence),
        **refused,
    }
    if wrong := next((name for name, is_set in asked.items() if is_set), None):
        raise fault_of(wrong, "cannot be combined with suffix: of several fills one is chosen at the end")
    if body.max_tokens is not None and body.max_tokens > MOST_TOKENS:
        raise fault_of("max_tokens", f"is at most {MOST_TOKENS} with suffix, got {body.max_tokens}")
