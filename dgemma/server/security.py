"""The gate before every route: request ids, names, keys, limits of the body, one log line a request.

Plain ASGI, so that streams pass through as they are. Knows no schemas.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma.server.errors import ApiError, draining
from dgemma.server.logs import log, log_fault
from dgemma.server.service import Service

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_OPEN = ("/", "/health", "/metrics", "/docs", "/openapi.json")
_ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/infill", "/v1/edit", "/v1/systemone", "/v1/models",
    *_OPEN,
)  # fmt: skip
_TEMPLATES = (("/v1/models/", "/v1/models/{id}"), ("/v1/traces/", "/v1/traces/{id}"), ("/page/", "/page/{name}"))
_GONE = 499
_BODY_S = 60.0  # for the whole body to arrive


class Gate:
    """Lets in whoever may come in, and notes how it went."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = [key.encode() for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, begun, route = Headers(scope=scope), time.perf_counter(), route_of(scope["path"])
        state = scope.setdefault("state", {})
        given = headers.get("x-request-id", "")
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            await send(message)

        metrics = self._service.metrics
        metrics.started(route)
        try:
            fault = self._refusal(scope["path"], headers)
            if fault is not None:
                metrics.rejected(fault.reason)
                await fault.response()(scope, receive, noted)
            else:
                await self._app(scope, self._limited(receive), noted)
        except Exception as error:
            status = status or 500
            log_fault(error)
            raise
        finally:
            seconds = time.perf_counter() - begun
            status = state.get("status", status) or _GONE
            metrics.finished(route, status, seconds)
            fields = {name: state[name] for name in ("tokens", "prompt") if name in state}
            log(id=state["request_id"], route=route, status=status, ms=round(1000 * seconds, 1), **fields)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        host = headers.get("host")  # a browser always sends one
        if host is not None and not self._service.config.answers_to(host):
            return ApiError(
                421,
                f"this server is not called {host[:200]!r}; it answers to localhost, 127.0.0.1, [::1] and to what "
                "--allowed-host names",
                code="host_not_allowed",
                reason="host",
            )
        if path in _OPEN or path.startswith("/page/"):
            return None
        if not self._knows(headers.get("authorization", "")):
            return ApiError(
                401,
                "this server needs an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                reason="key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._service.draining:
            return draining()
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:18]) > self._service.config.max_body_bytes:
            return self._too_large()
        return None

    def _knows(self, authorization: str) -> bool:
        if not self._keys:
            return True
        scheme, _, key = authorization.partition(" ")
        shown = key.strip().encode() if scheme.lower() == "bearer" else b""
        return knows(self._keys, shown)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` for bodies whose length nobody told, and for those that do not arrive."""
        seen, whole, end = 0, False, time.monotonic() + _BODY_S

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body was not complete after {_BODY_S:g} s") from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self._service.config.max_body_bytes:
                raise HTTPException(413, str(self._too_large()))
            return message

        return counted

    def _too_large(self) -> ApiError:
        limit = self._service.config.max_body_bytes
        return ApiError(413, f"the body is longer than {limit} bytes", reason="body", headers={"Connection": "close"})


def knows(keys: Sequence[bytes], shown: bytes) -> bool:
    """Whether `shown` is one of `keys`, in a time that tells neither which nor how much of it was right."""
    found = False
    for key in keys:
        found |= hmac.compare_digest(key, shown)
    return found


def route_of(path: str) -> str:
    """The template of a path: few values, whatever clients ask for."""
    if path in _ROUTES:
        return path
    return next((template for begin, template in _TEMPLATES if path.startswith(begin)), "other")
