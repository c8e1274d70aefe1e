"""The load generator: its mix is what it says, its clients see what a server does, and a wrong answer is found."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from dgemma.api import LLM
from dgemma.bench.load_client import Outcome, send_all
from dgemma.bench.load_mix import CHAT, COMPLETIONS, SAMPLERS, Item, MixSettings, expected, make_mix
from dgemma.bench.serve import ALONE, Drift, quantile, read_metrics, run_load
from dgemma.errors import DgemmaError, RequestError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("default", engine=ALONE)


@pytest.fixture(scope="module")
def mix(llm: LLM) -> list[Item]:
    return make_mix(llm, MixSettings(requests=400))


def length(llm: LLM, item: Item) -> int:
    return len(item.prompt) or len(llm.encode_chat([{"role": "user", "content": item.text}]))


def test_the_same_seed_gives_the_same_mix(llm: LLM, mix: list[Item]) -> None:
    assert make_mix(llm, MixSettings(requests=400)) == mix
    assert make_mix(llm, MixSettings(requests=400, seed=1)) != mix


def test_the_shares_are_exact(mix: list[Item]) -> None:
    assert sum(item.leave_after is not None for item in mix) == 80
    assert sum(bool(item.stop) for item in mix) == 40
    assert sum(item.route == CHAT for item in mix) == 100
    assert all(item.stream for item in mix if item.leave_after is not None)
    # Half of all, and those who give up of the other half.
    assert 200 <= sum(item.stream for item in mix) <= 280
    assert any(item.stop and item.leave_after is not None for item in mix)
    assert any(item.stop and not item.stream for item in mix)


def test_samplers_canvases_and_seeds_vary(llm: LLM, mix: list[Item]) -> None:
    samplers = Counter(item.sampler for item in mix)
    assert set(samplers) == set(SAMPLERS) and min(samplers.values()) > 90
    canvases = Counter(item.max_tokens // llm.config.canvas_length for item in mix)
    assert set(canvases) == {1, 2, 3, 4} and min(canvases.values()) > 60
    assert len({item.seed for item in mix}) == 400


def test_prompts_are_log_uniform_and_fit(llm: LLM, mix: list[Item]) -> None:
    plain = [len(item.prompt) for item in mix if item.route == COMPLETIONS]
    assert min(plain) <= 2 and 1500 < max(plain) <= 2000
    # Of a log-uniform law on 1..2000, half lies below the root of 2000 (45).
    assert 0.4 < sum(size <= 45 for size in plain) / len(plain) < 0.6
    assert all(length(llm, item) + item.max_tokens <= llm.config.max_positions for item in mix)
    beginnings = Counter(item.prompt[:40] for item in mix if len(item.prompt) >= 40)
    assert beginnings.most_common(1)[0][1] > 2


def test_every_body_is_a_request_that_the_engine_takes(llm: LLM, mix: list[Item]) -> None:
    for item in mix[:50]:
        body = item.body("m")
        json.dumps(body)
        assert body["model"] == "m" and ("messages" in body) == (item.route == CHAT)
        llm.request(item.prompt or "x", max_new_tokens=body["max_tokens"], sampler=body["dgemma"]["sampler"])


@pytest.mark.parametrize(("name", "value"), [("requests", 0), ("cancelled", 1.5), ("samplers", ("nonesuch",))])
def test_bad_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=str(value[0] if isinstance(value, tuple) else value)):
        MixSettings(**{name: value})


def test_a_stop_string_cuts_the_expected_text(llm: LLM, mix: list[Item]) -> None:
    item = next(item for item in mix if item.route == COMPLETIONS and len(item.prompt) < 60 and not item.stop)
    free = expected(llm, item)
    stop = free.text[5:8]
    cut = expected(llm, replace(item, stop=("\x00", stop)))
    assert cut.text == free.text[: free.text.index(stop)] and cut.reason == "stop"


def test_quantile_and_drift() -> None:
    assert quantile([3, 1, 2, 4], 0.5) == 2 and quantile([3, 1, 2, 4], 0.99) == 4 and quantile([], 0.5) == 0
    assert Drift.of([0, 0, 5, 5, 9, 9, 7, 7]) == Drift(early=5, late=7)
    assert Drift.of([1.0] * 7) is None


def test_metrics_are_read_as_they_stand() -> None:
    text = '# TYPE a counter\na_total 3.0\nb{kind="denoise"} 2.5e+07\n'
    assert read_metrics(text) == {"a_total": 3.0, 'b{kind="denoise"}': 2.5e7}


# -- the clients, against a server that does as it is told ---------------------------


class Scripted(BaseHTTPRequestHandler):
    """What it does to a request is named by the request's seed."""

    protocol_version = "HTTP/1.1"
    script: ClassVar[dict[int, str]] = {}
    refused: ClassVar[set[int]] = set()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        kind = self.script.get(body["seed"], "good")
        if kind == "full once" and body["seed"] not in self.refused:
            self.refused.add(body["seed"])
            self._answer(429, b"{}", {"retry-after": "0"})
        elif kind == "failing":
            self._answer(500, b'{"error": {"message": "boom"}}', {})
        elif body.get("stream"):
            self._stream(kind)
        else:
            text = "wrong" if kind == "wrong" else "one two three"
            choice = {"text": text, "message": {"content": text}, "finish_reason": "length"}
            self._answer(200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode(), {})

    def _stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        for piece in ("one ", "two\u2028", "three"):
            self._event({"choices": [{"text": piece, "delta": {"content": piece}, "finish_reason": None}]})
            self._event({"choices": [], "dgemma": {"index": 0, "line": {}}})
            if kind == "breaking off":
                return
            if kind == "error inside":
                return self._event({"error": {"message": "out of memory"}})
        self._event({"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]})
        self._event({"choices": [], "usage": {"completion_tokens": 7}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: Any) -> None:
        self.wfile.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Scripted.script, Scripted.refused = {}, set()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def item(seed: int, **changes: Any) -> Item:
    values: dict[str, Any] = {
        "number": seed, "route": COMPLETIONS, "prompt": (2, 5), "text": "", "max_tokens": 16, "sampler": "ancestral",
        "steps": 6, "seed": seed, "stop": (), "stream": False, "drafts": False, "leave_after": None,
    }  # fmt: skip
    return Item(**(values | changes))


def send(url: str, *items: Item, concurrency: int = 2) -> list[Outcome]:
    return asyncio.run(send_all(url, "m", items, concurrency, timeout_s=60))


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_answers_arrive_whole_and_in_order(url: str, route: str) -> None:
    outcomes = send(url, *(item(n, route=route, text="hello", stream=n % 2 == 1) for n in range(9)), concurrency=4)
    assert [one.number for one in outcomes] == list(range(9))
    assert {(one.end, one.reason) for one in outcomes} == {("whole", "length")}
    assert {one.text for one in outcomes[::2]} == {"one two three"}
    assert {one.text for one in outcomes[1::2]} == {"one two\u2028three"}
    assert {(one.completion_tokens, len(one.gaps_s)) for one in outcomes[1::2]} == {(7, 2)}
    assert all(one.first_text_s is not None and 0 < one.first_text_s <= one.seconds for one in outcomes[1::2])
    assert all(one.first_text_s is None for one in outcomes[::2])


@pytest.mark.parametrize(("after", "text"), [(0, ""), (1, "one "), (2, "one "), (3, "one two\u2028"), (50, None)])
def test_a_client_leaves_when_it_said(url: str, after: int, text: str | None) -> None:
    (outcome,) = send(url, item(1, stream=True, leave_after=after))
    if text is None:
        assert (outcome.end, outcome.text) == ("whole", "one two\u2028three")
    else:
        assert (outcome.end, outcome.text) == ("left", text)


def test_a_full_server_is_asked_again(url: str) -> None:
    Scripted.script = {1: "full once"}
    first, second = send(url, item(1, stream=True), item(2))
    assert (first.end, first.refusals, second.end, second.refusals) == ("whole", 1, "whole", 0)


@pytest.mark.parametrize(
    ("kind", "stream", "fault"),
    [
        ("failing", False, "status 500.*boom"),
        ("failing", True, "status 500"),
        ("breaking off", True, "broke off"),
        ("error inside", True, "out of memory"),
    ],
)
def test_what_a_server_loses_is_lost(url: str, kind: str, stream: bool, fault: str) -> None:
    Scripted.script = {1: kind}
    lost, good = send(url, item(1, stream=stream), item(2, stream=stream))
    assert (lost.end, good.end) == ("lost", "whole")
    assert re.search(fault, lost.fault)


def test_no_server_at_all_is_one_clear_line(llm: LLM) -> None:
    with pytest.raises(DgemmaError, match=r"no server with a model answers at http://127\.0\.0\.1:1"):
        run_load(llm, "http://127.0.0.1:1", MixSettings(requests=1), 1)
