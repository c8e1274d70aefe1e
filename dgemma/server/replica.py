"""One replica: a process of Ray Serve that holds one `LLM` and answers requests through the server's application.

Knows nothing of the other replicas and of who sends the requests (replica_front.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from dgemma.api import LLM
from dgemma.config import EngineConfig
from dgemma.engine.load import Load
from dgemma.server.config import ServerConfig
from dgemma.settings import Settings

Build = Callable[[Settings, ServerConfig, EngineConfig], Any]
"""Settings to an ASGI application; runs in the replica."""
_LONGEST_PASS_S = 300.0


def build_app(settings: Settings, config: ServerConfig, engine: EngineConfig) -> Any:
    """The server's application over a model that is loaded here."""
    from dgemma.server import create_app
    from dgemma.server.logs import to_stderr

    to_stderr()
    llm = LLM.load(settings.model, **settings.loading, engine=settings.engine(engine))
    llm.generation = llm.generation.with_(**settings.of_requests)
    return create_app(llm, config)


class Watch:
    """Tells an engine that stands still from one that is idle or slow."""

    def __init__(self, longest_s: float = _LONGEST_PASS_S, now: Callable[[], float] = time.monotonic) -> None:
        self._longest, self._now = longest_s, now
        self._passes, self._since = -1, now()

    def look(self, load: Load) -> None:
        """Raises if requests run and no pass was done for `longest_s`."""
        passes = load.encode_passes + load.denoise_passes
        if passes != self._passes or not (load.running or load.waiting):
            self._passes, self._since = passes, self._now()
        elif self._now() - self._since > self._longest:
            raise RuntimeError(f"the engine did no pass for {self._longest:g} s with {load.running} requests running")


class Replica:
    """One process with one application. Every answer carries its process id in `x-dgemma-replica`."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, build: Build, settings: Settings, config: ServerConfig, engine: EngineConfig, edition: int
    ) -> None:
        # `edition` does nothing but differ: a deployment with other arguments is rolled out anew.
        self._app = build(settings, config, engine)
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()
        self._name = str(os.getpid()).encode()
        self._watch = Watch()

    async def stream(self, scope: Mapping[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The messages with which the application answers. Cancelling it tells the application so."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        asked = False

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()  # a client that leaves cancels the whole call
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-dgemma-replica", self._name)]}
            messages.put_nowait(message)

        async def answer() -> None:
            try:
                await self._app({**scope, "headers": list(scope["headers"])}, receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def whole(self, scope: Mapping[str, Any], body: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body at once, for what every replica is asked."""
        status, headers, parts = 500, list[tuple[bytes, bytes]](), []
        async for message in self.stream(scope, body):
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                parts.append(message.get("body", b""))
        return status, headers, b"".join(parts)

    async def check_health(self) -> None:
        """Ray Serve asks this; whoever raises or does not answer in time is replaced."""
        service = getattr(self._app.state, "service", None)
        if service is not None:
            self._watch.look(service.llm.engine.load)

    async def __del__(self) -> None:
        if hasattr(self, "_life"):
            await self._life.__aexit__(None, None, None)
