"""Request bodies as strict JSON: what is none, is no UTF-8 or too deep is refused before any schema sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from dgemma.server.errors import ApiError, invalid

_LONG = 64_000  # bytes from which parsing leaves the event loop


class JsonRoute(APIRoute):
    """A route whose body is read by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if request.method == "POST":
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise invalid(f"the content-type must be application/json, got {kind!r}")
            return await handle(_JsonRequest(request.scope, request.receive))

        return strict


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return await asyncio.to_thread(parse, body) if len(body) > _LONG else parse(body)
        except ApiError as error:
            # FastAPI hides every other kind of exception behind a message of its own.
            raise HTTPException(error.status, str(error)) from None


def parse(body: bytes) -> Any:
    """The value of a JSON text, or a 400."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse)
        if b"\\u" in body:
            # Half a surrogate pair is legal JSON, but no text that could be tokenised or sent back.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}") from None
    except UnicodeEncodeError:
        raise invalid("the body holds half a surrogate pair, which is no text") from None
    except RecursionError:
        raise invalid("the body is nested too deep") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")
