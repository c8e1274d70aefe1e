"""Who and what the gate lets in: keys, bodies, other pages; request ids and logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_kit import Running, chat_body, running, until
from text_kit import save_model

from dgemma.api import LLM
from dgemma.errors import ConfigError
from dgemma.server.config import ServerConfig, read_keys
from dgemma.server.security import knows, route_of


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.load(save_model(tmp_path_factory.mktemp("models") / "tiny"), device="cpu")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


def test_keys(llm: LLM) -> None:
    with running(llm, api_keys=("first", "second")) as server:
        for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "first"}, {"authorization": "Bearer"}):
            for path in ("/v1/models", "/v1/traces/x", "/other"):
                refused = server.get(path, headers=headers)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            refused = server.post("/v1/chat/completions", {}, headers=headers)
            assert refused.status_code == 401
        for key in ("first", "second"):
            assert server.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/", "/health", "/metrics"):
            assert server.get(path).status_code == 200
        with pytest.raises(httpx.HTTPStatusError):
            server.get("/page/../v1/models").raise_for_status()


def test_a_name_that_is_not_ours_is_refused_everywhere(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    for path in ("/v1/models", "/", "/health", "/metrics", "/page/style.css"):
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", ""):
            refused = server.get(path, headers={"host": host})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (421, "host_not_allowed"), (path, host)
            assert repr(host) in error["message"] and error["type"] == "invalid_request_error"
        for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1:1", "[::1]", f"[::1]:{port}"):
            assert server.get(path, headers={"host": host}).status_code == 200, (path, host)
    assert 'dgemma_rejected_total{reason="host"} 25.0' in server.get("/metrics").text


def test_names_that_were_allowed(llm: LLM) -> None:
    with running(llm, allowed_hosts=("box.example", "192.168.1.5")) as server:
        found = {
            host: server.get("/v1/models", headers={"host": host}).status_code
            for host in ("box.example", "Box.Example:80", "192.168.1.5:8000", "localhost", "other.example")
        }
    assert list(found.values()) == [200, 200, 200, 200, 421]


@pytest.mark.parametrize(
    ("host", "allowed", "answers"),
    [
        ("127.0.0.1", (), False), ("127.0.0.1", ("*",), True), ("127.0.0.1", ("a.example",), True),
        ("::1", (), False), ("localhost", (), False),
        ("0.0.0.0", (), True), ("0.0.0.0", ("b.example",), False), ("0.0.0.0", ("a.example",), True),
    ],
)  # fmt: skip
def test_who_asks_for_the_name(host: str, allowed: tuple[str, ...], answers: bool) -> None:
    assert ServerConfig(host=host, allowed_hosts=allowed).answers_to("a.example:8000") is answers
    assert ServerConfig(host=host, allowed_hosts=allowed).answers_to("localhost:8000")


def test_every_route_is_counted_by_its_name(server: Running) -> None:
    """The address on the document and the label in the metrics are one; a trace's or a model's name is no label."""
    paths = server.get("/openapi.json").json()["paths"]
    assert {path for path in paths if route_of(path.replace("{name}", "{id}")) == "other"} == set()


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        calls.append(one)
        return one == other

    monkeypatch.setattr("dgemma.server.security.hmac.compare_digest", compare)
    assert knows([b"a", b"b", b"c"], b"a") and calls == [b"a", b"b", b"c"]
    assert not knows([b"a"], b"") and not knows([], b"")


def test_where_keys_come_from(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha\n\n beta \n")
    assert read_keys(file, {"DGEMMA_API_KEYS": "gamma, alpha,"}) == ("gamma", "alpha", "beta")
    assert read_keys(None, {}) == ()
    file.write_text("# none\n")
    for path, said in ((file, "holds no key"), (tmp_path / "missing", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            read_keys(path, {})
    file.write_text("two words\n")
    with pytest.raises(ConfigError, match="without spaces") as error:
        read_keys(file, {})
    assert "two words" not in str(error.value)


FAULTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "not JSON"),
    "nothing": (b"", "missing"),
    "not UTF-8": (b'{"model": "\xff"}', "UTF-8"),
    "surrogate bytes": (b'{"model": "\xed\xa0\x80"}', "UTF-8"),
    "half a surrogate": (b'{"model": "\\ud800"}', "surrogate"),
    "NaN": (b'{"temperature": NaN}', "NaN"),
    "infinity": (b'{"temperature": -Infinity}', "Infinity"),
    "deep": (b'{"model":' + b"[" * 100_000, "deep"),
    "huge": (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
    "a list": (b"[1]", "object"),
    "null": (b"null", "the body"),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_body_that_is_none(server: Running, case: str, path: str) -> None:
    body, said = FAULTS[case]
    with server.client() as client:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert said in error["message"]


def test_a_number_beyond_floats_is_refused_by_name(server: Running, llm: LLM) -> None:
    for number in (b"1e999", b"1" + b"0" * 400):
        body = json.dumps(chat_body(llm)).encode().replace(b'"seed": 1', b'"temperature": ' + number)
        with server.client() as client:
            answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"


def test_other_content_types_and_methods(server: Running) -> None:
    with server.client() as client:
        form = client.post("/v1/completions", content=b"a=b", headers={"content-type": "text/plain"})
        assert form.status_code == 400 and "content-type" in form.json()["error"]["message"]
        assert client.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"
        assert client.get("/nothing").json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_not_read(llm: LLM, chunked: bool) -> None:
    with running(llm, max_body_bytes=10_000) as server, server.client() as client:
        sizes = {"under": 9_000, "over": 10_001}
        answers = {}
        for name, size in sizes.items():
            data = json.dumps(chat_body(llm, max_tokens=2, user="x" * (size - 200))).encode().ljust(size)
            parts = (data[start : start + 999] for start in range(0, len(data), 999)) if chunked else data
            answers[name] = client.post(
                "/v1/chat/completions", content=parts, headers={"content-type": "application/json"}
            )
        assert answers["under"].status_code == 200
        assert answers["over"].status_code == 413
        assert answers["over"].json()["error"]["code"] == "body_too_large"


def test_request_ids_and_logs(server: Running, llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dgemma.server"):
        given = server.post(
            "/v1/chat/completions", chat_body(llm, "a secret", max_tokens=8), headers={"x-request-id": "abc-1"}
        )
        made = server.post("/v1/chat/completions", {"secret": 1}, headers={"x-request-id": "no good"})
        ids = {"abc-1", made.headers["x-request-id"]}
        # A line is written when the answer is out.
        until(lambda: ids <= {record.msg.get("id") for record in caplog.records})
    lines = {record.msg["id"]: record.msg for record in caplog.records if "id" in record.msg}
    assert given.headers["x-request-id"] == "abc-1"
    assert made.headers["x-request-id"] not in ("", "no good")
    line = lines["abc-1"]
    assert (line["route"], line["status"]) == ("/v1/chat/completions", 200) and line["ms"] > 0
    usage = given.json()["usage"]
    assert line["tokens"] == [usage["prompt_tokens"], usage["completion_tokens"]]
    assert lines[made.headers["x-request-id"]]["status"] == 400
    assert "secret" not in str(caplog.records)


def test_prompts_are_logged_if_asked_for(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with running(llm, log_prompts=True) as server, caplog.at_level(logging.INFO, "dgemma.server"):
        server.chat("a secret", max_tokens=8)
        until(lambda: len(caplog.records) > 0)
    assert ["a secret"] in [record.msg.get("prompt") for record in caplog.records]


def test_pages_of_others_may_not_call_unless_named(server: Running, llm: LLM) -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    allow = "access-control-allow-origin"
    with server.client() as client:
        assert allow not in client.options("/v1/chat/completions", headers=ask).headers
        assert allow not in client.get("/v1/models", headers=ask).headers
    keys = ("k",)
    with running(llm, cors_origins=("https://a.example",), api_keys=keys) as other, other.client() as client:
        answer = client.options("/v1/chat/completions", headers=ask)
        assert answer.status_code == 200 and answer.headers[allow] == "https://a.example"
        assert client.get("/v1/models", headers=ask).headers[allow] == "https://a.example"
        assert allow not in client.get("/v1/models", headers={"origin": "https://b.example"}).headers
