"""The body of POST /v1/completions: every field that OpenAI's schema has, honoured or refused."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from dgemma.config import is_whole
from dgemma.server.schemas import Penalised, described, fault, fault_of, only
from dgemma.server.schemas_infill import check_suffix

MAX_PROMPTS = 128

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt or several, each a text or token ids, as a list."""
    many = value if isinstance(value, list) and value and not is_whole(value[0]) else [value]
    if len(many) > MAX_PROMPTS:
        raise fault(f"takes at most {MAX_PROMPTS} prompts, got {len(many)}")
    for place, prompt in enumerate(many):
        ids = isinstance(prompt, list) and bool(prompt) and all(map(is_whole, prompt))
        if not (isinstance(prompt, str) or ids):
            where = f"prompt {place} " if many is value else ""
            raise fault(f"{where}must be a text or a list of token ids, or a list of these")
    return many


_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_ONE: dict[str, Any] = {"type": "string"}
_PROMPTS: dict[str, Any] = {"anyOf": [_ONE, _IDS, {"type": "array", "items": {"anyOf": [_ONE, _IDS]}, "minItems": 1}]}


class CompletionRequest(Penalised):
    """Texts to go on from."""

    prompt: list[Prompt] = described(_PROMPTS, ...)
    logprobs: int | None = Field(None, ge=0, le=20)
    """So many likely tokens beside the chosen one."""

    best_of: int | None = Field(None, description="Answers are not ranked: null or the value of n.")
    echo: Any = only(False, why="the prompt is not sent back")
    suffix: str | None = None
    """Text behind the completion, which is then the likeliest of several fills; see /v1/infill."""

    _read_prompts = field_validator("prompt", mode="before")(_prompts)

    @model_validator(mode="after")
    def _nothing_to_rank(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise fault_of("best_of", f"answers are not ranked, so it must be null or n ({self.n or 1})")
        return self

    @model_validator(mode="after")
    def _one_fill(self) -> Self:
        if self.suffix:
            check_suffix(self, self.prompt, {"logprobs": self.logprobs is not None})
        return self

    @property
    def budget(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        return "max_tokens", self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs
