"""POST /v1/systemone: closed questions about a state, answered with probabilities from one denoising pass."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dgemma.api import LLM
from dgemma.control.decide import HOLE, QUESTION, Question
from dgemma.control.decision import Decision
from dgemma.server.bodies import JsonRoute
from dgemma.server.common import service_of
from dgemma.server.errors import ApiError, invalid
from dgemma.server.schemas_systemone import Noul, Reading, SystemOneRequest, text_of
from dgemma.server.service import new_id
from dgemma.server.sse import ClientGone, unless_gone

router = APIRouter(route_class=JsonRoute, tags=["systemone"])
_ANY = "jev-latest"
_DIGITS = 6
Template = str | list[dict[str, str]]


@router.post("/v1/systemone", summary="Answer closed questions about a state with probabilities")
async def systemone(request: Request, body: SystemOneRequest) -> Response:
    service = service_of(request)
    if body.model not in (None, _ANY):
        service.check_model(str(body.model))
    llm, begun = service.llm, time.perf_counter()
    service.enter(1)
    seconds = None
    try:
        # One thread: reads take turns, and those whose client has gone before their turn never begin.
        work = asyncio.get_running_loop().run_in_executor(_readers(request), decide, llm, body)
        async with asyncio.timeout(service.config.timeout_s):
            answer = await unless_gone(request.receive, _wait(work))
        seconds = time.perf_counter() - begun
    except ClientGone:
        service.metrics.cancelled()
        return Response(status_code=499)
    except TimeoutError:
        limit = service.config.timeout_s
        raise ApiError(504, f"the reads were not done after {limit:g} s", code="timeout", reason="timeout") from None
    finally:
        service.leave(seconds)
    request.scope["state"]["tokens"] = [answer["usage"]["input_tokens"], 0]
    return JSONResponse({"id": new_id("sysone-"), "model": llm.name, **answer})


async def _wait(work: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    return await work


def _readers(request: Request) -> ThreadPoolExecutor:
    state = request.app.state
    if not hasattr(state, "readers"):
        state.readers = ThreadPoolExecutor(1, thread_name_prefix="dgemma-reads")
    readers: ThreadPoolExecutor = state.readers
    return readers


def decide(llm: LLM, body: SystemOneRequest) -> dict[str, Any]:
    """Answers and usage. Questions whose instructions have the answer's place are read as one text with the state."""
    how, state = body.dgemma or Reading(), text_of(body.state)
    if HOLE in state or QUESTION in state:
        raise invalid(f"the state must not have {HOLE} or {QUESTION} in it", "state")
    options: dict[str, Any] = {
        "draws": how.draws,
        "seed": how.seed,
        "temperature": how.temperature,
        "encoder": how.encoder,
    }
    found: dict[str, Decision] = {}
    tokens = len(llm.tokenizer.encode(state))
    clozes: list[Question] = []
    plain: list[Question] = []
    for name, asked in body.questions.items():
        cloze = HOLE in text_of(asked.instructions)
        text = asked.text(cloze)
        if QUESTION in text or (HOLE in text and not cloze):
            raise invalid(f"criteria and instructions must not have {QUESTION} in them", f"questions.{name}")
        if how.joint and not cloze:
            raise invalid(f"joint needs {HOLE} in the instructions of every question", f"questions.{name}.instructions")
        tokens += len(llm.tokenizer.encode(text))
        plain_question = asked.question(name)
        one = Question(plain_question.kind, plain_question.labels, text, name, plain_question.values)
        (clozes if cloze else plain).append(one)
    for template, questions in ((f"{state}\n\n{QUESTION}", clozes), (_asking(llm, state), plain)):
        if questions:
            decisions = llm.decide(template, questions, joint=how.joint, **options)
            found |= {decision.question.name: decision for decision in decisions}
    answers = {name: _answer(asked, found[name]) for name, asked in body.questions.items()}
    facts = {"draws": how.draws, "seed": how.seed, "answers": {name: _facts(found[name]) for name in body.questions}}
    return {"answers": answers, "usage": {"input_tokens": tokens, "output_tokens": 0}, "dgemma": facts}


def _asking(llm: LLM, state: str) -> Template:
    """How a question stands behind the state: as a user's message if the model knows conversations."""
    if llm.chat_template is None:
        return f"{state}\n\n{QUESTION}\nAnswer: {HOLE}\n"
    user = {"role": "user", "content": f"{state}\n\n{QUESTION}"}
    return [user, {"role": "assistant", "content": HOLE}]


def _answer(asked: Any, decision: Decision) -> dict[str, Any]:
    """In the public shape."""
    values = [round(value, _DIGITS) for value in decision.probabilities.values()]
    if isinstance(asked, Noul):
        return {"type": "noul", "noul": values[0]}
    peak, count = max(decision.probabilities.values()), len(values)
    confidence = round((count * peak - 1) / (count - 1), _DIGITS)
    if asked.type == "choice":
        options = list(asked.criteria)
        chosen = options[list(decision.probabilities).index(decision.answer)]
        told = dict(zip(options, values, strict=True))
        return {"type": "choice", "choice": chosen, "probabilities": told, "confidence": confidence}
    assert decision.value is not None
    return {
        "type": "score",
        "score": round(decision.value, _DIGITS),
        "legend": {str(number): told for number, told in enumerate(asked.criteria)},
        "probabilities": {str(number): value for number, value in enumerate(values)},
        "confidence": confidence,
    }


def _facts(decision: Decision) -> dict[str, Any]:
    """What the public shape has no place for, by the words that were read."""
    told: dict[str, Any] = {
        "spread": {word: round(value, _DIGITS) for word, value in decision.spread.items()},
        "mass": round(decision.mass, _DIGITS),
        "temperature": decision.temperature,
    }
    if decision.encoder is not None:
        told["encoder"] = {word: round(value, _DIGITS) for word, value in decision.encoder.items()}
    return told
