"""What a line of a batch file asks, and what is answered to it: a JSON object for a JSON object.

A line is `{"prompt": ...}` or `{"messages": [...]}` with fields of generation, or OpenAI's batch shape, which goes
through the server's own routes. A line's fault is answered, too. Knows no files, no journal and no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dgemma.api import LLM, Generation
from dgemma.errors import DgemmaError, RequestError
from dgemma.settings import GENERATION, Settings
from dgemma.text.chat import AnswerStream

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_OPTIONS = {option.name: option for option in GENERATION}
_NATIVE = ("id", "prompt", "messages", "template", *_OPTIONS)
_OPENAI = ("custom_id", "method", "url", "body")
_FOREVER_S = 1e9


@dataclass(frozen=True)
class Line:
    """One line of the input: its place (from 0) and its bytes, the line break left out."""

    number: int
    data: bytes


@dataclass(frozen=True)
class Answered:
    """The output for one line: a JSON object, the tokens that were generated, and whether it tells of an error."""

    number: int
    text: str
    tokens: int
    failed: bool


class Answerer:
    """One loaded model that answers lines, up to `rows` at a time, each as soon as it is done."""

    def __init__(self, llm: LLM, seed: int, rows: int) -> None:
        """`seed` is that of the first line; a line without a seed of its own has it plus its place.

        `llm.generation` holds where a line says nothing else.
        """
        self._llm, self._seed, self._rows = llm, seed, rows
        self._app: Any = None

    @staticmethod
    def load(settings: Settings, rows: int) -> Answerer:
        llm = LLM.load(settings.model, **settings.loading, engine=settings.engine())
        llm.generation = llm.generation.with_(**settings.of_requests)
        return Answerer(llm, int(settings.generation.get("seed", llm.generation.seed)), rows)

    def answers(self, lines: Iterable[Line]) -> Generator[Answered]:
        """An answer to every line, in the order in which they are done. Leaving early aborts what runs."""
        waiting = iter(lines)
        with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
            loop = runner.get_loop()
            running: set[asyncio.Task[Answered]] = set()
            while True:
                while len(running) < self._rows and (line := next(waiting, None)) is not None:
                    value = _parsed(line.data)
                    if self._app is None and isinstance(value, dict) and "custom_id" in value:
                        self._open_app(runner, stack)
                    running.add(loop.create_task(self._answer(line.number, value)))
                if not running:
                    return
                done, running = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                yield from (task.result() for task in done)

    def _open_app(self, runner: asyncio.Runner, stack: contextlib.ExitStack) -> None:
        from dgemma.server import ServerConfig, create_app

        app = create_app(self._llm, ServerConfig(max_waiting=self._rows, timeout_s=_FOREVER_S))
        life = app.router.lifespan_context(app)
        runner.run(life.__aenter__())
        self._app = app

        def close() -> None:
            self._app = None
            runner.run(life.__aexit__(None, None, None))

        stack.callback(close)

    async def _answer(self, number: int, value: Any) -> Answered:
        openai = isinstance(value, dict) and "custom_id" in value
        try:
            if isinstance(value, DgemmaError):
                raise value
            result, tokens, failed = await (self._openai if openai else self._native)(number, value)
        except DgemmaError as error:
            result, tokens, failed = _failure(number, value, "invalid_request_error", str(error)), 0, True
        except Exception as error:  # out of memory, say: the other lines go on, and nobody loses this one
            message = f"{type(error).__name__}: {error}"
            result, tokens, failed = _failure(number, value, "server_error", message), 0, True
        return Answered(number, json.dumps(result, ensure_ascii=False), tokens, failed)

    async def _native(self, number: int, value: Any) -> tuple[dict[str, Any], int, bool]:
        if not isinstance(value, dict):
            raise RequestError(f"a line must be a JSON object, got {_kind(value)}")
        _only_known(value, _NATIVE)
        if ("prompt" in value) == ("messages" in value):
            raise RequestError("a line needs either prompt or messages")
        ids = self._ids(value)
        chosen = {
            _OPTIONS[name].field: _OPTIONS[name].check(given) for name, given in value.items() if name in _OPTIONS
        }
        overrides = {"seed": self._seed + number, **chosen}
        answer: Generation = await self._llm.agenerate(ids, **overrides)
        result = _named(number, value) | self._facts(answer, chat="messages" in value)
        return result, len(answer.token_ids), False

    def _ids(self, value: Mapping[str, Any]) -> list[int]:
        if "prompt" in value:
            if not isinstance(value["prompt"], str):
                raise RequestError(f"prompt must be a text, got {_kind(value['prompt'])}")
            return self._llm.encode_prompt(value["prompt"])
        messages, template = value["messages"], value.get("template", {})
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise RequestError("messages must be a list of objects with role and content")
        if not isinstance(template, dict):
            raise RequestError(f"template must be an object of options of the chat template, got {_kind(template)}")
        return self._llm.encode_chat(messages, **template)

    def _facts(self, answer: Generation, chat: bool) -> dict[str, Any]:
        """Names as in `dgemma generate --json`. No time and no cache: a line's answer is the same on every run."""
        text, thought = answer.text, ""
        if chat:
            stream = AnswerStream(self._llm.tokenizer)
            ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
            parts = [*stream.push(ids), *stream.flush()]
            text, thought = "".join(part.text for part in parts), "".join(part.thought for part in parts)
        return {
            "model": answer.model,
            "text": text,
            **({"thought": thought} if thought else {}),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(answer.prompt_token_ids),
            "completion_tokens": len(answer.token_ids),
            "seed": answer.seed,
            "mode": answer.mode,
            "steps": list(answer.steps),
            "tokens_per_forward": round(answer.tokens_per_forward, 4),
        }

    async def _openai(self, number: int, value: dict[str, Any]) -> tuple[dict[str, Any], int, bool]:
        _only_known(value, _OPENAI)
        if not isinstance(value["custom_id"], str):
            raise RequestError(f"custom_id must be a text, got {_kind(value['custom_id'])}")
        if value.get("method") != "POST":
            raise RequestError(f"method must be POST, got {value.get('method')!r}")
        if value.get("url") not in URLS:
            raise RequestError(f"url must be one of {', '.join(URLS)}; got {value.get('url')!r}")
        if not isinstance(value.get("body"), dict):
            raise RequestError(f"body must be an object, got {_kind(value.get('body'))}")
        if value["body"].get("stream"):
            raise RequestError("stream is not possible in a batch; leave it out")
        body = {"seed": self._seed + number, **value["body"]}
        status, answer = await _post(self._app, value["url"], body)
        usage = answer.get("usage") or {}
        tokens = int(usage.get("completion_tokens") or usage.get("output_tokens") or 0)
        response = {"status_code": status, "request_id": f"line_{number + 1}", "body": answer}
        result = {"id": f"batch_req_{number + 1}", "custom_id": value["custom_id"], "response": response, "error": None}
        return result, tokens, status != 200


