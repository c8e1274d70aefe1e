"""The snippets of docs/clients.md, run against a real server: what they print is what the library answers alone."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_kit import Running, idle, running, until
from text_kit import REPO

from dgemma.api import LLM

KEY = "secret"
PAGE = (REPO / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^## (?P<section>[^\n]+)$|^```(?P<kind>bash|python|js|yaml)\n(?P<text>.*?)^```$", re.M | re.S)


def snippets(section: str, kind: str) -> list[str]:
    """The blocks of one kind under a heading of the page."""
    found, here = [], ""
    for match in BLOCK.finditer(PAGE):
        here = match["section"] or here
        if match["kind"] == kind and here == section:
            found.append(match["text"])
    assert found, f"docs/clients.md has no {kind} under {section!r}"
    return found


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("default", device="cpu", threads=1)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, api_keys=(KEY,)) as one:
        yield one


@pytest.fixture(scope="module")
def story(llm: LLM) -> str:
    """What all of them ask for."""
    return llm.chat([{"role": "user", "content": "Tell me a story."}], seed=7, max_new_tokens=32).text


def run(server: Running, command: list[str], text: str, folder: Path, **env: str) -> str:
    """What a snippet prints, once it talks to `server`."""
    text = text.replace("http://127.0.0.1:8000", server.url).replace(
        "dgemma replay", f"{sys.executable} -m dgemma replay"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "TMPDIR": str(folder), "PYTHONPATH": str(REPO), **env}
    done = subprocess.run(
        [*command, text], capture_output=True, text=True, cwd=folder, env=environ, timeout=200, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BASH, PYTHON = ["bash", "-euo", "pipefail", "-c"], [sys.executable, "-c"]


def test_curl(server: Running, story: str, tmp_path: Path) -> None:
    whole, replayed = (run(server, BASH, text, tmp_path) for text in snippets("curl", "bash"))
    assert story in whole.replace("\\n", "\n")
    assert replayed.strip() == story.strip()


def test_openai_python(server: Running, llm: LLM, story: str, tmp_path: Path) -> None:
    few, stream, response = (run(server, PYTHON, text, tmp_path) for text in snippets("Python: openai", "python"))
    short = llm.chat([{"role": "user", "content": "Tell me a story."}], seed=7, max_new_tokens=32, steps=24)
    assert few.strip() == short.text.strip()
    assert stream.strip() == response.strip() == story.strip()


@pytest.mark.soak
def test_openai_node(server: Running, story: str, tmp_path: Path) -> None:
    """Fails where node or its registry is missing."""
    install = ["npm", "install", "openai", "--no-audit", "--no-fund", "--prefix", str(tmp_path)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    (text,) = snippets("JavaScript: openai", "js")
    assert run(server, ["node", "--input-type=module", "-e"], text, tmp_path).strip() == story.strip()


def test_langchain(server: Running, story: str, tmp_path: Path) -> None:
    pytest.importorskip("langchain_openai")
    (text,) = snippets("LangChain", "python")
    assert run(server, PYTHON, text, tmp_path).strip() == story.strip()


def test_llm_command(server: Running, story: str, tmp_path: Path) -> None:
    if shutil.which("llm", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("the llm command is not installed")
    (models,), (text,) = snippets("llm", "yaml"), snippets("llm", "bash")
    (tmp_path / "extra-openai-models.yaml").write_text(models.replace("http://127.0.0.1:8000", server.url))
    assert run(server, BASH, text, tmp_path, LLM_USER_PATH=str(tmp_path)).strip() == story.strip()


@pytest.mark.soak
def test_no_client_is_missing() -> None:
    """What the tests above skip for, a long run must have."""
    for name in ("langchain_openai", "llm", "openai"):
        __import__(name)
    assert shutil.which("node") and shutil.which("npm") and shutil.which("curl")


def client(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", **{"api_key": KEY, "max_retries": 0, **options})


def test_the_client_knows_our_errors(server: Running) -> None:
    ask: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    with pytest.raises(openai.AuthenticationError) as denied:
        client(server, api_key="wrong").models.list()
    assert denied.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client(server).chat.completions.create(**{**ask, "model": "other"})
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client(server).chat.completions.create(**ask, tools=[{"type": "function", "function": {"name": "f"}}])
    assert bad.value.param == "tools"
    assert client(server).models.retrieve("default").id == "default"
    (model,) = client(server).models.list().data
    assert model.owned_by == "dgemma"


def test_the_typed_events_of_a_response(server: Running, llm: LLM, story: str) -> None:
    with client(server).responses.stream(
        model="default", input="Tell me a story.", max_output_tokens=32, extra_body={"seed": 7}
    ) as stream:
        events = list(stream)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == story
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == story and last.response.usage.total_tokens > 32


def test_several_choices_and_log_probabilities(server: Running, llm: LLM) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    answer = client(server).chat.completions.create(
        model="default", messages=messages, max_tokens=16, seed=7, n=2, logprobs=True, top_logprobs=2
    )
    for choice in answer.choices:
        alone = llm.chat(messages, seed=7, max_new_tokens=16, choice=choice.index)
        assert choice.message.content == alone.text
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert "".join(entry.token for entry in choice.logprobs.content) == alone.text
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


def test_log_probabilities_of_a_response(server: Running) -> None:
    """The entries of the answer, of its stream and of a chat of the same seed are one."""
    ask: dict[str, Any] = {
        "model": "default", "input": "Tell me a story.", "max_output_tokens": 32, "extra_body": {"seed": 7},
        "include": ["message.output_text.logprobs"], "top_logprobs": 2,
    }  # fmt: skip
    answer = client(server).responses.create(**ask)
    entries = answer.output[-1].content[0].logprobs
    assert "".join(entry.token for entry in entries) == answer.output_text
    with client(server).responses.stream(**ask) as stream:
        events = list(stream)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1, "else nothing is put together"
    (done,) = (event for event in events if event.type == "response.output_text.done")
    facts = [
        (entry.token, entry.logprob, [(top.token, top.logprob) for top in entry.top_logprobs]) for entry in entries
    ]
    for found in ([entry for event in deltas for entry in event.logprobs], done.logprobs):
        assert facts == [(one.token, one.logprob, [(t.token, t.logprob) for t in one.top_logprobs]) for one in found]
    assert events[-1].response.output[-1].content[0].logprobs == entries
    chat = client(server).chat.completions.create(
        model="default", messages=[{"role": "user", "content": "Tell me a story."}], max_tokens=32, seed=7,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert [entry.model_dump() for entry in chat.choices[0].logprobs.content] == [e.model_dump() for e in entries]


def test_a_cancelled_task_ends_the_work(server: Running, llm: LLM) -> None:
    """The async client, cancelled in the middle of a stream."""

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as mine:
            stream = await mine.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                extra_body={"dgemma": {"steps": 10**6, "stability_threshold": None, "confidence_threshold": None}},
            )
            async for _ in stream:
                pass

    async def give_up() -> None:
        task = asyncio.create_task(ask())
        while not llm.engine.load.running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    idle(llm)
    until(lambda: server.service.answers == 0)
