"""Two real replicas of Ray Serve on this machine: killed while they stream, replaced under load, drained."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from text_kit import environment, save_model

from dgemma.api import LLM

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

RUN = """
import json, sys
from dgemma.errors import DgemmaError
from dgemma.server.config import ServerConfig
from dgemma.server.replicas import ReplicaConfig, serve_replicas
from dgemma.settings import Settings

settings = Settings(model=sys.argv[1], device="cpu", threads=1, generation=json.loads(sys.argv[2]))
scale = ReplicaConfig(replicas=2, object_store_bytes=100_000_000, health_period_s=2.0)
config = ServerConfig(port=0, drain_s=120.0)
try:
    serve_replicas(settings, config, scale, announce=lambda line: print(line, flush=True))
except DgemmaError as error:
    print("error:", error, flush=True)
    sys.exit(2)
"""
LONG = {"max_tokens": 3000, "logit_bias": {"1": -100, "6": -100}}  # both end tokens: it runs to its budget
MESSAGES: list[Any] = [{"role": "user", "content": "Once upon a time"}]


class Service:
    """`serve_replicas` in a process of its own."""

    def __init__(self, folder: Path, generation: dict[str, Any] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), json.dumps(generation or {})],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += self.process.stdout  # as they come

    def wait_for(self, text: str, seconds: float = 600.0) -> str:
        end = time.monotonic() + seconds
        while not (found := [line for line in list(self.lines) if text in line]):
            assert self.process.poll() is None and time.monotonic() < end, "".join(self.lines)
            time.sleep(0.05)
        return found[0]

    @property
    def url(self) -> str:
        return re.search(r"http://\S+", self.wait_for("replicas listen on"))[0]  # type: ignore[index]

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=300.0, **options)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> set[int]:
        """Process ids of the replicas that answer, by Ray Serve's own word."""
        text = httpx.get(f"{self.url}/metrics", timeout=300.0).text
        return {int(pid) for pid in re.findall(r'dgemma_requests_running\{replica="(\d+)"\}', text)}

    def number(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=300.0).text
        return sum(float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE))

    def end(self) -> None:
        family = self.family() if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(200.0)
        finally:
            self.process.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"), max_positions=4096)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    running = Service(folder)
    yield running
    running.end()


def until(true: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_both_replicas_give_the_answer_of_the_model_alone(service: Service, llm: LLM, folder: Path) -> None:
    alone = llm.chat(MESSAGES, seed=4, max_new_tokens=20).text
    seen = set()

    def both() -> bool:
        raw = service.client().chat.completions.with_raw_response.create(
            model=folder.name, messages=MESSAGES, seed=4, max_tokens=20
        )
        seen.add(int(raw.headers["x-dgemma-replica"]))
        assert len(raw.headers.get_list("x-request-id")) == 1
        assert raw.parse().choices[0].message.content == alone
        return len(seen) == 2

    until(both, "one replica never got a request")
    assert seen == service.replicas()


def test_the_replica_that_streams_is_killed(service: Service, llm: LLM, folder: Path) -> None:
    """The client gets a named error within seconds, the same request works at once, and the replica is replaced."""
    client = service.client(max_retries=0)
    ask: dict[str, Any] = {"model": folder.name, "messages": MESSAGES, "seed": 2, "extra_body": LONG}
    raw = client.chat.completions.with_raw_response.create(**ask, stream=True)
    victim = int(raw.headers["x-dgemma-replica"])
    chunks = 0
    with pytest.raises(openai.APIError) as caught:
        for _ in raw.parse():
            chunks += 1
            if chunks == 3:
                os.kill(victim, signal.SIGKILL)
    assert caught.value.code == "replica_lost" and "send the request again" in caught.value.message
    assert 3 <= chunks < 180, "it was killed in the middle"
    again = client.chat.completions.create(**ask | {"extra_body": {"max_tokens": 20}})
    assert again.choices[0].message.content == llm.chat(MESSAGES, seed=2, max_new_tokens=20).text
    until(lambda: len(service.replicas() - {victim}) == 2, "it was not replaced")


def test_a_replica_killed_before_its_answer_costs_the_client_nothing(service: Service, folder: Path) -> None:
    until(lambda: len(service.replicas()) == 2, "two replicas")
    answers: list[Any] = []

    def ask() -> None:
        client = service.client(max_retries=0)
        made = client.chat.completions.create(model=folder.name, messages=MESSAGES, seed=9, extra_body=LONG)
        answers.append((made.choices[0].message, made.usage.completion_tokens))

    before = service.replicas()
    asking = threading.Thread(target=ask)
    asking.start()
    running = set[int]()

    def works() -> bool:
        text = httpx.get(f"{service.url}/metrics", timeout=300.0).text
        running.update(int(p) for p in re.findall(r'dgemma_requests_running\{replica="(\d+)"\} 1', text))
        return bool(running)

    until(works, "it never ran")
    assert asking.is_alive()
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    asking.join(600.0)
    ask()
    assert answers[0] == answers[1] and answers[0][1] == 3000, "that of an undisturbed replica"
    until(lambda: len(service.replicas() - running) == 2, "it was not replaced")
    assert before - service.replicas() == running


def test_a_client_that_leaves_frees_the_engine(service: Service, folder: Path) -> None:
    ask = {"model": folder.name, "messages": MESSAGES, "stream": True, **LONG}
    before = service.number("dgemma_committed_tokens_total")
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=ask, timeout=300.0) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
        assert service.number("dgemma_requests_running") == 1
    until(lambda: service.number("dgemma_requests_running") == 0, "it runs on", 60.0)
    assert service.number("dgemma_committed_tokens_total") - before < 2900, "it was not just done"


