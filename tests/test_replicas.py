"""Replicas: what the front makes of losses and drains; and, in `make soak`, two real ones, killed while they stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import warnings
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from text_kit import save_model

from dgemma.cli import serve
from dgemma.cli.arguments import Parser
from dgemma.engine.load import Load
from dgemma.errors import CheckpointError, ConfigError
from dgemma.server import replicas as module
from dgemma.server.config import ServerConfig
from dgemma.server.ray_cluster import import_ray, start_ray
from dgemma.server.replica import Replica, Watch, build_app
from dgemma.server.replica_front import Front, merge_metrics
from dgemma.server.replicas import ReplicaConfig, serve_replicas
from dgemma.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own code
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.serve.exceptions import BackPressureError

Message = dict[str, Any]
JSON, EVENTS = (b"content-type", b"application/json"), (b"content-type", b"text/event-stream; charset=utf-8")


def start(*headers: tuple[bytes, bytes], status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Pool:
    """Stands for the handle of the replicas: each call plays the next script of messages and faults."""

    def __init__(self, *scripts: Sequence[Message | BaseException | float], whole: Sequence[Any] = ()) -> None:
        self.scripts, self.whole = list(scripts), whole
        self.calls: list[tuple[Message, bytes]] = []
        self.cancelled = 0

    def options(self, method_name: str, stream: bool) -> Pool:
        assert (method_name, stream) == ("stream", True)
        return self

    def remote(self, scope: Message, data: bytes) -> Stream:
        self.calls.append((scope, data))
        return Stream(self, self.scripts.pop(0))

    def broadcast(self, method: str, scope: Message, data: bytes) -> Pool:
        self.calls.append((scope, data))
        return self

    async def results_async(self, timeout_s: float) -> Sequence[Any]:
        return self.whole


class Stream:
    def __init__(self, pool: Pool, script: Sequence[Message | BaseException | float]) -> None:
        self.pool, self.script = pool, script

    def cancel(self) -> None:
        self.pool.cancelled += 1

    async def __aiter__(self) -> AsyncIterator[Message]:
        for part in self.script:
            if isinstance(part, float):
                await asyncio.sleep(part)
            elif isinstance(part, BaseException):
                raise part
            else:
                yield part


def lost() -> BaseException:
    return ActorDiedError()


def request(path: str = "/v1/chat/completions") -> Message:
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "app": object()}


async def call(front: Front, path: str = "/v1/chat/completions", parts: Sequence[bytes] = (b"{}",)) -> list[Message]:
    """What the front sends for one request."""
    sent: list[Message] = []
    waiting = [body(part, more=True) | {"type": "http.request"} for part in parts]
    waiting[-1]["more_body"] = False

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await front(request(path), receive, send)
    return sent


def ask(pool: Pool, **options: Any) -> list[Message]:
    return asyncio.run(call(Front(pool, 1000), **options))


def told(sent: list[Message]) -> tuple[int, dict[str, Any], dict[bytes, bytes]]:
    """Status, error and headers of an answer in one piece."""
    first, last = sent
    assert int(dict(first["headers"])[b"content-length"]) == len(last["body"])
    return first["status"], json.loads(last["body"])["error"], dict(first["headers"])


def test_an_answer_passes_unchanged_and_the_scope_can_travel() -> None:
    answer = [start(EVENTS), body(b"data: 1\n\n", True), body(b"data: [DONE]\n\n", True), body(b"")]
    pool = Pool(answer)
    assert ask(pool, parts=[b'{"a":', b"1}"]) == answer
    assert pool.calls == [({k: v for k, v in request().items() if k != "app"}, b'{"a":1}')]


def test_the_request_id_is_told_once() -> None:
    """Ray Serve's proxy adds the id that the replica was given."""
    pool = Pool([start(JSON, (b"X-Request-Id", b"7")), body(b"{}")])
    assert ask(pool)[0]["headers"] == [JSON]


