"""Faults in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dgemma.errors import CapacityError, CheckpointError, DgemmaError, RequestError
from dgemma.server.logs import log_fault

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
_KINDS = {401: "authentication_error", 429: "rate_limit_exceeded", 504: "timeout_error"}
_MAX_MESSAGE = 1000


class ApiError(DgemmaError):
    """A fault with everything its answer says. `reason` is the word that metrics count it under."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        reason: str = "invalid",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or _CODES.get(status)
        self.reason, self.headers = reason, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What a client gets, in an answer or as an event of a stream."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = str(self)
        if len(message) > _MAX_MESSAGE:
            message = message[:_MAX_MESSAGE] + "…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's fault: 400."""
    return ApiError(400, message, param=param, code=code)


def draining() -> ApiError:
    """The server is about to stop; another one, or the same a little later, will do."""
    return ApiError(503, "the server is stopping", code="draining", reason="draining", headers={"Retry-After": "5"})


def full(message: str, retry_s: int) -> ApiError:
    return ApiError(429, message, code="engine_full", reason="full", headers={"Retry-After": str(retry_s)})


def broken() -> ApiError:
    """Our fault. What happened stands in the log."""
    return ApiError(500, "the server failed at this request", code="internal_error", reason="internal")


def as_api_error(error: BaseException) -> ApiError:
    """Any fault as one with an answer; what nobody foresaw is logged and becomes a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return invalid(str(error))
    if isinstance(error, CapacityError):
        return full(str(error), 1)
    if isinstance(error, CheckpointError):  # a chat template that does what it must not
        return invalid(str(error), "messages")
    log_fault(error)
    return broken()


def install(app: FastAPI) -> None:
    """Make every fault of `app` an answer in OpenAI's shape."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        fault = as_api_error(error)
        _count(request, fault)
        return fault.response()

    async def schema(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        fault = _from_validation(error.errors())
        _count(request, fault)
        return fault.response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        fault = ApiError(error.status_code, str(error.detail), headers=error.headers)
        if error.status_code == 404:
            fault = ApiError(404, f"there is nothing at {request.url.path[:200]!r}")
        _count(request, fault)
        return fault.response()

    app.add_exception_handler(DgemmaError, ours)
    app.add_exception_handler(RequestValidationError, schema)
    app.add_exception_handler(HTTPException, http)


def _count(request: Request, fault: ApiError) -> None:
    if fault.status != 404:
        request.app.state.service.metrics.rejected(fault.reason)


def param_name(path: Sequence[int | str]) -> str | None:
    """`("messages", 0, "content")` as `messages[0].content`."""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or None


def _from_validation(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first fault that a schema found, in one sentence."""
    fault = faults[0]
    path = [part for part in fault["loc"] if part != "body"]
    path += [fault["ctx"]["field"]] if "field" in fault.get("ctx", {}) else []
    param, kind, message = param_name(path), fault["type"], str(fault["msg"])
    if kind == "extra_forbidden":
        return invalid(f"unknown field {param!r}; this server refuses what it would have to ignore", param)
    if kind == "missing":
        return invalid(f"{param or 'the body'} is missing", param)
    if param is None:
        return invalid("the body must be a JSON object", None)
    if kind == "not_supported":
        return invalid(f"{param}: {message}", param)
    return invalid(f"{param}: {_decapitalised(message)}, got {_shown(fault.get('input'))}", param)


def _decapitalised(text: str) -> str:
    return re.sub("^Input should", "must", text) if text.startswith("Input") else text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
