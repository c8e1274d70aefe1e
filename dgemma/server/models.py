"""GET /v1/models, /health, /metrics and /v1/traces/{id}: what is served, how it is, what was recorded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from dgemma.diffusion.samplers import SAMPLERS
from dgemma.server.common import service_of
from dgemma.server.errors import ApiError
from dgemma.server.metrics import CONTENT_TYPE
from dgemma.server.schemas import Extension
from dgemma.server.service import Service

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="The model that is served")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(service_of(request))]}


@router.get("/v1/models/{name:path}", summary="The model by its name")
async def model(name: str, request: Request) -> dict[str, Any]:
    service = service_of(request)
    service.check_model(name)
    return _model(service)


@router.get("/v1/traces/{name}", summary="A recorded trace, as JSON lines")
async def trace(name: str, request: Request) -> Response:
    data = await service_of(request).traces.get(name)
    if data is None:
        raise ApiError(
            404,
            f"there is no trace {name[:80]!r}: not asked for (dgemma.trace), not complete yet or no longer kept",
            param="id",
            code="trace_not_found",
        )
    return Response(data, media_type="application/x-ndjson")


@router.get("/health", summary="Whether the server takes requests", tags=["server"])
async def health(request: Request) -> Response:
    service = service_of(request)
    if service.draining:
        return JSONResponse({"status": "draining"}, 503)
    return JSONResponse({"status": "ok", "model": service.llm.name})


@router.get("/metrics", summary="Numbers for Prometheus", tags=["server"])
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE)


def _model(service: Service) -> dict[str, Any]:
    llm = service.llm
    values = asdict(llm.generation)
    own = [name for name in Extension.model_fields if name != "confidence"]  # no setting: it changes no answer
    fields = ("max_new_tokens", "temperature", "top_p", "top_k", *own)
    values |= {"steps": values["max_denoising_steps"], "trace": False}
    return {
        "id": llm.name,
        "object": "model",
        "created": service.created,
        "owned_by": "dgemma",
        "dgemma": {
            "canvas_length": llm.config.canvas_length,
            "canvas_widths": list(llm.config.canvas_widths),
            "max_positions": llm.config.max_positions,
            "vocab_size": llm.config.vocab_size,
            "chat": llm.chat_template is not None,
            "demo": llm.demo,
            "samplers": list(SAMPLERS),
            "generation": {name: values[name] for name in fields},
            "blank": list(llm.generation.blank_tokens),
        },
    }