@pytest.mark.parametrize("before", [[], [start(JSON)]])
def test_a_replica_that_is_lost_before_it_answered_is_replaced_by_another(before: list[Message]) -> None:
    answer = [start(JSON), body(b"{}")]
    pool = Pool([*before, lost()], answer)
    assert ask(pool, parts=[b"q"]) == answer
    assert [data for _, data in pool.calls] == [b"q", b"q"]


def test_a_second_loss_is_told_with_503() -> None:
    status, error, headers = told(ask(Pool([lost()], [lost()])))
    assert (status, error["code"], error["type"]) == (503, "replica_lost", "server_error")
    assert headers[b"retry-after"] == b"1"


def test_a_loss_in_a_stream_becomes_its_last_event() -> None:
    sent = ask(Pool([start(EVENTS), body(b"data: 1\n\n", True), lost()]))
    assert sent[:2] == [start(EVENTS), body(b"data: 1\n\n", True)]
    (last,) = sent[2:]
    assert not last["more_body"] and last["body"].startswith(b"data: ") and last["body"].endswith(b"\n\n")
    error = json.loads(last["body"][6:])["error"]
    assert error["code"] == "replica_lost" and "send the request again" in error["message"]


def test_a_loss_in_a_body_breaks_the_connection_rather_than_end_it() -> None:
    with pytest.raises(ConnectionError, match="lost"):
        ask(Pool([start(JSON), body(b'{"half":', True), lost()]))


def test_busy_and_failing_replicas_are_not_asked_again() -> None:
    status, error, headers = told(ask(Pool([BackPressureError(num_queued_requests=9, max_queued_requests=9)])))
    assert (status, error["code"], headers[b"retry-after"]) == (429, "engine_full", b"1")
    status, error, _ = told(ask(Pool([RayTaskError("f", "secret trace", ValueError("x"))])))
    assert (status, error["code"]) == (500, "internal_error") and "secret" not in json.dumps(error)


def test_a_body_is_read_no_further_than_a_replica_would_take_it() -> None:
    pool = Pool([start(JSON, status=413), body(b"{}")])
    assert ask(pool, parts=[b"a" * 600, b"a" * 600, b"never read"])[0]["status"] == 413
    assert len(pool.calls[0][1]) == 1200


def test_a_client_that_leaves_cancels_the_work() -> None:
    pool = Pool([start(EVENTS), body(b"data: 1\n\n", True), 60.0])

    async def leave() -> None:
        task = asyncio.create_task(call(Front(pool, 1000)))
        await asyncio.sleep(0.05)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()

    asyncio.run(leave())
    assert pool.cancelled == 1


def test_a_drain_waits_for_running_requests_and_refuses_new_ones() -> None:
    answer = [start(EVENTS), body(b"data: 1\n\n", True), 0.4, body(b"data: [DONE]\n\n")]

    async def drain() -> None:
        front = Front(Pool(answer), 1000)
        running = asyncio.create_task(call(front))
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(front.drain(60.0))
        await asyncio.sleep(0)
        status, error, headers = told(await call(front, path="/health"))
        assert (status, error["code"], headers[b"retry-after"]) == (503, "draining", b"1")
        assert await draining == 0 and running.done(), "not before the request was over"
        assert (await running)[-1] == answer[-1]

    asyncio.run(drain())


def test_a_drain_that_is_over_cuts_with_an_event() -> None:
    pool = Pool([start(EVENTS), body(b"data: 1\n\n", True), 60.0], [60.0])

    async def drain() -> None:
        front = Front(pool, 1000)
        streaming, waiting = (asyncio.create_task(call(front)) for _ in range(2))
        await asyncio.sleep(0.1)
        assert await front.drain(0.1) == 2
        last = (await streaming)[-1]
        assert json.loads(last["body"][6:])["error"]["code"] == "draining" and not last["more_body"]
        assert told(await waiting)[0] == 503

    asyncio.run(drain())
    assert pool.cancelled == 2


