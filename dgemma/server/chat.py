"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from dgemma.server.bodies import JsonRoute
from dgemma.server.choice import TokenScore, Told
from dgemma.server.common import (
    Lines,
    confidence_of,
    frame_of,
    logprob_entries,
    respond,
    service_of,
    wanted,
    wants_usage,
)
from dgemma.server.errors import invalid
from dgemma.server.job import Answer, Job
from dgemma.server.params import encoded_chat, overrides, requests
from dgemma.server.schemas_chat import ChatRequest
from dgemma.server.service import Service, new_id
from dgemma.server.sse import DONE, event
from dgemma.server.structured import constrain

router = APIRouter(route_class=JsonRoute, tags=["chat"])


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    template = thinking(service, body.reasoning_effort, "reasoning_effort")
    messages = [message.plain() for message in body.messages]
    ids = await encoded_chat(service.llm, messages, template)
    values, names = overrides(body, body.budget)
    await constrain(service.llm, body, values, names)
    want = wanted(body, thoughts=True, top=body.top)
    asked = requests(
        service.llm, [ids], values, names, count=body.n or 1, watch=want.drafts or want.record, top=body.top
    )
    job = Job(service, new_id("chatcmpl-"), asked, [messages[-1]["content"]] * len(asked), want)
    created = int(time.time())
    return await respond(
        request,
        body,
        job,
        lambda job, answers: _whole(job, answers, created),
        lambda job: _events(job, created, wants_usage(body)),
    )


def thinking(service: Service, effort: str | None, field: str) -> dict[str, Any]:
    """The template's switch for thinking aloud, or a 400 where it has none."""
    if effort in (None, "none"):
        return {}
    template = service.llm.chat_template
    if template is None or "enable_thinking" not in template.source:
        raise invalid(f"{field}: the chat template of this model has no switch for thinking (allowed: 'none')", field)
    return {"enable_thinking": True}


def _whole(job: Job, answers: Sequence[Answer], created: int) -> dict[str, Any]:
    choices = []
    for index, answer in enumerate(answers):
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        logprobs = None if job.wanted.top is None else _logprobs(job, answer.scores)
        choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}
        choices.append(choice | confidence_of(job, answer.sure))
    return frame_of(job, "chat.completion", created) | {"choices": choices, "usage": job.usage, "dgemma": job.facts}


def _logprobs(job: Job, scores: Sequence[TokenScore]) -> dict[str, Any]:
    return {"content": logprob_entries(job.service, scores), "refusal": None}


async def _events(job: Job, created: int, usage: bool) -> AsyncGenerator[bytes]:
    frame = frame_of(job, "chat.completion.chunk", created)
    lines = Lines(job)

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**frame, "choices": choices, **({"usage": None} if usage else {}), **more})

    for index in range(len(job.choices)):
        delta = {"role": "assistant", "content": "", "refusal": None}
        begin = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        yield chunk(begin, dgemma=job.facts)
    async for item in job.items():
        if isinstance(item, Told):
            for line in lines.of(item):
                yield chunk([], dgemma=line)
            continue
        delta = {}
        if item.thought:
            delta["reasoning_content"] = item.thought
        if item.text:
            delta["content"] = item.text
        logprobs = _logprobs(job, item.scores) if item.scores else None
        if delta or logprobs or item.sure:
            choice = {"index": item.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            yield chunk([choice | (confidence_of(job, item.sure) if item.sure else {})])
        if item.finish:
            yield chunk([{"index": item.index, "delta": {}, "logprobs": None, "finish_reason": item.finish}])
    if usage:
        yield event({**frame, "choices": [], "usage": job.usage})
    yield DONE
