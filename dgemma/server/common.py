"""What the answering routes share: run a job for a request, as one answer or as a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from dgemma.server.choice import TokenScore, Told, Wanted
from dgemma.server.job import Answer, Job
from dgemma.server.schemas import Sampling
from dgemma.server.service import Service
from dgemma.server.sse import ClientGone, EventStream, unless_gone
from dgemma.text.confidence import TokenConfidence
from dgemma.text.tokenizer import BROKEN
from dgemma.trace import TraceEncoder, finite


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def wanted(body: Sampling, *, thoughts: bool, top: int | None = None) -> Wanted:
    """What `body` asks to see."""
    options = getattr(body, "stream_options", None)
    return Wanted(
        stops=tuple(getattr(body, "stop", ())),
        thoughts=thoughts,
        top=top,
        drafts=bool(options and getattr(options, "include_canvas", None)),
        record=bool(body.dgemma and body.dgemma.trace),
        confidence=bool(body.dgemma and body.dgemma.confidence),
    )


def wants_usage(body: Sampling) -> bool:
    options = getattr(body, "stream_options", None)
    return bool(options and options.include_usage)


async def respond(
    request: Request,
    body: Sampling,
    job: Job,
    whole: Callable[[Job, Sequence[Answer]], dict[str, Any]],
    events: Callable[[Job], AsyncGenerator[bytes]],
) -> Response:
    """The answer of a job: the object that `whole` makes of it, or the stream of `events`."""
    service = service_of(request)
    note(request, job)
    if body.stream:
        await job.__aenter__()
        return EventStream(counted(request, job, events(job)), job, service.config.timeout_s, service.metrics.cancelled)
    try:
        async with job:
            answers = await unless_gone(request.receive, job.answers())
    except ClientGone:
        service.metrics.cancelled()
        return Response(status_code=499)
    count(request, job)
    return JSONResponse(whole(job, answers))


async def counted(request: Request, job: Job, events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events, with the tokens noted for the log at the end."""
    try:
        async for data in events:
            yield data
    finally:
        await events.aclose()
        count(request, job)


def note(request: Request, job: Job) -> None:
    """For the log: the prompt, where the server may tell it."""
    if job.service.config.log_prompts:
        request.scope["state"]["prompt"] = [choice.header.prompt for choice in job.choices if not choice.config.choice]


def count(request: Request, job: Job) -> None:
    usage = job.usage
    request.scope["state"]["tokens"] = [usage["prompt_tokens"], usage["completion_tokens"]]


def frame_of(job: Job, kind: str, created: int) -> dict[str, Any]:
    """What every object and chunk of an answer carries; `kind` is its `object`."""
    service = job.service
    return {
        "id": job.name,
        "object": kind,
        "created": created,
        "model": service.llm.name,
        "system_fingerprint": service.fingerprint,
    }


class Lines:
    """The trace lines of watched answers, as the `dgemma` of a chunk."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoders: dict[int, TraceEncoder] = {}

    def of(self, told: Told) -> list[dict[str, Any]]:
        """The line of a moment, behind the header if it is the first."""
        lines = []
        encoder = self._encoders.get(told.index)
        if encoder is None:
            header = self._job.choices[told.index].header
            encoder = self._encoders[told.index] = TraceEncoder(header, self._job.service.piece)
            lines.append(encoder.header)
        lines.append(encoder.line(told.moment))
        return [{"index": told.index, "line": line} for line in lines]


def token_text(service: Service, token: int) -> tuple[str, list[int] | None]:
    """A token as text, and its bytes where it is one or more whole characters."""
    text = service.llm.tokenizer.decode_after([token], skip_special=False)
    return text, None if BROKEN in text else list(text.encode())


def confidence_of(job: Job, sure: Sequence[TokenConfidence]) -> dict[str, Any]:
    """What a choice carries beside OpenAI's fields: `dgemma.confidence`, for who asked."""
    if not job.wanted.confidence:
        return {}
    texts = ({"text": token_text(job.service, one.token)[0]} for one in sure)
    numbers = ({"entropy": finite(one.entropy), "top_logprob": finite(one.top_logprob)} for one in sure)
    told = [asdict(one) | text | nats for one, text, nats in zip(sure, texts, numbers, strict=True)]
    return {"dgemma": {"confidence": told}}


def logprob_entries(
    service: Service, scores: Sequence[TokenScore], no_bytes: list[int] | None = None
) -> list[dict[str, Any]]:
    """OpenAI's `logprobs` of tokens; `canvas_logprob` is ours. `no_bytes` stands for those of part of a character."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(service, token)
        return {"token": text, "logprob": logprob, "bytes": no_bytes if data is None else data}

    return [
        entry(score.token, score.logprob)
        | {"top_logprobs": [entry(*pair) for pair in score.top], "canvas_logprob": score.canvas_logprob}
        for score in scores
    ]
