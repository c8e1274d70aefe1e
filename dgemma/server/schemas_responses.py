"""The body of POST /v1/responses: the part that text needs; every other field of OpenAI's schema is refused."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dgemma.server.schemas import FORMAT, Sampling, Strict, described, fault, fault_of, only, read_format
from dgemma.server.schemas_chat import NO_TOOLS, Conversation, text_of_parts

_STATELESS = "responses are not stored, so every request brings its whole conversation"
LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text")
_BOOKS = ("id", "status", "type", "role", "content", "phase")  # what an item may have


def _input(value: Any) -> list[dict[str, str]]:
    """A text, or messages, as messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise fault("must be a text or a list of messages")
    return [_message(place, item) for place, item in enumerate(value)]


def _message(place: int, item: Any) -> dict[str, str]:
    if not isinstance(item, dict):
        raise fault(f"item {place} must be a message")
    kind, role = item.get("type", "message"), item.get("role")
    if kind != "message":
        raise fault(f"item {place} is of type {kind!r:.40}; this server reads messages only")
    if role not in _ROLES:
        raise fault(f"item {place}: role must be one of {', '.join(_ROLES)}; got {role!r:.40}")
    for name in item:
        if name not in _BOOKS:
            raise fault(f"item {place}: unknown field {name!r:.40}")
    try:
        text = text_of_parts(item.get("content"), _PARTS, books=("annotations", "logprobs"))
    except Exception as error:
        raise fault(f"item {place}: content: {error}") from None
    return {"role": "system" if role == "developer" else role, "content": text}


_ITEM = {
    "type": "object",
    "properties": {"role": {"enum": list(_ROLES)}, "content": {}},
    "required": ["role", "content"],
}
_INPUT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM, "minItems": 1}]}


class Reasoning(Strict):
    """How much to think aloud."""

    effort: Literal["none", "medium"] | None = None
    """`medium` where the template has a switch for thinking; there is one level."""
    summary: Any = only(why="thoughts are told as they are")
    generate_summary: Any = only(why="thoughts are told as they are")
    context: Any = only("auto", why="thoughts of earlier turns are no part of a conversation")
    mode: Any = only("standard", why="there is one way to think")


class Text(Strict):
    """What the answer is."""

    format: Any = described(FORMAT)
    """Text, any JSON object, or JSON that fits a schema."""
    verbosity: Any = only("medium", why="the model has no levels of verbosity")

    _read_format = field_validator("format", mode="before")(read_format)


class ResponseStreamOptions(Strict):
    """Nothing that changes anything."""

    include_obfuscation: Any = only(False, why="chunks are not padded with random text")


class ResponsesRequest(Conversation, Sampling):
    """A conversation to be answered, in the newer of OpenAI's two schemas."""

    input: list[dict[str, str]] = described(_INPUT, ...)
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: int | None = Field(None, ge=1)
    """At most so many tokens."""
    reasoning: Reasoning | None = None
    text: Text | None = None
    stream_options: ResponseStreamOptions | None = None
    include: Any = only([], [LOGPROBS], why="log-probabilities are all there is to include")
    top_logprobs: int | None = Field(None, ge=0, le=20)
    """So many likely tokens beside the chosen one; needs them to be included."""

    access_programs: Any = only(why="there are no access programs")
    background: Any = only(False, why="answers are not made in the background")
    background_options: Any = only(why="answers are not made in the background")
    context_management: Any = only([], why="the context is not managed: what does not fit is refused")
    conversation: Any = only(why=_STATELESS)
    image: Any = only(why="images are not supported")
    max_tool_calls: Any = only(why=NO_TOOLS)
    previous_response_id: Any = only(why=_STATELESS)
    prompt: Any = only(why="there are no stored prompts")
    truncation: Any = only("disabled", why="what does not fit is refused")

    _read_input = field_validator("input", mode="before")(_input)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.top_logprobs and not self.include:
            raise fault_of("top_logprobs", f"needs include: [{LOGPROBS!r}]")
        return self

    @property
    def top(self) -> int | None:
        """How many likely tokens are asked for beside the chosen one; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.include else None

    @property
    def budget(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        return "max_output_tokens", self.max_output_tokens

    @property
    def messages(self) -> list[dict[str, str]]:
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return first + self.input