def test_a_trace_is_found_through_any_replica(service: Service, folder: Path) -> None:
    answer = service.client().chat.completions.create(
        model=folder.name, messages=MESSAGES, max_tokens=20, extra_body={"dgemma": {"trace": True}}
    )
    name = answer.model_extra["dgemma"]["trace_id"]  # type: ignore[index]
    for _ in range(6):
        trace = httpx.get(f"{service.url}/v1/traces/{name}", timeout=300.0)
        assert trace.status_code == 200 and json.loads(trace.text.splitlines()[0])["model"] == folder.name
    assert httpx.get(f"{service.url}/v1/traces/{name}x", timeout=300.0).status_code == 404


def test_a_rolling_restart_fails_no_request(service: Service, folder: Path) -> None:
    until(lambda: len(service.replicas()) == 2, "two replicas")
    before, over, faults, done = service.replicas(), threading.Event(), list[BaseException](), list[str]()
    texts = list[str]()

    def load() -> None:
        client = service.client(max_retries=0)
        while not over.is_set():
            try:
                made = client.chat.completions.create(model=folder.name, messages=MESSAGES, seed=1, max_tokens=20)
                texts.append(made.choices[0].message.content or "")
            except BaseException as error:
                faults.append(error)

    def stream() -> None:
        client = service.client(max_retries=0)
        chunks = client.chat.completions.create(model=folder.name, messages=MESSAGES, stream=True, extra_body=LONG)
        done.extend(chunk.choices[0].finish_reason or "" for chunk in chunks)

    threads = [threading.Thread(target=load), threading.Thread(target=stream)]
    for thread in threads:
        thread.start()
    until(lambda: bool(done and texts), "they never began")
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("all replicas are new")
    over.set()
    for thread in threads:
        thread.join(600.0)
    assert faults == [] and len(set(texts)) == 1 and len(texts) > 1
    assert done[-1] == "length", "the running answer came to its end"
    assert len(service.replicas()) == 2 and not service.replicas() & before


def test_sigterm_lets_running_answers_end_and_leaves_nothing_behind(service: Service, folder: Path) -> None:
    client, url, ends, family = service.client(max_retries=0), service.url, list[str](), service.family()
    chunks = client.chat.completions.create(model=folder.name, messages=MESSAGES, stream=True, extra_body=LONG)
    next(iter(chunks))
    service.process.send_signal(signal.SIGTERM)
    service.wait_for("draining")
    refused = httpx.get(f"{url}/health", timeout=300.0)
    while refused.status_code == 200:  # the front has not heard of it yet
        refused = httpx.get(f"{url}/health", timeout=300.0)
    assert refused.status_code == 503 and refused.json()["status"] == "draining" and refused.headers["retry-after"]
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=folder.name, messages=MESSAGES, max_tokens=4)
    assert caught.value.code == "draining"
    ends = [chunk.choices[0].finish_reason or "" for chunk in chunks]
    assert ends[-1] == "length"
    assert service.process.wait(200.0) == 0
    _, alive = psutil.wait_procs(family, timeout=120.0)
    assert alive == []
    assert not [line for line in service.lines if "Traceback" in line]


def test_a_model_that_does_not_load_is_told_in_one_line(folder: Path) -> None:
    service = Service(folder, {"t_min": 5.0})
    assert service.process.wait(900.0) == 2
    service._reader.join(60.0)
    assert "error: the replicas do not start: " in service.lines[-1] and "t_max must be greater" in service.lines[-1]
