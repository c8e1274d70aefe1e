"""What the request schemas share: strict types, fields that have one value only, and the fields of generation.

A field is honoured or refused with a reason, never ignored. Knows no engine: meanings are in `params`.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

MAX_STOPS = 4
MAX_STOP_LENGTH = 1000
INT64 = 2**63


def accepted() -> Any:
    """A field that concerns the client's own books."""
    return Field(None, description="Accepted; has no influence on the answer.")


def fault(message: str) -> PydanticCustomError:
    """What a validator raises; the message begins behind the field's name."""
    # A template of one hole: braces in a client's value are no holes.
    return PydanticCustomError("not_supported", "{message}", {"message": message})  # type: ignore[arg-type]


def fault_of(field: str, message: str) -> PydanticCustomError:
    """The same from a validator of the whole body."""
    return PydanticCustomError("not_supported", "{message}", {"message": message, "field": field})  # type: ignore[arg-type]


def only(*allowed: Any, why: str) -> Any:
    """A field that may be absent, null or one of `allowed`: anything else would have to be ignored."""
    return Field(None, description=f"{why[:1].upper()}{why[1:]}.", json_schema_extra={"enum": [None, *allowed]})


def described(schema: dict[str, Any], default: Any = None, **field: Any) -> Any:
    """A field that a validator of its own reads, and what OpenAPI is to say of it."""

    def replace(generated: dict[str, Any]) -> None:
        kept: dict[str, Any] = {name: generated[name] for name in ("title", "description") if name in generated}
        generated.clear()
        generated.update(kept | schema)

    return Field(default, json_schema_extra=replace, **field)


class Strict(BaseModel):
    """No unknown fields, no conversions, no infinite numbers, and nothing but their few values in `only` fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _allowed_only(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or "enum" not in extra:
            return value
        allowed = cast(list[Any], extra["enum"])
        if any(type(value) is type(one) and value == one for one in allowed):
            return value
        why = (field.description or "").removesuffix(".")
        raise fault(f"{why[:1].lower()}{why[1:]} (allowed: {json.dumps(allowed)[1:-1]})")


def _stops(value: Any) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise fault("must be null, a text or a list of texts")
    if len(texts) > MAX_STOPS:
        raise fault(f"takes at most {MAX_STOPS} texts, got {len(texts)}")
    for text in texts:
        if not 0 < len(text) <= MAX_STOP_LENGTH:
            raise fault(f"a stop text has 1 to {MAX_STOP_LENGTH} characters, got {len(text)}")
    return texts


_TEXTS = {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}
_STOPS: dict[str, Any] = {"anyOf": [{"type": "string"}, _TEXTS, {"type": "null"}]}


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fault("must be an object of token id to bias")
    result = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            raise fault(f"the keys are token ids, got {token[:40]!r}")
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not number or not -100 <= bias <= 100:
            raise fault(f"the bias of token {token} must be a number in -100..100, got {bias!r:.40}")
        result[int(token)] = float(bias)
    return result


_BIAS: dict[str, Any] = {
    "anyOf": [
        {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        {"type": "null"},
    ]
}


def read_format(value: Any) -> Any:
    """`{"type": "text" | "json_object"}`, or a JSON Schema as chat completions or responses write it, as
    `{"type": "json_schema", "schema": ..}`."""
    if value is None or value in ({"type": "text"}, {"type": "json_object"}):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "json_schema":
        raise fault(f"must be of type text, json_object or json_schema, got {value if kind is None else kind!r:.60}")
    inner = value["json_schema"] if "json_schema" in value else {key: value[key] for key in value if key != "type"}
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict | bool):
        raise fault("needs a json_schema with a schema")
    for name in ({*value} - {"type", "json_schema"} if "json_schema" in value else {*inner}) - _FORMAT_FIELDS:
        raise fault(f"unknown field {name!r:.40}")
    for name in {*inner} - _FORMAT_FIELDS:
        raise fault(f"unknown field {name!r:.40} in json_schema")
    return {"type": "json_schema", **inner}


# Every answer holds to its schema, so `strict` says nothing more.
_FORMAT_FIELDS = frozenset(("name", "description", "schema", "strict"))
FORMAT: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
            "required": ["type"],
        },
        {"type": "null"},
    ]
}


class Extension(Strict):
    """What only a diffusion model has; every field left out stays as the checkpoint has it."""

    mode: Literal["diffusion", "ar", "verified"] | None = None
    """Write by canvases, token by token with the encoder, or the latter with canvases as drafts."""
    verify_draft: Literal["argmax", "sample"] | None = None
    """Mode `verified`: a draft's tokens are the likeliest, or drawn."""
    verify_pace: Literal["adaptive", "fixed"] | None = None
    """Mode `verified`: draft as it pays, or always."""
    steps: int | None = Field(None, ge=1)
    """At most so many denoising steps a canvas."""
    canvas_length: int | None = Field(None, ge=1)
    """Positions of a canvas."""
    narrow: Literal["auto", "never", "short", "adaptive"] | None = None
    """When a canvas is narrower than that."""
    sampler: str | None = None
    """`entropy_bound`, `confidence` or `ancestral`."""
    entropy_bound: float | None = None
    """Nats that one step's accepted positions may sum to."""
    accept_confidence: float | None = None
    """Sampler `confidence`: the least probability."""
    t_min: float | None = None
    """Temperature that the last step comes close to."""
    t_max: float | None = None
    """Temperature of the first step."""
    stability_threshold: int | None = None
    """Steps without change before a canvas may stop; null switches the rule off."""
    confidence_threshold: float | None = None
    """Mean entropy in nats below which a canvas may stop; null switches the rule off."""
    convention: Literal["hf", "jax"] | None = None
    """Stop and commit as one or the other reference does."""
    trace: bool = False
    """Record every step; the trace is at /v1/traces/{id} afterwards."""
    confidence: bool = False
    """Tell how sure the canvas was of each token; not in /v1/responses."""


