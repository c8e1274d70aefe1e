"""The fields of a request as what the engine takes, and the engine's complaints as faults of those fields."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma.api import LLM
from dgemma.engine import Request
from dgemma.engine.request import canvas_widths
from dgemma.errors import RequestError
from dgemma.server.errors import ApiError, invalid
from dgemma.server.schemas import Penalised, Sampling
from dgemma.server.service import new_seed

_SAME = ("temperature", "top_p", "top_k", "seed")
_PENALTIES = ("presence_penalty", "frequency_penalty")
_RENAMED = {"steps": "max_denoising_steps"}
_NULL_MEANS_OFF = ("stability_threshold", "confidence_threshold")
_LONG_TEXT = 4000  # characters from which tokenising leaves the event loop


def overrides(body: Sampling, budget: tuple[str, int | None]) -> tuple[dict[str, Any], dict[str, str]]:
    """Generation parameters that `body` sets, and for each of them the name of its field."""
    values: dict[str, Any] = {"seed": new_seed()}
    names: dict[str, str] = {}

    def put(name: str, value: Any, field: str) -> None:
        values[name], names[name] = value, field

    for name in (*_SAME, *(_PENALTIES if isinstance(body, Penalised) else ())):
        if getattr(body, name) is not None:
            put(name, getattr(body, name), name)
    if isinstance(body, Penalised) and body.logit_bias:
        put("logit_bias", tuple(sorted(body.logit_bias.items())), "logit_bias")
    if budget[1] is not None:
        put("max_new_tokens", budget[1], budget[0])
    if body.dgemma is not None:
        for name in body.dgemma.model_fields_set - {"trace", "confidence"}:
            value = getattr(body.dgemma, name)
            if value is not None or name in _NULL_MEANS_OFF:
                put(_RENAMED.get(name, name), value, f"dgemma.{name}")
    return values, {"max_new_tokens": budget[0]} | names


def requests(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    values: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    count: int = 1,
    watch: bool = False,
    top: int | None = None,
) -> list[Request]:
    """`count` requests for each prompt, or a 400 that names the field at fault."""
    found = []
    for prompt in prompts:
        chosen = dict(values)
        if "max_new_tokens" not in values:
            chosen["max_new_tokens"] = _fitting_budget(llm, len(prompt), values, names)
        for choice in range(count):
            try:
                found.append(llm.request(prompt, watch=watch, logprobs=top, choice=choice, **chosen))
            except RequestError as error:
                raise blamed(error, names, chosen) from None
    return found


def _fitting_budget(llm: LLM, prompt: int, values: Mapping[str, Any], names: Mapping[str, str]) -> int:
    """The checkpoint's budget, or what whole canvases leave of the context behind a long prompt."""
    usual = llm.generation.max_new_tokens
    try:
        config = llm.generation.with_(**{name: value for name, value in values.items() if name != "regex"})
    except RequestError as error:
        raise blamed(error, names, values) from None
    width = 1 if config.mode != "diffusion" else canvas_widths(config, llm.config)[-1]
    room = max(0, llm.config.max_positions - prompt)
    return usual if room >= usual + width else max(1, min(usual, room // width * width))


def blamed(error: RequestError, names: Mapping[str, str], values: Mapping[str, Any]) -> ApiError:
    """The fault with the name of the field it is about, and parameters called as the client calls them."""
    text = str(error)
    if text.startswith("prompt (") or " positions; the model has " in text:
        asked = f"; {names['max_new_tokens']} is {values['max_new_tokens']}" if "max_new_tokens" in values else ""
        return invalid(f"{text}{asked}", names["max_new_tokens"], "context_length_exceeded")
    if text.startswith("prompt token"):
        return invalid(text, "prompt")
    fields = {"max_denoising_steps": "dgemma.steps", "sampler": "dgemma.sampler", **names}
    found = [(match.start(), name) for name in fields if (match := re.search(rf"\b{name}\b", text))]
    if not found:
        return invalid(text)
    field = fields[min(found)[1]]
    if field.rpartition(".")[2] != min(found)[1]:
        text = re.sub(rf"\b{min(found)[1]}\b", field.rpartition(".")[2], text)
    return invalid(text, field)


async def encoded_chat(
    llm: LLM, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any], field: str = "messages"
) -> list[int]:
    """Ids of a conversation, which stands in `field`; long ones are tokenised beside the event loop."""
    try:
        if sum(len(message["content"]) for message in messages) + 100 * len(messages) < _LONG_TEXT:
            return llm.encode_chat(messages, **template)
        return await asyncio.to_thread(llm.encode_chat, messages, **template)
    except RequestError as error:
        raise invalid(str(error), field) from None


async def encoded_prompt(llm: LLM, prompt: str | Sequence[int]) -> list[int]:
    """Ids of a plain prompt."""
    if not isinstance(prompt, str):
        return list(prompt)
    try:
        return (
            llm.encode_prompt(prompt)
            if len(prompt) < _LONG_TEXT
            else await asyncio.to_thread(llm.encode_prompt, prompt)
        )
    except RequestError as error:
        raise invalid(str(error), "prompt") from None
