"""POST /v1/responses: the part of it that text needs, whole or as typed events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from itertools import count
from typing import Any

from fastapi import APIRouter, Request, Response

from dgemma.server.bodies import JsonRoute
from dgemma.server.chat import thinking
from dgemma.server.choice import TokenScore, Told
from dgemma.server.common import logprob_entries, respond, service_of, wanted
from dgemma.server.errors import invalid
from dgemma.server.job import Answer, Job
from dgemma.server.params import encoded_chat, overrides, requests
from dgemma.server.schemas_responses import ResponsesRequest
from dgemma.server.service import new_id
from dgemma.server.sse import event
from dgemma.server.structured import constrain

router = APIRouter(route_class=JsonRoute, tags=["responses"])


@router.post("/v1/responses", summary="Answer a conversation, in OpenAI's newer schema")
async def responses(request: Request, body: ResponsesRequest) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    template = thinking(service, body.reasoning.effort if body.reasoning else None, "reasoning.effort")
    messages = body.messages
    ids = await encoded_chat(service.llm, messages, template, "input")
    if body.dgemma and body.dgemma.confidence:
        raise invalid("dgemma.confidence is told by /v1/chat/completions and /v1/completions", "dgemma.confidence")
    values, names = overrides(body, body.budget)
    await constrain(service.llm, body, values, names)
    want = wanted(body, thoughts=True, top=body.top)
    asked = requests(service.llm, [ids], values, names, watch=want.record, top=body.top)
    job = Job(service, new_id("resp_"), asked, [messages[-1]["content"]], want)
    made = _Response(job, body)
    return await respond(request, body, job, lambda job, answers: made.whole(answers), lambda job: made.events())


class _Response:
    """The response object of one job in its states."""

    def __init__(self, job: Job, body: ResponsesRequest) -> None:
        self._job, self._body, self._created = job, body, int(time.time())
        self._message, self._reasoning = new_id("msg_"), new_id("rs_")

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The finished response."""
        (answer,) = answers
        done = answer.finish != "length"
        status = "completed" if done else "incomplete"
        thought = [self.item(True, status, [text_part(True, answer.thought)])] if answer.thought else []
        usage = self._job.usage
        message = self.item(False, status, [text_part(False, answer.text, self.logprobs(answer.scores))])
        return self._object(status, [*thought, message]) | {
            "completed_at": int(time.time()) if done else None,
            "incomplete_details": None if done else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
                "dgemma": usage["dgemma"],
            },
        }

    async def events(self) -> AsyncGenerator[bytes]:
        """The response as it comes to be."""
        number = count()

        def tell(kind: str, **fields: Any) -> bytes:
            return event({"type": kind, "sequence_number": next(number), **fields}, kind)

        begun = self._object("in_progress", [])
        yield tell("response.created", response=begun)
        yield tell("response.in_progress", response=begun)
        answer, open_part = Answer(), _Part(self, tell)
        async for item in self._job.items():
            if isinstance(item, Told):
                continue
            answer.thought += item.thought
            answer.text += item.text
            answer.scores += item.scores
            answer.finish = item.finish or answer.finish
            if item.thought:
                for data in open_part.delta(True, item.thought):
                    yield data
            if item.text or item.scores:
                for data in open_part.delta(False, item.text, self.logprobs(item.scores)):
                    yield data
        if not (answer.text or answer.scores):
            for data in open_part.delta(False, ""):
                yield data
        status = "completed" if answer.finish != "length" else "incomplete"
        for data in open_part.close(status):
            yield data
        yield tell(f"response.{status}", response=self.whole([answer]))

    def _object(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        job, body, config = self._job, self._body, self._job.choices[0].config
        return {
            "id": job.name,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": job.service.llm.name,
            "output": output,
            "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": config.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": config.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            "dgemma": job.facts,
            "system_fingerprint": job.service.fingerprint,
        }

    def logprobs(self, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        return logprob_entries(self._job.service, scores, no_bytes=[])  # this schema has no null there

    def item(self, thinks: bool, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """An item of the output: a thought or the message."""
        if thinks:
            return {"id": self._reasoning, "type": "reasoning", "status": status, "summary": [], "content": content}
        return {"id": self._message, "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(thinks: bool, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The one part of an item."""
    if thinks:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


class _Part:
    """The events of the output's items, one after the other: first the thought, then the message."""

    def __init__(self, response: _Response, tell: Any) -> None:
        self._response, self._tell = response, tell
        self._thinks: bool | None = None
        self._index = -1
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def delta(self, thinks: bool, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[bytes]:
        """More text of a thought or of the message; opens and closes items as needed."""
        data = []
        if self._thinks is not thinks:
            data += self.close("completed")
            self._thinks, self._text = thinks, ""
            self._index += 1
            item = self._response.item(thinks, "in_progress", [])
            data.append(self._tell("response.output_item.added", output_index=self._index, item=item))
            data.append(self._tell("response.content_part.added", part=text_part(thinks, ""), **self._place))
        self._text += text
        self._logprobs += logprobs
        if text or logprobs:
            more: dict[str, Any] = {} if thinks else {"logprobs": list(logprobs)}
            data.append(self._tell(f"response.{self._kind}.delta", delta=text, **more, **self._place))
        return data

    def close(self, status: str) -> list[bytes]:
        """The end of the item that is open, if one is."""
        if self._thinks is None:
            return []
        part = text_part(self._thinks, self._text, self._logprobs)
        more: dict[str, Any] = {} if self._thinks else {"logprobs": self._logprobs}
        item = self._response.item(self._thinks, status, [part])
        return [
            self._tell(f"response.{self._kind}.done", text=self._text, **more, **self._place),
            self._tell("response.content_part.done", part=part, **self._place),
            self._tell("response.output_item.done", output_index=self._index, item=item),
        ]

    @property
    def _kind(self) -> str:
        return "reasoning_text" if self._thinks else "output_text"

    @property
    def _place(self) -> dict[str, Any]:
        item = self._response.item(bool(self._thinks), "", [])["id"]
        return {"item_id": item, "output_index": self._index, "content_index": 0}
