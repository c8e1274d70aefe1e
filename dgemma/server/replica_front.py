"""What stands before the replicas: hands each request to one, streams its answer, and tells a loss in a clean way.

A replica that is lost before it answered is asked no more: another one gets the request, once. One that is lost in
the middle of a stream becomes a last event with an error. Knows ASGI, server-sent events and handles of Ray Serve.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Whole = tuple[int, list[tuple[bytes, bytes]], bytes]

ASKED_OF_ALL = ("/metrics", "/v1/traces/")
_ATTEMPTS = 2
_DRAIN_POLL_S = 0.05
_LAST_WORDS_S = 2.0
_LOST = "the replica that wrote this answer was lost; send the request again"
_DRAINING = "the server is about to stop and takes no new requests"
_CUT = "the server stops before this answer is done; send the request again"
_NONE_THERE = "no replica can answer now; send the request again"
_SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip


class Front:
    """An ASGI application over a handle of the replicas' deployment."""

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._replicas, self._max_body = replicas, max_body_bytes
        self._open: set[asyncio.Task[Any]] = set()
        self._draining = self._cut = False

    async def drain(self, seconds: float) -> int:
        """Refuse what comes from now on and wait for what runs; the number of requests that were cut after that."""
        self._draining = True
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            await asyncio.sleep(_DRAIN_POLL_S)
        self._cut, late = True, list(self._open)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_LAST_WORDS_S)
        return len(late)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        if self._draining:
            await _refuse(send, 503, "draining", _DRAINING)
            return
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            body = await self._body(receive)
            plain = {name: scope[name] for name in _SCOPE if name in scope}
            if scope["path"].startswith(ASKED_OF_ALL):
                await self._ask_all(plain, body, send)
            else:
                await self._ask_one(plain, body, send)
        finally:
            self._open.discard(task)

    async def _body(self, receive: Receive) -> bytes:
        """The request's body, or a little more than a replica will take of it."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise asyncio.CancelledError  # the client left
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body") or size > self._max_body:
                return b"".join(parts)

    async def _ask_one(self, scope: Message, body: bytes, send: Send) -> None:
        answer = _Outgoing(send)
        for _ in range(_ATTEMPTS):
            messages = self._replicas.options(method_name="stream", stream=True).remote(scope, body)
            try:
                async for message in messages:
                    await answer.pass_on(message)
                return
            except asyncio.CancelledError:
                messages.cancel()
                if not self._cut:
                    raise
                status, code, text = 503, "draining", _CUT
                if answer.begun:
                    await answer.break_off(code, text)
                    return
                break
            except Exception as error:
                status, code, text = _meaning(error)
                if answer.begun:
                    await answer.break_off(code, text)
                    return
                if code != "replica_lost":
                    break
        await _refuse(send, status, code, text)

    async def _ask_all(self, scope: Message, body: bytes, send: Send) -> None:
        try:
            answers: list[Whole] = await self._replicas.broadcast("whole", scope, body).results_async(timeout_s=30.0)
        except Exception as error:
            await _refuse(send, *_meaning(error))
            return
        good = [answer for answer in answers if answer[0] == 200]
        if not answers:
            await _refuse(send, 503, "no_replica", _NONE_THERE)
            return
        status, headers, content = (good or answers)[0]
        if good and scope["path"] == "/metrics":
            content = merge_metrics({_name_of(headers): content for _, headers, content in good})
        headers = _without(headers, b"content-length", b"x-request-id")
        headers.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


class _Outgoing:
    """An answer on its way. Its start is held back until there is something behind it, so that it can be retried."""

    def __init__(self, send: Send) -> None:
        self._send, self._start = send, Message()
        self.begun = False

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = {**message, "headers": _without(message["headers"], b"x-request-id")}
            return
        if not self.begun:
            self.begun = True
            await self._send(self._start)
        await self._send(message)

    async def break_off(self, code: str, text: str) -> None:
        """The rest of the answer will not come."""
        kinds = {name.lower(): value for name, value in self._start["headers"]}
        if not kinds.get(b"content-type", b"").startswith(b"text/event-stream"):
            # Without its end, the client's library sees a broken answer, not a short one.
            raise ConnectionError(text)
        event = f"data: {json.dumps(_error(code, text))}\n\n"
        await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})


def _meaning(error: Exception) -> tuple[int, str, str]:
    """Status, code and text for what went wrong with a replica."""
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import BackPressureError

    if isinstance(error, BackPressureError):
        return 429, "engine_full", "all replicas are busy; send the request again"
    if isinstance(error, RayTaskError):
        return 500, "internal_error", "the replica failed in answering this request"
    return 503, "replica_lost", _LOST


def _error(code: str, text: str) -> dict[str, Any]:
    status = {"status": "draining"} if code == "draining" else {}  # what /health says then
    return {"error": {"message": text, "type": "server_error", "param": None, "code": code}, **status}


async def _refuse(send: Send, status: int, code: str, text: str) -> None:
    body = json.dumps(_error(code, text)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _without(headers: Iterable[tuple[bytes, bytes]], *names: bytes) -> list[tuple[bytes, bytes]]:
    """Ray Serve's proxy adds the request's id itself, the same that the replica has got."""
    return [(name, value) for name, value in headers if name.lower() not in names]


def _name_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    return next((value.decode() for name, value in headers if name == b"x-dgemma-replica"), "")


def merge_metrics(texts: Mapping[str, bytes]) -> bytes:
    """Prometheus texts of several replicas as one: every sample gets the label `replica`, every family stands once."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for replica, text in sorted(texts.items()):
        family = ""
        for line in text.decode().splitlines():
            comment = re.match(r"# (HELP|TYPE) (\S+)", line)
            if comment:
                family = comment[2]
                head = families.setdefault(family, ([], []))[0]
                if line not in head:
                    head.append(line)
            elif line and not line.startswith("#"):
                families.setdefault(family, ([], []))[1].append(_labelled(line, replica))
    lines = [line for head, samples in families.values() for line in (*head, *samples)]
    return "".join(line + "\n" for line in lines).encode()


def _labelled(sample: str, replica: str) -> str:
    name, labels, rest = re.fullmatch(r"([^\s{]+)(?:\{(.*)\})?(\s.*)", sample).groups()  # type: ignore[union-attr]
    inner = f'{labels.rstrip(",")},replica="{replica}"' if labels else f'replica="{replica}"'
    return f"{name}{{{inner}}}{rest}"


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
