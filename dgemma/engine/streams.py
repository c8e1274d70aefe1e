"""How the events of a request reach whoever asked: a queue for a thread, or one for an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from queue import SimpleQueue
from typing import Self

from dgemma.engine.request import Request
from dgemma.engine.worker import Worker
from dgemma.errors import RequestError
from dgemma.events import Event, Finished


class Submitted:
    """A request on its way through the worker; leaving the `with` block aborts it unless it is over."""

    def __init__(self, worker: Worker, request: Request) -> None:
        self.request = request
        self._worker = worker
        self._begun = self._latest = time.perf_counter()
        self._put = self._open()
        self._id = worker.submit(request, self._deliver)

    def _open(self) -> Callable[[Event | BaseException], object]:
        """How events reach the reader."""
        raise NotImplementedError

    def _deliver(self, event: Event | BaseException) -> None:
        self._latest = time.perf_counter()
        self._put(event)

    @property
    def seconds(self) -> float:
        """From submission to the latest event."""
        return self._latest - self._begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.abort(self._id)


class Stream(Submitted):
    """Read by the thread that made it."""

    def _open(self) -> Callable[[Event | BaseException], object]:
        if self._worker.inside:
            raise RequestError("a hook runs in the engine's thread and cannot wait for an answer of the same engine")
        self._queue: SimpleQueue[Event | BaseException] = SimpleQueue()
        return self._queue.put

    def events(self) -> Iterator[Event]:
        while True:
            event = self._queue.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return


class AsyncStream(Submitted):
    """Read in the event loop that made it."""

    def _open(self) -> Callable[[Event | BaseException], object]:
        loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()

        def put(event: Event | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody listens
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        return put

    async def events(self) -> AsyncIterator[Event]:
        while True:
            event = await self._queue.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if isinstance(event, Finished):
                return
