"""POST /v1/infill and POST /v1/edit: texts with holes, and texts of which a part is written anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dgemma.control.template import Hole, Template
from dgemma.engine.infilling import Answered, Filling, Infilled
from dgemma.errors import RequestError
from dgemma.server.bodies import JsonRoute
from dgemma.server.choice import Wanted
from dgemma.server.common import note, service_of
from dgemma.server.errors import ApiError, invalid
from dgemma.server.job import Answer, Job
from dgemma.server.params import blamed, overrides
from dgemma.server.schemas import Sampling
from dgemma.server.schemas_infill import EditRequest, InfillRequest
from dgemma.server.service import Service, new_id
from dgemma.server.sse import ClientGone, unless_gone

router = APIRouter(route_class=JsonRoute, tags=["infill"])
T = TypeVar("T")
_EDIT = ("spans", "doubt", "instruction", "keep_prefix", "keep_suffix", "resize", "candidates")
_INFILL = ("candidates", "most")


@router.post("/v1/infill", summary="Fill the holes of a text")
async def infill(request: Request, body: InfillRequest) -> Response:
    options = {"prompt": body.prompt, "candidates": body.candidates, "most": body.most, "truncate": body.truncate}
    return await _answered(request, body, body.text, options, _filled)


@router.post("/v1/edit", summary="Write parts of a text anew and keep the rest")
async def edit(request: Request, body: EditRequest) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    values, names = overrides(body, ("text", None))
    own = ("prompt", "candidates", "truncate", "doubt", "by", "instruction", "keep_prefix", "keep_suffix", "resize")
    options = {name: getattr(body, name) for name in own}
    spans = None if body.spans is None else [(span.start, span.end) for span in body.spans]
    llm = service.llm
    editing = await _planned(
        service,
        lambda: llm.filler.editing(llm.generation, body.text, spans=spans, **options, **values),
        names | {name: name for name in _EDIT},
        values,
    )
    found = await search(request, editing.filling, body.text)
    if found is None:
        return Response(status_code=499)
    filled, usage = found
    edited = editing.result(filled)
    told = {
        "text": edited.text,
        "changes": [asdict(change) for change in edited.changes],
        "logprob": edited.logprob,
        "before": edited.before,
        "doubted": [{"start": start, "end": end, "logprob": value} for (start, end), value in edited.doubted],
        "truncated": edited.truncated,
    }
    return JSONResponse(_frame(service, "edit", filled, usage) | told)


async def suffixed(
    request: Request, body: Sampling, prompt: str, suffix: str, budget: tuple[str, int | None]
) -> Response:
    """A completion with text behind it, as /v1/completions tells it."""
    # Code begins and ends with whatever spaces it likes.
    template = Template((prompt, suffix), (Hole(high=budget[1], tight=False),))

    def completion(filled: Infilled) -> dict[str, Any]:
        choice = {"index": 0, "text": filled.fills[0], "logprobs": None, "finish_reason": "stop"}
        return {"object": "text_completion", "choices": [choice]}

    return await _answered(request, body, template, {}, completion, "suffix")


async def _answered(
    request: Request,
    body: Sampling,
    text: str | Template,
    options: Mapping[str, Any],
    told: Callable[[Infilled], dict[str, Any]],
    field: str = "text",
) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    values, names = overrides(body, (field, None))
    llm = service.llm
    filling = await _planned(
        service,
        lambda: llm.filler.infilling(llm.generation, text, **options, **values),
        names | {name: name for name in _INFILL},
        values,
        field,
    )
    found = await search(request, filling, text if isinstance(text, str) else text.written)
    if found is None:
        return Response(status_code=499)
    return JSONResponse(_frame(service, "infill", *found) | told(found[0]))


async def _planned(
    service: Service, plan: Callable[[], T], names: Mapping[str, str], values: Mapping[str, Any], field: str = "text"
) -> T:
    """What `plan` gives, beside the event loop: it tokenises, and may read the text; its faults name their fields."""
    service.enter(1)
    try:
        return await asyncio.to_thread(plan)
    except RequestError as error:
        fault = blamed(error, names, values)
        raise fault if fault.param else invalid(str(error), field) from None
    finally:
        service.leave(None)


async def search(request: Request, filling: Filling, text: str) -> tuple[Infilled, dict[str, Any]] | None:
    """Run a search; its answers go through the engine as any client's do. None if the client has gone."""
    service = service_of(request)
    name, begun, steps, passes = new_id("infill-"), time.perf_counter(), 0, 0
    while requests := filling.requests():
        if len(requests) > service.capacity:
            raise invalid(f"this server takes at most {service.capacity} candidates", "candidates")
        job = Job(service, name, requests, [text] * len(requests), Wanted(top=0))
        note(request, job)
        try:
            async with job:
                answers = await unless_gone(request.receive, job.answers())
        except ClientGone:
            service.metrics.cancelled()
            return None
        taken = [_read(answer, job, number) for number, answer in enumerate(answers)]
        steps += sum(sum(one.steps) for one in taken)
        passes += sum(choice.forward_passes for choice in job.choices)
        try:
            filling.take(taken)
        except RequestError as error:
            raise ApiError(400, str(error), param="text", code="no_fill") from None
    filled = filling.result()
    usage = {
        "prompt_tokens": len(filled.prompt_token_ids),
        "completion_tokens": len(filled.token_ids),
        "total_tokens": len(filled.prompt_token_ids) + len(filled.token_ids),
        "dgemma": {
            "candidates": len(filled.candidates),
            "denoising_steps": steps,
            "forward_passes": passes,
            "seconds": round(time.perf_counter() - begun, 4),
        },
    }
    request.scope["state"]["tokens"] = [usage["prompt_tokens"], usage["completion_tokens"]]
    return filled, usage


def _read(answer: Answer, job: Job, number: int) -> Answered:
    end = job.choices[number].end
    assert end is not None
    return Answered(
        tuple(score.token for score in answer.scores), tuple(score.logprob for score in answer.scores), end.steps
    )


def _filled(filled: Infilled) -> dict[str, Any]:
    shown: Sequence[str] = ("lengths", "fills", "logprob", "flaw", "steps")
    return {
        "text": filled.text,
        "fills": filled.fills,
        "logprob": filled.logprob,
        "candidates": [{name: getattr(one, name) for name in shown} for one in filled.candidates],
        "ignored": filled.ignored,
        "truncated": filled.truncated,
    }


def _frame(service: Service, kind: str, filled: Infilled, usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": new_id(f"{kind}-"),
        "object": kind,
        "created": int(time.time()),
        "model": service.llm.name,
        "system_fingerprint": service.fingerprint,
        "usage": usage,
        "dgemma": {"seed": filled.seed, "mode": "diffusion", "approximate": filled.approximate},
    }