class StreamOptions(Strict):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    """One more chunk with the usage at the end."""
    include_canvas: bool | None = None
    """Chunks without choices whose `dgemma.line` is a line of the trace format: every denoising step."""
    include_obfuscation: Any = only(False, why="chunks are not padded with random text")


class Sampling(Strict):
    """The fields of generation that all three routes have."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    """Scales the draw only; 0 draws the most likely token. The schedule is `dgemma.t_min` and `dgemma.t_max`."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Draw from the most likely tokens of this total probability."""
    top_k: int | None = Field(None, ge=0)
    """Draw from the k most likely tokens; 0 is all. No field of OpenAI's."""
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    """The same seed gives the same answer; left out, a random one is used and told."""
    stream: bool | None = None
    dgemma: Extension | None = None
    user: str | None = accepted()


class Penalised(Sampling):
    """The fields that chat completions and completions share beyond these."""

    n: int | None = Field(None, ge=1, le=128)
    """Answers to each prompt."""
    stop: list[str] = described(_STOPS, [])
    """Texts that end the answer and are no part of it."""
    logit_bias: dict[int, float] = described(_BIAS, {})
    """Token id to what is added to its logit; -100 bans it."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Counts tokens of committed canvases of the answer."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Counts tokens of committed canvases of the answer."""
    max_tokens: int | None = Field(None, ge=1)
    """At most so many tokens."""
    stream_options: StreamOptions | None = None
    response_format: Any = described(FORMAT)
    """Text, any JSON object, or JSON that fits a schema."""
    guided_json: dict[str, Any] | bool | str | None = None
    """A JSON Schema (or its text) that the answer fits. The `guided_*` are no fields of OpenAI's."""
    guided_regex: str | None = None
    """A regular expression that the whole answer matches."""
    guided_choice: list[str] | None = Field(None, min_length=1)
    """Texts of which the answer is one."""
    guided_grammar: str | None = None
    """A grammar that the answer fits; its notation is in `docs/constraints.md`."""

    _read_format = field_validator("response_format", mode="before")(read_format)
    _read_stop = field_validator("stop", mode="before")(_stops)
    _read_bias = field_validator("logit_bias", mode="before")(_bias)

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fault_of("stream_options", "needs stream: true")
        return self
