"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from dgemma.server.bodies import JsonRoute
from dgemma.server.choice import TokenScore, Told
from dgemma.server.common import Lines, confidence_of, frame_of, respond, service_of, token_text, wanted, wants_usage
from dgemma.server.infill import suffixed
from dgemma.server.job import Answer, Job
from dgemma.server.params import encoded_prompt, overrides, requests
from dgemma.server.schemas_completions import CompletionRequest
from dgemma.server.service import Service, new_id
from dgemma.server.sse import DONE, event
from dgemma.server.structured import constrain

router = APIRouter(route_class=JsonRoute, tags=["completions"])


@router.post("/v1/completions", summary="Go on from a text")
async def completions(request: Request, body: CompletionRequest) -> Response:
    service = service_of(request)
    service.check_model(body.model)
    if body.suffix:
        return await suffixed(request, body, str(body.prompt[0]), body.suffix, body.budget)
    llm, count = service.llm, body.n or 1
    prompts = [await encoded_prompt(llm, prompt) for prompt in body.prompt]
    values, names = overrides(body, body.budget)
    await constrain(llm, body, values, names)
    want = wanted(body, thoughts=False, top=body.top)
    asked = requests(llm, prompts, values, names, count=count, watch=want.drafts or want.record, top=body.top)
    # Not before: only now all ids are known to be of the vocabulary.
    texts = [prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt) for prompt in body.prompt]
    job = Job(service, new_id("cmpl-"), asked, [text for text in texts for _ in range(count)], want)
    created = int(time.time())
    return await respond(
        request,
        body,
        job,
        lambda job, answers: _whole(job, answers, created),
        lambda job: _events(job, created, wants_usage(body)),
    )


def _whole(job: Job, answers: Sequence[Answer], created: int) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": answer.text,
            "logprobs": None if job.wanted.top is None else logprobs(job.service, answer.scores, 0),
            "finish_reason": answer.finish,
        }
        | confidence_of(job, answer.sure)
        for index, answer in enumerate(answers)
    ]
    return frame_of(job, "text_completion", created) | {"choices": choices, "usage": job.usage, "dgemma": job.facts}


async def _events(job: Job, created: int, usage: bool) -> AsyncGenerator[bytes]:
    frame, lines = frame_of(job, "text_completion", created), Lines(job)
    offsets = [0] * len(job.choices)

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**frame, "choices": choices, **({"usage": None} if usage else {}), **more})

    # A first chunk without text, so that the seed is known before the drafts.
    yield chunk([{"index": 0, "text": "", "logprobs": None, "finish_reason": None}], dgemma=job.facts)
    async for item in job.items():
        if isinstance(item, Told):
            for line in lines.of(item):
                yield chunk([], dgemma=line)
            continue
        scored = logprobs(job.service, item.scores, offsets[item.index]) if item.scores else None
        offsets[item.index] += sum(len(text) for text in scored["tokens"]) if scored else 0
        choice = {"index": item.index, "text": item.text, "logprobs": scored, "finish_reason": item.finish}
        yield chunk([choice | (confidence_of(job, item.sure) if item.sure else {})])
    if usage:
        yield event({**frame, "choices": [], "usage": job.usage})
    yield DONE


def logprobs(service: Service, scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
    """OpenAI's `logprobs` of completions, the text beginning at `offset`; `canvas_logprobs` is ours."""
    tokens = [token_text(service, score.token)[0] for score in scores]
    starts = []
    for text in tokens:
        starts.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [{token_text(service, token)[0]: logprob for token, logprob in score.top} for score in scores],
        "text_offset": starts,
        "canvas_logprobs": [score.canvas_logprob for score in scores],
    }
