"""Server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dgemma.server.errors import as_api_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
PING = b": still working\n\n"
QUIET_S = 15.0
_LATE_S = 5.0  # how much later than its own limit a stream whose client reads nothing is cut off


class ClientGone(Exception):
    """Nobody is there to be answered."""


def event(data: Any, name: str = "") -> bytes:
    """One event; `name` is its type where a protocol has types."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n").encode()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled (and `ClientGone` raised) once the client has hung up."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _kept_alive(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events, with a comment wherever none came for long: what stands between may close a silent connection."""
    while True:
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({coming}, timeout=QUIET_S))[0]:
                yield PING
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        data = coming.result()
        if data is None:
            return
        yield data


class EventStream(Response):
    """Sends events as `events` yields them, and leaves `job` (entered already) however that ends.

    An error in the generator becomes the last event. `on_gone` is called when the client hung up or does not read.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        job: contextlib.AbstractAsyncContextManager[Any],
        limit_s: float,
        on_gone: Callable[[], None],
    ) -> None:
        self.status_code, self.background = 200, None
        self._events, self._job, self._limit_s, self._on_gone = events, job, limit_s, on_gone
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s + _LATE_S):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await unless_gone(receive, self._send(send))
        except (ClientGone, OSError):  # a timeout is an OSError, too
            self._on_gone()
            # After a timeout the answer ends without its end, which closes the connection.
        finally:
            await self._job.__aexit__(None, None, None)

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            try:
                async for data in _kept_alive(events):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:
                if isinstance(error, OSError):
                    raise
                fault = as_api_error(error)
                await send({"type": "http.response.body", "body": event(fault.body), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