async def _post(app: Callable[..., Any], path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a POST to an ASGI application, in this process."""
    data = json.dumps(body).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [
            (b"host", b"localhost"), (b"content-type", b"application/json"),
            (b"content-length", str(len(data)).encode()),
        ],
        "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
    }  # fmt: skip
    sent: list[bytes] = []
    status, asked = 500, False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # nobody disconnects here
        asked = True
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            sent.append(message.get("body", b""))

    await app(scope, receive, send)
    answer = json.loads(b"".join(sent))
    assert isinstance(answer, dict)
    return status, answer


def _parsed(data: bytes) -> Any:
    """The JSON value of a line, or the error that says why there is none."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return RequestError(f"the line is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}")
    if not text.strip():
        return RequestError("the line is empty; it needs a JSON object")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return RequestError(f"the line is not JSON: {error}")


def _failure(number: int, value: Any, kind: str, message: str) -> dict[str, Any]:
    if isinstance(value, dict) and "custom_id" in value:
        error = {"code": kind, "message": message}
        return {"id": f"batch_req_{number + 1}", "custom_id": value["custom_id"], "response": None, "error": error}
    named = _named(number, value if isinstance(value, dict) else {})
    return named | {"error": {"type": kind, "message": message}}


def _named(number: int, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"line": number + 1, **({"id": value["id"]} if "id" in value else {})}


def _only_known(value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in value:
        if name not in known:
            raise RequestError(f"unknown field {name!r}; known: {', '.join(known)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
