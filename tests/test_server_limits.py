"""What a server does when things go wrong: clients that leave or do not read, full queues, time limits, stopping,
a full disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server_kit import Running, chat_body, idle, running, until
from text_kit import save_model

from dgemma.api import LLM
from dgemma.config import EngineConfig
from dgemma.errors import ConfigError
from dgemma.server import ServerConfig, outbox, security, sse
from dgemma.server.sockets import listen
from dgemma.trace import TraceReader

ENDLESS = {"steps": 1_000_000, "stability_threshold": None, "confidence_threshold": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", max_positions=1024)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu", engine=EngineConfig(max_batch_rows=2))


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


def endless(llm: LLM, **fields: Any) -> dict[str, Any]:
    """A request that would take hours."""
    return chat_body(llm, dgemma=ENDLESS, **fields)


@contextlib.contextmanager
def open_stream(server: Running, body: Any, **options: Any) -> Iterator[Iterator[Any]]:
    """A stream that is being read; leaving hangs up."""
    body = {**body, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body, **options) as response:
        assert response.status_code == 200, response.read()
        yield (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))


def sent(server: Running, body: Any, buffer: int = 0) -> socket.socket:
    """A socket on which a request was sent and nothing is read."""
    data = json.dumps(body).encode()
    one = socket.socket()
    if buffer:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    one.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    fields = ("host: localhost", "content-type: application/json", f"content-length: {len(data)}", "connection: close")
    one.sendall("\r\n".join(("POST /v1/chat/completions HTTP/1.1", *fields, "", "")).encode() + data)
    return one


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_costs_one_more_step(
    server: Running, llm: LLM, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    abort = llm.worker.abort

    def noted(number: int) -> None:
        passes.append(llm.engine.counters.denoise_passes)
        abort(number)

    monkeypatch.setattr(llm.worker, "abort", noted)
    before = server.get("/metrics").text
    with contextlib.closing(sent(server, endless(llm, stream=stream))):
        until(lambda: llm.engine.load.running == 1)
        seen = llm.engine.counters.denoise_passes
        until(lambda: llm.engine.counters.denoise_passes > seen)
        assert not passes
    idle(llm)
    assert len(passes) == 1 and llm.engine.counters.denoise_passes - passes[0] <= 1
    assert server.service.answers == 0 and not server.service.jobs
    count = "dgemma_cancelled_total"
    until(lambda: value(server.get("/metrics").text, count) == value(before, count) + 1)


def value(metrics: str, name: str) -> float:
    return next(float(line.split()[1]) for line in metrics.splitlines() if line.startswith(f"{name} "))


def test_a_slow_reader_loses_drafts_but_no_text(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING", 20 * 16)
    steps = {"steps": 150, "stability_threshold": None, "confidence_threshold": None}
    body = chat_body(llm, max_tokens=48, stream=True, stream_options={"include_canvas": True}, dgemma=steps)
    one = Running(llm, ServerConfig())
    one._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    one.start()
    try:
        answer = one.post("/v1/chat/completions", {**body, "stream": False, "stream_options": None}).json()
        with contextlib.closing(sent(one, body, buffer=4096)) as reader:
            until(lambda: llm.engine.load.running > 0)
            idle(llm)  # all is made, and hardly anything was read
            raw = b"".join(iter(lambda: reader.recv(65536), b"")).decode()
        events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
        assert "data: [DONE]" in raw
        text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
        assert text == answer["choices"][0]["message"]["content"]
        lines = [event["dgemma"]["line"] for event in events if "line" in event.get("dgemma", {})]
        drafts = sum(line.get("type") == "draft" for line in lines)
        canvases = len(answer["usage"]["dgemma"]["steps"])
        assert 20 <= drafts < 150 * canvases, "drafts must have been dropped"
        assert sum(line.get("type") == "committed" for line in lines) == canvases
        told = list(TraceReader([json.dumps(line) for line in lines]))  # a trace with gaps is a trace
        assert "".join(moment.text for moment in told) == text
    finally:
        one.stop()


def test_a_silent_stream_shows_that_it_lives(server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "QUIET_S", 0.02)
    body = endless(llm, stream=True)
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        comments = [line for line, _ in zip(response.iter_lines(), range(12), strict=False) if line.startswith(":")]
    assert set(comments) == {": still working"} and len(comments) >= 3
    idle(llm)


def test_a_body_that_does_not_arrive(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "_BODY_S", 0.2)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as one:
        fields = ("host: localhost", "content-type: application/json", "content-length: 100", "", "{")
        one.sendall("\r\n".join(("POST /v1/completions HTTP/1.1", *fields)).encode())
        assert one.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_full_engine_says_when_to_come_back(folder: Path) -> None:
    llm = LLM.load(folder, device="cpu", engine=EngineConfig(max_batch_rows=1))
    with running(llm, max_waiting=1) as server:
        with open_stream(server, endless(llm)) as first:
            next(first)
            with open_stream(server, endless(llm)) as second:
                next(second)
                refused = server.chat()
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "engine_full"
                assert refused.json()["error"]["type"] == "rate_limit_exceeded"
            until(lambda: server.service.answers == 1)
            assert server.chat(n=2, max_tokens=4).status_code == 429
        until(lambda: server.service.answers == 0)
        assert server.chat(n=2, max_tokens=4).status_code == 200
        never = server.chat(n=3)
        assert never.status_code == 400 and never.json()["error"]["param"] == "n"
        assert 'dgemma_rejected_total{reason="full"} 2.0' in server.get("/metrics").text


def test_an_answer_that_takes_too_long(llm: LLM) -> None:
    with running(llm, timeout_s=0.5) as server:
        late = server.post("/v1/chat/completions", endless(llm))
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        with open_stream(server, endless(llm)) as chunks:
            assert list(chunks)[-1]["error"]["code"] == "timeout"
        idle(llm)
        assert server.service.answers == 0


def test_a_drain_lets_answers_end(llm: LLM) -> None:
    whole = chat_body(llm, max_tokens=64, dgemma={**ENDLESS, "steps": 60})
    with running(llm, drain_s=60) as server:
        expected = server.post("/v1/chat/completions", whole).json()["choices"][0]["message"]["content"]
        with open_stream(server, whole) as chunks:
            next(chunks)
            server.server.stop()
            assert server.get("/health").status_code == 503
            assert server.get("/health").json() == {"status": "draining"}
            refused = server.chat()
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert refused.json()["error"]["code"] == "draining"
            text = "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])
        assert text == expected


def test_a_drain_ends_in_time(llm: LLM) -> None:
    with running(llm, drain_s=0.2) as server, open_stream(server, endless(llm)) as chunks:
        next(chunks)
        server.stop()
        assert list(chunks)[-1]["error"]["code"] == "draining"
    idle(llm)


def test_a_full_disk_does_not_hurt_the_answer(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = False
    write = Path.write_bytes

    def failing(path: Path, data: bytes) -> int:
        if full and path.is_relative_to(tmp_path):
            write(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", failing)
    with running(llm, trace_folder=tmp_path / "traces", traces_kept=2) as server:
        good = server.chat(max_tokens=8, dgemma={"trace": True}).json()
        full = True
        bad = server.chat(max_tokens=8, dgemma={"trace": True})
        assert bad.status_code == 200 and bad.json()["choices"] == good["choices"]
        assert server.get(f"/v1/traces/{bad.json()['dgemma']['trace_id']}").status_code == 404
        assert [path.name for path in (tmp_path / "traces").iterdir()] == [f"{good['dgemma']['trace_id']}.jsonl"]
        full = False
        names = [server.chat(max_tokens=8, dgemma={"trace": True}).json()["dgemma"]["trace_id"] for _ in range(2)]
        assert [server.get(f"/v1/traces/{name}").status_code for name in names] == [200, 200]
        assert server.get(f"/v1/traces/{good['dgemma']['trace_id']}").status_code == 404, "the oldest one goes"


def test_an_engine_that_breaks_is_told_and_survived(
    server: Running, llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Any:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "tick", broken)
        answer = server.chat()
        assert answer.status_code == 500 and "memory" not in answer.text
        chunks = server.chunks("/v1/chat/completions", chat_body(llm, stream=True))
        assert chunks[-1]["error"]["type"] == "server_error"
        idle(llm)
    assert any("out of memory" in str(record.msg) for record in caplog.records)
    assert server.chat(max_tokens=4).status_code == 200 and server.service.answers == 0


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen(ServerConfig(port=port))
    with pytest.raises(ConfigError, match="cannot listen on no-such-host"):
        listen(ServerConfig(host="no-such-host.invalid"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000), ("port", True), ("max_waiting", -1), ("timeout_s", 0), ("timeout_s", float("nan")),
        ("drain_s", -1), ("host", ""), ("api_keys", ("",)), ("api_keys", ("a b",)), ("cors_origins", ("a.example",)),
        ("cors_origins", ("https://a.example/",)), ("max_body_bytes", 0),
        ("allowed_hosts", ("",)), ("allowed_hosts", ("a.example:80",)), ("allowed_hosts", ("A.example",)),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(**{name: value})


def test_a_number_too_large_for_a_tensor_costs_nobody_else_his_answer(llm: LLM) -> None:
    huge = [{"top_k": 2**63}, {"dgemma": {"steps": 2**64}}, {"temperature": 2.0, "dgemma": {"t_max": 1e300}}]
    with running(llm) as server, ThreadPoolExecutor(1) as others:
        long = others.submit(server.chat, max_tokens=100, logit_bias={"1": -100, "6": -100})
        for fields in huge:
            answer = server.chat(max_tokens=4, **fields)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"] in ("top_k", "dgemma.steps", "dgemma.t_max")
        assert long.result().json()["usage"]["completion_tokens"] == 100


def test_the_outbox_drops_the_oldest_drafts() -> None:
    box = outbox.Outbox()
    for number in range(10):
        box.put_draft(("draft", number), outbox.MAX_WAITING // 4)
        box.put(("text", number))
    kept: list[Any] = []

    async def read() -> None:
        while box._items:
            kept.append(await box.get())

    asyncio.run(read())
    assert [item for item in kept if item[0] == "text"] == [("text", number) for number in range(10)]
    assert [item for item in kept if item[0] == "draft"] == [("draft", number) for number in range(6, 10)]
    assert box.dropped == 6
