"""`dgemma serve` as a process, and `dgemma replay` of what a server gives."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_kit import PATIENCE_S, Running, chat_body, events, running, until
from text_kit import Terminal, command, dgemma, environment, heed_interrupts, save_model

from dgemma.api import LLM
from dgemma.errors import ConfigError
from dgemma.server.config import ServerConfig
from dgemma.server.ray_cluster import import_ray
from dgemma.server.replicas import ReplicaConfig, serve_replicas
from dgemma.settings import Settings

SLOW = {"steps": 60, "stability_threshold": None, "confidence_threshold": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(LLM.load(folder, device="cpu")) as one:
        yield one


class Process:
    """A running `dgemma serve`."""

    def __init__(self, model: Path, *arguments: str, **env: str) -> None:
        self.process = subprocess.Popen(
            command("serve", "--model", str(model), "--port", "0", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(**env),
            preexec_fn=heed_interrupts,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().decode()  # comes when it listens
        found = re.search(r"http://127\.0\.0\.1:\d+", self.said)
        assert found, self.said + self.process.communicate()[1].decode()
        self.url = found[0]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, number: signal.Signals) -> tuple[int, list[Any]]:
        """Send a signal; exit status and log."""
        self.process.send_signal(number)
        log = self.process.communicate(timeout=PATIENCE_S)[1].decode()
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_answer_end(folder: Path, number: signal.Signals) -> None:
    body = {**chat_body(LLM.load(folder, device="cpu"), max_tokens=64, dgemma=SLOW), "stream": True}
    with Process(folder, "--trace-folder", str(folder.parent / "traces")) as one:
        assert httpx.get(f"{one.url}/health", timeout=PATIENCE_S).json()["model"] == "tiny"
        with httpx.stream("POST", f"{one.url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as answer:
            lines = answer.iter_lines()
            first = next(events(lines))
            one.process.send_signal(number)
            until(lambda: httpx.get(f"{one.url}/health", timeout=PATIENCE_S).status_code == 503)
            rest = list(events(lines))
        assert first["choices"] and rest[-1] == "[DONE]"
        one.process.wait(PATIENCE_S)
        status, log = one.process.returncode, one.process.communicate()[1].decode()
    assert status == 0
    asked = [line for line in map(json.loads, log.splitlines()) if line.get("route") == "/v1/chat/completions"]
    assert len(asked) == 1 and asked[0]["status"] == 200 and asked[0]["tokens"][1] > 0


def test_an_idle_server_ends_at_once(folder: Path) -> None:
    with Process(folder) as one:
        status, log = one.end(signal.SIGTERM)
    assert status == 0 and [line.get("event") for line in log] == ["draining"]


def test_keys_from_the_environment_and_a_file(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("filed\n")
    with Process(folder, "--api-key-file", str(keys), DGEMMA_API_KEYS="given") as one:
        for key, status in (("filed", 200), ("given", 200), ("other", 401)):
            answer = httpx.get(f"{one.url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_S)
            assert answer.status_code == status
        status, log = one.end(signal.SIGTERM)
    assert status == 0 and "filed" not in str(log) and "given" not in str(log)


def test_settings_are_the_defaults_of_requests(folder: Path) -> None:
    with Process(folder, DGEMMA_STEPS="3", DGEMMA_SEED="5") as one:
        about = httpx.get(f"{one.url}/v1/models", timeout=PATIENCE_S).json()["data"][0]["dgemma"]
    assert about["generation"]["steps"] == 3


@contextlib.contextmanager
def taken_port(host: str = "127.0.0.1") -> Iterator[int]:
    with socket.socket() as one:
        one.bind((host, 0))
        one.listen()
        yield one.getsockname()[1]


def test_a_port_in_use(tmp_path: Path) -> None:
    """Found before the model is even looked for; a warning that the whole network may come in is not forgotten."""
    with taken_port() as port:
        done = dgemma("serve", "--model", str(tmp_path / "none"), "--port", str(port))
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode() == f"dgemma: error: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    with taken_port("0.0.0.0") as port:
        done = dgemma("serve", "--host", "0.0.0.0", "--port", str(port))
        known = dgemma("serve", "--host", "0.0.0.0", "--port", str(port), env={"DGEMMA_API_KEYS": "k"})
    assert b"warning: 0.0.0.0 can be reached" in done.stderr and b"no API key" in done.stderr
    assert b"warning" not in known.stderr and known.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--api-key-file", "/no/such/file"), "the key file '/no/such/file' cannot be read: No such file or directory"),
        (("--port", "70000"), "port must be a whole number in 0..65535, got 70000"),
        (("--timeout", "0"), "timeout_s must be a number more than 0, got 0.0"),
        (("--cors-origin", "a.example"), "an origin is * or like https://host:port, got 'a.example'"),
        (("--trace-folder", "/dev/null/x"), "the trace folder '/dev/null/x' cannot be made: Not a directory"),
        (("--max-replicas", "2"), "--max-replicas and --address need --replicas"),
        (("--vllm-args", "x"), "--vllm-args needs --engine vllm"),
    ],
)
def test_arguments_that_cannot_be(arguments: tuple[str, ...], said: str) -> None:
    done = dgemma("serve", *arguments)
    assert (done.returncode, done.stderr.decode()) == (2, f"dgemma: error: {said}\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own code
def test_a_ray_that_does_not_start_is_told_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = import_ray("a test")

    def late(**options: Any) -> None:
        raise ray.exceptions.GetTimeoutError("Get timed out: some object(s) not ready.")

    monkeypatch.setattr("dgemma.server.replicas.start_ray", lambda *args, **options: False)
    monkeypatch.setattr("ray.serve.start", late)
    monkeypatch.setattr("ray.serve.delete", lambda name: None)
    with pytest.raises(ConfigError, match="the replicas do not start: Get timed out") as caught:
        serve_replicas(Settings(model=str(folder)), ServerConfig(port=0), ReplicaConfig())
    assert "\n" not in str(caught.value)


def test_the_start_in_a_terminal(folder: Path) -> None:
    with Terminal("serve", "--model", str(folder), "--port", "0") as terminal:
        shown = terminal.wait_for("ctrl-C ends")
        for part in ("tiny", "page", "/v1", "/docs", "/metrics", "http://127.0.0.1:"):
            assert part in shown
        terminal.send("\x03")
        assert terminal.wait() == 0 and terminal.restored


def test_replay_of_a_url_and_of_a_saved_stream(server: Running, tmp_path: Path) -> None:
    body = chat_body(server.llm, seed=6, max_tokens=40, n=2, stream=True, dgemma={"trace": True})
    body["stream_options"] = {"include_canvas": True}
    with server.client() as client:
        raw = client.post("/v1/chat/completions", json=body).text
    chunks = list(events(iter(raw.splitlines())))
    name = chunks[0]["dgemma"]["trace_id"]
    saved = tmp_path / "stream.txt"
    saved.write_text(raw)
    for index, source in enumerate((name, f"{name}-1")):
        parts = [c["delta"] for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == index]
        text = "".join(part.get("content", "") for part in parts).strip("\n").encode()
        fetched = dgemma("replay", f"{server.url}/v1/traces/{source}")
        assert fetched.returncode == 0 and fetched.stdout.strip(b"\n") == text
        assert dgemma("replay", str(saved), "--choice", str(index)).stdout == fetched.stdout
        piped = dgemma("replay", "-", "--choice", str(index), stdin=raw.encode())
        assert piped.stdout == fetched.stdout
    gone = dgemma("replay", f"{server.url}/v1/traces/none")
    assert gone.returncode == 2 and b"answers 404: there is no trace 'none'" in gone.stderr
    lacking = dgemma("replay", str(saved), "--choice", "2")
    assert lacking.returncode == 2 and b"no drafts of answer 2" in lacking.stderr
    closed = dgemma("replay", "http://127.0.0.1:9/v1/traces/x")
    assert closed.returncode == 2 and b"cannot be read" in closed.stderr and closed.stderr.count(b"\n") == 1
    assert dgemma("replay", str(tmp_path / "none")).stderr.count(b"\n") == 1


def test_replay_with_a_key(server: Running, folder: Path) -> None:
    with running(LLM.load(folder, device="cpu"), api_keys=("k",)) as locked:
        headers = {"authorization": "Bearer k"}
        body = chat_body(locked.llm, max_tokens=8, dgemma={"trace": True})
        name = locked.post("/v1/chat/completions", body, headers=headers).json()["dgemma"]["trace_id"]
        url = f"{locked.url}/v1/traces/{name}"
        assert b"401" in dgemma("replay", url).stderr
        assert dgemma("replay", url, env={"DGEMMA_API_KEYS": "k"}).returncode == 0