def test_a_trace_is_found_whichever_replica_has_it() -> None:
    missing = (404, [JSON], b"{}")
    found = (200, [(b"content-length", b"99"), (b"x-dgemma-replica", b"8")], b"trace")
    first, last = ask(Pool(whole=[missing, found]), path="/v1/traces/abc")
    assert first["status"] == 200 and last["body"] == b"trace"
    assert dict(first["headers"]) == {b"content-length": b"5", b"x-dgemma-replica": b"8"}
    assert ask(Pool(whole=[missing, missing]), path="/v1/traces/abc")[0]["status"] == 404
    assert told(ask(Pool(whole=[]), path="/metrics"))[0] == 503


def test_metrics_of_all_replicas_are_one_text() -> None:
    head = b"# HELP a_total Things.\n# TYPE a_total counter\n"
    one = head + b'a_total 1.0\na_total{route="/x"} 2.0\n# TYPE b gauge\nb NaN\n'
    merged = merge_metrics({"12": one, "7": head + b"a_total 5.0 1700000000\n"})
    assert merged.decode().splitlines() == [
        "# HELP a_total Things.",
        "# TYPE a_total counter",
        'a_total{replica="12"} 1.0',
        'a_total{route="/x",replica="12"} 2.0',
        'a_total{replica="7"} 5.0 1700000000',
        "# TYPE b gauge",
        'b{replica="12"} NaN',
    ]
    whole = [(200, [(b"x-dgemma-replica", name), (b"content-length", b"0")], one) for name in (b"1", b"2")]
    first, last = ask(Pool(whole=whole), path="/metrics")
    assert last["body"] == merge_metrics({"1": one, "2": one})
    assert dict(first["headers"])[b"content-length"] == str(len(last["body"])).encode()


# -- a replica without Ray -----------------------------------------------------------


class Application:
    """As small as an ASGI application can be."""

    def __init__(self) -> None:
        self.life: list[str] = []
        self.router = self.state = self

    @contextlib.asynccontextmanager
    async def lifespan_context(self, app: object) -> AsyncIterator[None]:
        self.life.append("begun")
        yield
        self.life.append("over")

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        received = await receive()
        await send(start(JSON))
        if scope["path"] == "/forever":
            try:
                await receive()  # until the client leaves
            finally:
                self.life.append("cancelled")
        await send(body(received["body"]))


async def replica(app: Application) -> Replica:
    made = Replica.__new__(Replica)
    await made.__init__(lambda *_: app, Settings(), ServerConfig(), ReplicaConfig().engine, 0)  # type: ignore[misc]
    return made


@pytest.mark.filterwarnings("ignore:coroutine 'Replica.__del__'")  # Ray Serve awaits it
def test_a_replica_answers_with_its_name_and_hears_of_a_cancel() -> None:
    app = Application()

    async def use() -> None:
        made = await replica(app)
        assert app.life == ["begun"]
        status, headers, data = await made.whole(request("/"), b"hello")
        assert (status, data, headers[-1]) == (200, b"hello", (b"x-dgemma-replica", str(os.getpid()).encode()))
        stream = made.stream(request("/forever"), b"")
        assert (await anext(stream))["status"] == 200
        await stream.aclose()
        assert app.life == ["begun", "cancelled"]
        await made.__del__()
        assert app.life[-1] == "over"
        del made._life

    asyncio.run(use())


