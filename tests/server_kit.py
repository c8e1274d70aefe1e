"""A real server in a thread, and short ways to talk to it, for the tests of the server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx

from dgemma.api import LLM
from dgemma.server import ServerConfig
from dgemma.server.run import Server, server
from dgemma.server.sockets import listen

PATIENCE_S = 100.0


class Running:
    """A server that listens on a free port of this machine."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        self._listener = listen(replace(config, port=0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.server: Server = server(llm, config)
        self.service = self.server.service
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the server does not stop"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def chat(self, text: str = "Once upon a time", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", chat_body(self.llm, text, **fields))

    def chunks(self, path: str, body: Any) -> list[Any]:
        """The events of a stream; the last one is the text `[DONE]`."""
        with self.client() as client, client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            return list(events(response.iter_lines()))


def chat_body(llm: LLM, text: str = "Once upon a time", **fields: Any) -> dict[str, Any]:
    """A chat request of one message, with a seed."""
    return {"model": llm.name, "messages": [{"role": "user", "content": text}], "seed": 1, **fields}


def events(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: "):
            text = line.removeprefix("data: ")
            yield text if text == "[DONE]" else json.loads(text)


@contextlib.contextmanager
def running(llm: LLM, **config: Any) -> Iterator[Running]:
    """A server for the time of a `with` block."""
    one = Running(llm, ServerConfig(**config))
    one.start()
    try:
        yield one
    finally:
        one.stop()


def until(condition: Any, seconds: float = PATIENCE_S) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def idle(llm: LLM) -> None:
    """Wait until the engine has nothing to do."""
    until(lambda: llm.worker._thread is None and not llm.engine.has_work)
