"""Run an application until it is told to stop: the signals and the drain."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from dgemma.api import LLM
from dgemma.server.app import create_app
from dgemma.server.config import ServerConfig
from dgemma.server.logs import log, to_stderr
from dgemma.server.service import Service
from dgemma.server.sockets import listen, url_of

_BACKLOG = 1024
_POLL_S = 0.05
_LAST_WORDS_S = 2  # seconds that answers which were cut get to tell so


class Server(uvicorn.Server):
    """uvicorn that drains first: while answers run, new requests are told 503 and `/health` says draining."""

    def __init__(self, config: uvicorn.Config, service: Service, announce: Callable[[str], object]) -> None:
        super().__init__(config)
        self.service = service
        self._announce = announce
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            self._announce(url_of(sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, a second one ends it."""
        # Not the parent's: it would send itself the signal again at the end, and the exit status were not 0.
        if self.service.draining:
            self.force_exit = self.should_exit = True
        else:
            self.stop()

    def stop(self) -> None:
        """Begin the drain; `serve` returns when it is done."""
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and self._drain is None:
            self._drain = asyncio.create_task(self._drained())
        return bool(await super().on_tick(counter))

    async def _drained(self) -> None:
        service = self.service
        log(event="draining", running=len(service.jobs), at_most_s=service.config.drain_s)
        end = asyncio.get_running_loop().time() + service.config.drain_s
        while service.jobs and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)
        service.cut()
        self.should_exit = True


def server(llm: LLM, config: ServerConfig, announce: Callable[[str], object] = lambda url: None) -> Server:
    """A server that is ready to `run(sockets=[...])`, in any thread; `stop()` ends it.

    `announce` is told its address once it answers.
    """
    app = create_app(llm, config)
    options: dict[str, Any] = {
        "log_config": None,
        "access_log": False,
        "timeout_graceful_shutdown": _LAST_WORDS_S,
        "backlog": _BACKLOG,
        "server_header": False,
        "ws": "none",
    }
    return Server(uvicorn.Config(app, **options), app.state.service, announce)


def serve(
    llm: LLM,
    config: ServerConfig,
    listener: socket.socket | None = None,
    announce: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve until SIGTERM or ctrl-C, then drain. Logs go to standard error."""
    to_stderr()
    server(llm, config, announce).run(sockets=[listener or listen(config)])