def test_a_replica_has_the_defaults_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables, command, the application that a replica builds; the seed stays each request's own."""
    folder = save_model(tmp_path / "tiny")
    for name, value in (("STEPS", "3"), ("TEMPERATURE", "0.5"), ("MAX_NEW_TOKENS", "9"), ("SEED", "5")):
        monkeypatch.setenv(f"DGEMMA_{name}", value)
    given = list[Any]()
    monkeypatch.setattr(module, "serve_replicas", lambda *args, **more: given.extend(args))
    parser = Parser(prog="serve")
    serve.add_arguments(parser)
    assert serve.run(parser.parse_args([f"--model={folder}", "--replicas=2", "--device=cpu", "--max-rows=3"])) == 0
    settings, config, scale = given
    client = TestClient(build_app(settings, config, scale.engine), "http://localhost")
    about = client.get("/v1/models").json()["data"][0]["dgemma"]["generation"]
    assert (about["steps"], about["temperature"], about["max_new_tokens"]) == (3, 0.5, 9)
    ask = {"model": "tiny", "prompt": "Once", "logit_bias": {"1": -100, "6": -100}}  # no end before the budget
    answers = [client.post("/v1/completions", json=ask).json() for _ in range(2)]
    assert all(answer["usage"]["completion_tokens"] == 9 for answer in answers)
    assert all(steps <= 3 for answer in answers for steps in answer["usage"]["dgemma"]["steps"])
    seeds = {answer["dgemma"]["seed"] for answer in answers}
    assert len(seeds) == 2 and 5 not in seeds


def test_an_engine_that_stands_still_is_not_well() -> None:
    now = 0.0
    watch = Watch(300.0, lambda: now)
    watch.look(Load(denoise_passes=5, running=1))
    now = 200.0
    watch.look(Load(denoise_passes=6, running=1))  # slow, but it moves
    now = 450.0
    watch.look(Load(denoise_passes=6, running=1))
    now = 501.0
    with pytest.raises(RuntimeError, match="no pass for 300 s with 1 requests running"):
        watch.look(Load(denoise_passes=6, running=1))
    now = 5000.0
    watch.look(Load(denoise_passes=6))  # idle
    now = 5200.0
    watch.look(Load(denoise_passes=6, waiting=1))  # just come


# -- what is refused before anything starts ------------------------------------------


def test_faults_are_told_before_ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = list[object]()
    monkeypatch.setattr("ray.init", lambda *args, **options: started.append(args))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port} cannot be used: Address already in use"):
            serve_replicas(Settings(), ServerConfig(port=port), ReplicaConfig())
    with pytest.raises(CheckpointError, match="no checkpoint"):
        serve_replicas(Settings(model=str(tmp_path / "none")), ServerConfig(), ReplicaConfig())
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(ConfigError, match=r"--replicas needs the package ray: pip install 'dgemma\[ray\]'"):
        serve_replicas(Settings(), ServerConfig(), ReplicaConfig())
    assert not started


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": 0}, "replicas must be a whole number of at least 1, got 0"),
        ({"replicas": 3, "max_replicas": 2}, r"max_replicas must be at least replicas \(3\), got 2"),
        ({"health_period_s": 0.0}, "health_period_s must be more than 0"),
    ],
)
def test_numbers_of_replicas_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReplicaConfig(**values)


def test_why_a_start_failed_is_one_line() -> None:
    told = "Deploying failed.\n  File x, line 3\n dgemma.errors.RequestError: t_max must be greater than t_min\n\n"
    assert module._reason(told) == "dgemma.errors.RequestError: t_max must be greater than t_min"
    assert module._reason("Something.\n\n") == "Something." and module._reason("") == "no reason given"


def test_a_ray_that_does_not_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = list[str | None]()

    def fail(address: str | None = None, **options: Any) -> None:
        tries.append(address)
        raise RuntimeError("\nThe current node timed out.\n  more")

    ray = import_ray("a test")
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever an earlier test left
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(ConfigError, match=r"^Ray does not start: The current node timed out\.$"):
        start_ray(ray, None, cpus=1, object_store_bytes=100_000_000, logs=False)
    with pytest.raises(ConfigError, match="Ray does not start"):
        start_ray(ray, "10.0.0.1:6379", cpus=1, object_store_bytes=100_000_000, logs=False)
    assert tries == [None, None, None, "10.0.0.1:6379"], "a busy machine may need more than one try"
