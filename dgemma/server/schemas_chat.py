"""The body of POST /v1/chat/completions: every field that OpenAI's schema has, honoured or refused."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dgemma.server.schemas import Penalised, Strict, accepted, described, fault, fault_of, only

NO_TOOLS = "tools are not supported"
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}


def text_of_parts(value: Any, kinds: tuple[str, ...] = ("text",), books: tuple[str, ...] = ()) -> str:
    """A message's content as one text; parts of other kinds than text are refused by their place.

    `books` are further fields of a part that an answer has and a question may repeat.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fault("must be a text or a list of text parts")
    texts = []
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise fault(f"part {place} is of type {kind!r:.40}; this server reads {' and '.join(kinds)} only")
        if not isinstance(part.get("text"), str):
            raise fault(f"part {place} needs a text")
        for name in part:
            if name not in ("type", "text", *books) and part[name] is not None:
                raise fault(f"part {place}: unknown field {name!r:.40}")
        texts.append(part["text"])
    return "".join(texts)


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another word for `system`."""
    content: str = described(_CONTENT, ...)
    reasoning_content: str | None = None
    """Of an assistant: what it thought aloud, as an answer gives it. No field of OpenAI's."""
    name: Any = only(why="chat templates know no names of speakers")
    refusal: Any = only(why="refusals cannot be told apart from text")
    audio: Any = only(why="audio is not supported")
    tool_calls: Any = only([], why=NO_TOOLS)
    function_call: Any = only(why=NO_TOOLS)
    annotations: Any = only([], why="annotations are not supported")

    _read_content = field_validator("content", mode="before")(lambda value: text_of_parts(value))

    def plain(self) -> dict[str, Any]:
        """As chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        more = {} if self.reasoning_content is None else {"reasoning_content": self.reasoning_content}
        return {"role": role, "content": self.content, **more}


class Conversation(Strict):
    """Fields without influence, or with one value only, that both schemas of conversations have."""

    metadata: dict[str, str] | None = accepted()
    safety_identifier: str | None = accepted()
    prompt_cache_key: str | None = accepted()
    parallel_tool_calls: bool | None = Field(None, description="Accepted: there are no tools to call.")

    moderation: Any = only(why="there is no moderation")
    prompt_cache_options: Any = only(why="prefixes are kept as long as there is room; a request cannot choose how")
    prompt_cache_retention: Any = only("in_memory", why="prefixes are kept in memory only")
    service_tier: Any = only("auto", "default", why="there is one tier")
    store: Any = only(False, why="answers are not stored")
    tool_choice: Any = only("none", "auto", why=NO_TOOLS)
    tools: Any = only([], why=NO_TOOLS)


class ChatRequest(Conversation, Penalised):
    """A conversation to be answered."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The same as `max_tokens`."""
    logprobs: bool | None = None
    """`logprob` is the encoder's, `canvas_logprob` the denoiser's at the step that decided."""
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning_effort: Literal["none", "medium"] | None = None
    """`medium` lets the model think aloud where its template has a switch for that; there is one level."""

    audio: Any = only(why="audio is not supported")
    function_call: Any = only("none", "auto", why=NO_TOOLS)
    functions: Any = only([], why=NO_TOOLS)
    modalities: Any = only(["text"], why="answers are text")
    prediction: Any = only(why="predicted outputs are not supported")
    verbosity: Any = only("medium", why="the model has no levels of verbosity")
    web_search_options: Any = only(why="there is no web search")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault_of("top_logprobs", "needs logprobs: true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise fault_of("max_tokens", f"is another name of max_completion_tokens; got {both[0]} and {both[1]}")
        return self

    @property
    def budget(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likely tokens are asked for beside the chosen one; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
