"""Sends the items of a mix over HTTP as many clients would, and keeps what came back and when. Judges nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from dgemma.bench.load_mix import CHAT, Item

End = Literal["whole", "left", "lost"]
_TRIES = 50  # a full server says when to come back
_LONGEST_WAIT = 5.0


@dataclass
class Outcome:
    """What one client saw. Times are seconds on the client's clock; `begun` counts from the start of the run."""

    number: int
    begun: float = 0.0
    end: End = "lost"
    text: str = ""
    reason: str = ""
    fault: str = ""
    """Why it was lost."""
    refusals: int = 0
    """How often the server was full; the client came again."""
    first_text_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Between the pieces of text that a stream brought: the time of a canvas, where no stop string holds text back."""
    seconds: float = 0.0
    completion_tokens: int = 0


async def send_all(
    url: str,
    model: str,
    items: Sequence[Item],
    concurrency: int,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    done: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Outcomes in the order of the items; each of `concurrency` clients takes the next one when it is free."""
    begun, waiting = time.perf_counter(), iter(items)
    outcomes: dict[int, Outcome] = {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url, headers=dict(headers or {}), timeout=timeout_s, limits=limits, trust_env=False
    ) as client:

        async def work() -> None:
            for item in waiting:
                outcome = Outcome(item.number, begun=time.perf_counter() - begun)
                outcomes[item.number] = outcome
                try:
                    await _send(client, model, item, outcome)
                except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                    outcome.end, outcome.fault = "lost", f"{type(error).__name__}: {error}"
                done(outcome)

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return [outcomes[item.number] for item in items]


async def _send(client: httpx.AsyncClient, model: str, item: Item, outcome: Outcome) -> None:
    for _ in range(_TRIES):
        start = time.perf_counter()
        async with client.stream("POST", item.route, json=item.body(model)) as response:
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                outcome.refusals += 1
                wait = min(float(response.headers["retry-after"]), _LONGEST_WAIT)
            elif response.status_code != httpx.codes.OK:
                outcome.fault = f"status {response.status_code}: {(await response.aread()).decode()[:300]}"
                return
            else:
                await (_streamed if item.stream else _whole)(response, item, outcome, start)
                outcome.seconds = time.perf_counter() - start
                return
        await asyncio.sleep(wait)
    outcome.fault = f"refused {outcome.refusals} times"


async def _whole(response: httpx.Response, item: Item, outcome: Outcome, start: float) -> None:
    answer = json.loads(await response.aread())
    (choice,) = answer["choices"]
    outcome.text = choice["message"]["content"] if item.route == CHAT else choice["text"]
    outcome.reason, outcome.end = choice["finish_reason"], "whole"
    outcome.completion_tokens = answer["usage"]["completion_tokens"]


async def _streamed(response: httpx.Response, item: Item, outcome: Outcome, start: float) -> None:
    latest, seen = start, 0
    if item.leave_after == 0:
        outcome.end = "left"
        return
    async for data in _events(response):
        if data == "[DONE]":
            if outcome.reason:
                outcome.end = "whole"
            else:
                outcome.fault = "the stream ended without a finish_reason"
            return
        chunk = json.loads(data)
        if "error" in chunk:
            outcome.fault = f"error in the stream: {chunk['error']}"
            return
        text = _take(chunk, item, outcome)
        if text:
            now = time.perf_counter()
            if outcome.first_text_s is None:
                outcome.first_text_s = now - start
            else:
                outcome.gaps_s.append(now - latest)
            outcome.text, latest = outcome.text + text, now
        seen += 1
        if seen == item.leave_after:
            outcome.end = "left"
            return
    outcome.fault = "the stream broke off"


def _take(chunk: Mapping[str, Any], item: Item, outcome: Outcome) -> str:
    """The text of a chunk; its finish_reason and usage go to the outcome."""
    if chunk.get("usage"):
        outcome.completion_tokens = chunk["usage"]["completion_tokens"]
    text = ""
    for choice in chunk["choices"]:
        outcome.reason = choice.get("finish_reason") or outcome.reason
        text += (choice["delta"].get("content") if item.route == CHAT else choice["text"]) or ""
    return text


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of server-sent events."""
    rest = b""
    async for part in response.aiter_bytes():
        # Not aiter_lines: it also cuts at separators that a JSON text may hold.
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()
