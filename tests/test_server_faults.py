"""Clients that misbehave: bodies made to break a server, storms of hang-ups, readers that do not read.

After each of them the server answers as before, and nothing is left behind in the engine.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from server_kit import idle, running

from dgemma.api import LLM
from dgemma.bench.load_mix import MixSettings
from dgemma.bench.serve import ALONE, read_metrics, run_load
from dgemma.config import EngineConfig
from dgemma.server import ServerConfig, create_app

PATIENCE_S = 120.0
BODY: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 24, "seed": 5}


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with running(llm, max_waiting=200) as server:
        yield server.url


def metrics(url: str) -> dict[str, float]:
    return read_metrics(httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text)


def settled(url: str) -> dict[str, float]:
    """The metrics, once nothing is going on; fails if that never happens."""
    end = time.monotonic() + PATIENCE_S
    while True:
        values = metrics(url)
        # The reading itself is an open request, if it counts as one.
        busy = [values[f"dgemma_{name}"] for name in ("requests_waiting", "requests_running", "kv_reserved_bytes")]
        if not any(busy) and values["dgemma_requests_open"] <= 1:
            return values
        assert time.monotonic() < end, f"still busy: {busy}, open {values['dgemma_requests_open']}"
        time.sleep(0.05)


def ask(url: str, **changes: Any) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=BODY | changes, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


# -- bodies --------------------------------------------------------------------------


def fuzz(llm: LLM, bodies: int) -> Counter[int]:
    """Statuses of so many bodies that the OpenAPI document allows, and of as many that it forbids."""
    app = create_app(llm, ServerConfig(allowed_hosts=("testserver",)))  # what schemathesis calls it
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    posts = [operation for operation in operations if operation.method.upper() == "POST"]
    assert {operation.path for operation in posts} >= {"/v1/chat/completions", "/v1/completions", "/v1/responses"}
    statuses: Counter[int] = Counter()
    for operation in posts:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            count = -(-bodies // (2 * len(posts)))

            @seed(0)
            @settings(
                max_examples=count, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(operation.as_strategy(generation_mode=mode))
            def one(case: Case) -> None:
                if isinstance(case.body, dict):
                    calm(case.body, llm.name)
                answer = case.call(timeout=PATIENCE_S)
                statuses[answer.status_code] += 1
                if answer.status_code != 200:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, answer.text
                assert answer.status_code < 500, f"{answer.text} for {case.body!r}"

            one()
    assert not llm.engine.has_work
    return statuses


def calm(body: dict[str, Any], model: str) -> None:
    """What would only cost time or end in 404: valid fields keep their types and get small values."""
    if isinstance(body.get("model"), str):
        body["model"] = model
    for name, most in (("max_tokens", 8), ("max_completion_tokens", 8), ("max_output_tokens", 8), ("n", 2)):
        value = body.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            body[name] = most


def test_bodies_made_to_break_a_server(llm: LLM) -> None:
    statuses = fuzz(llm, 200)
    assert statuses[400] > 50
    assert set(statuses) <= {200, 400, 404, 413}


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_thousand_bodies(llm: LLM) -> None:
    statuses = fuzz(llm, 10_000)
    assert sum(statuses.values()) >= 8_000  # Hypothesis may find a small space exhausted
    assert statuses[400] > 2_000 and statuses[200] > 50


RAW = {
    "no JSON": b"{",
    "no object": b"[]",
    "not UTF-8": b'{"model": "\xff"}',
    "half a surrogate pair": b'{"model": "tiny", "prompt": "\\ud800"}',
    "NaN": b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    "deep": b"[" * 100_000,
    "a huge number": b'{"model": "tiny", "prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
    "a wide list": b'{"model": "tiny", "prompt": [' + b"5," * 200_000 + b"5]}",
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_raw_bytes(url: str, route: str, name: str) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{url}{route}", content=RAW[name], headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


# -- connections ---------------------------------------------------------------------


def dial(url: str, receive: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    link = socket.socket()
    if receive:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    link.settimeout(PATIENCE_S)
    link.connect((host, int(port)))
    return link


def post(link: socket.socket, **changes: Any) -> None:
    body = json.dumps(BODY | changes).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    link.sendall(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)


def test_a_storm_of_hang_ups(url: str, llm: LLM) -> None:
    before = settled(url)
    want = ask(url)
    rng = random.Random(0)

    def client(number: int) -> None:
        link = dial(url)
        stream = number % 2 == 0
        options = {"include_canvas": number % 4 == 0}
        post(link, seed=number, max_tokens=200, stream=stream, **({"stream_options": options} if stream else {}))
        if stream and number % 3:
            with contextlib.suppress(OSError):
                link.recv(200 * (number % 5 + 1))
        time.sleep(rng.random() * 0.2)
        if number % 5 == 0:  # a reset instead of a farewell
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        link.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(80)]
    for thread in threads:
        thread.start()
    # Who stays is answered, and right, in the midst of it.
    assert ask(url) == want
    for thread in threads:
        thread.join()
    after = settled(url)
    assert after["dgemma_cancelled_total"] - before["dgemma_cancelled_total"] > 40
    assert not llm.engine.has_work
    assert ask(url) == want


def test_unfinished_requests_hold_nobody_up(url: str) -> None:
    want = ask(url)
    links = [dial(url) for _ in range(50)]
    for number, link in enumerate(links):
        link.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5000\r\n\r\n{"[: 20 + 3 * number]
        )
    assert ask(url) == want
    for link in links:
        link.close()
    settled(url)


def test_a_slow_reader_holds_nobody_up_and_loses_no_text(llm: LLM) -> None:
    banned = {str(token): -100 for token in llm.generation.stop_tokens}
    asked = {"max_tokens": llm.config.max_positions - 64, "logit_bias": banned, "dgemma": {"steps": 48}}
    with running(llm) as server:
        # Else the kernel takes all of the stream, and the server never notices that nobody reads.
        server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        usual = settled(server.url)["dgemma_requests_open"]
        slow = dial(server.url, receive=4096)
        post(slow, stream=True, stream_options={"include_canvas": True}, **asked)
        assert slow.recv(64).startswith(b"HTTP/1.1 200")
        want = ask(server.url, **asked)
        # The engine is done with both; the stream still waits for its reader.
        idle(llm)
        assert metrics(server.url)["dgemma_requests_open"] > usual
        assert text_of(read_all(slow)) == want
        settled(server.url)


def read_all(link: socket.socket) -> bytes:
    data = b""
    with link:
        while b"data: [DONE]" not in data[-40:]:
            part = link.recv(2048)
            assert part, data[-500:]
            data += part
            time.sleep(0.0005)
    return data


def text_of(stream: bytes) -> str:
    # Chunked transfer puts lengths on lines of their own between the events.
    chunks = [json.loads(line[6:]) for line in stream.split(b"\n") if line.startswith(b"data: {")]
    assert any("dgemma" in chunk for chunk in chunks)
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


# -- memory --------------------------------------------------------------------------


def test_a_request_beyond_the_memory_of_the_engine_is_the_client_s_fault(llm: LLM, folder: Path) -> None:
    usual = llm.engine.kv_bytes(llm.request(BODY["prompt"], max_new_tokens=BODY["max_tokens"]))
    limit = 2 * usual + 1
    small = LLM.load(folder, threads=1, engine=EngineConfig(kv_bytes=limit))
    with running(small) as server:
        for stream in (False, True):
            answer = server.post("/v1/completions", BODY | {"max_tokens": 200, "stream": stream})
            assert answer.status_code == 400
            assert "kv_bytes" in answer.json()["error"]["message"] and str(limit) in answer.json()["error"]["message"]
        want = ask(server.url)
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda _: ask(server.url), range(8)))
        assert texts == [want] * 8
        assert settled(server.url)["dgemma_kv_limit_bytes"] == limit


# -- the mix, shortened --------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> LLM:
    return LLM.load("default", engine=ALONE)


SHORT = MixSettings(requests=24, longest_prompt=300, canvases=2)


def test_the_mix_is_answered_as_each_alone(alone: LLM) -> None:
    with running(LLM.load("default")) as server:
        report = run_load(alone, server.url, SHORT, 12, interval_s=0.2, known={})
    assert (report.lost, report.wrong, report.faults) == (0, (), ())
    assert report.checked == 24 and report.whole + report.left == 24 and report.left > 0
    assert report.rows_per_forward > 2
    assert report.samples[-1].running == report.samples[-1].waiting == 0
    assert max(sample.running for sample in report.samples) > 4
    assert 0 < report.first_text_p50 <= report.first_text_p99 < report.seconds
    assert report.tokens_per_second > 0
    json.dumps(report.json())


def test_a_wrong_answer_is_found(alone: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from dgemma.bench import load_mix

    body = load_mix.Item.body
    monkeypatch.setattr(load_mix.Item, "body", lambda item, model: body(item, model) | {"seed": item.seed + 1})
    few = MixSettings(requests=4, longest_prompt=20, canvases=2, cancelled=0.0, stopped=0.0)
    with running(LLM.load("default")) as server:
        report = run_load(alone, server.url, few, 4, known={})
    assert report.lost == 0 and len(report.wrong) == 4
