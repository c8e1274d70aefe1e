"""`dgemma batch`: one output a line whatever happens, the same on any number of workers, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from text_kit import command, dgemma, environment, heed_interrupts, save_model

from dgemma.api import LLM
from dgemma.errors import ConfigError, DataError
from dgemma.server import batch
from dgemma.server.batch import BatchConfig, BatchProgress, run_batch
from dgemma.server.batch_journal import Journal
from dgemma.server.batch_lines import Answered, Answerer, Line
from dgemma.settings import Settings

MESSAGES = [{"role": "user", "content": "Once upon a time"}]
LINES: list[Any] = [
    {"prompt": "Once upon a time", "id": "first"},
    {"prompt": "Lily", "seed": 77, "id": 2, "max_new_tokens": 9},
    {"messages": MESSAGES},
    {"prompt": "def add(a, b):", "mode": "ar", "max_new_tokens": 4},
    {"prompt": "Once upon a time", "steps": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu")


@pytest.fixture
def settings(folder: Path) -> Settings:
    return Settings(model=str(folder), device="cpu", threads=1)


def write(path: Path, lines: Iterable[Any]) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def many(count: int) -> list[Any]:
    return [{"prompt": f"Once {number}", "id": number, "max_new_tokens": 12 + number % 9} for number in range(count)]


def test_answers_are_those_of_generate_in_input_order(tmp_path: Path, settings: Settings, llm: LLM) -> None:
    target = tmp_path / "out.jsonl"
    done = run_batch(write(tmp_path / "in.jsonl", LINES), target, replace(settings, generation={"seed": 40}))
    out = read(target)
    alone = [
        llm.generate("Once upon a time", seed=40),
        llm.generate("Lily", seed=77, max_new_tokens=9),
        llm.chat(MESSAGES, seed=42),
        llm.generate("def add(a, b):", seed=43, mode="ar", max_new_tokens=4),
        llm.generate("Once upon a time", seed=44, steps=2),
    ]
    assert [line["line"] for line in out] == [1, 2, 3, 4, 5]
    assert [line.get("id") for line in out] == ["first", 2, None, None, None]
    for line, answer in zip(out, alone, strict=True):
        assert (line["text"], line["seed"], line["steps"]) == (answer.text, answer.seed, list(answer.steps))
        assert line["completion_tokens"] == len(answer.token_ids)
    assert (done.done, done.failed, done.resumed) == (5, 0, 0)
    assert done.tokens == sum(len(answer.token_ids) for answer in alone)
    assert not target.with_name("out.jsonl.partial").exists()


def test_a_faulty_line_is_answered_by_an_error_that_names_it(tmp_path: Path, settings: Settings) -> None:
    faults = {
        b"{": "not JSON",
        b"": "empty",
        b'"text"': "must be a JSON object, got a text",
        b'{"prompt": "a\xff"}': "not UTF-8: byte 0xff",
        b'{"prompt": "a", "colour": 1}': "unknown field 'colour'",
        b'{"prompt": "a", "messages": []}': "either prompt or messages",
        b"{}": "either prompt or messages",
        b'{"prompt": 3}': "prompt must be a text, got a number",
        b'{"prompt": "a", "steps": "3"}': "steps must be a whole number, got '3'",
        b'{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens",
        b'{"prompt": "a", "max_new_tokens": 100000}': "100000",
        b'{"messages": "hello"}': "messages must be a list",
        b'{"messages": [{"role": "user"}]}': "content",
        b"[" * 100_000: "not JSON",
    }
    lines = [*faults, {"prompt": "A", "id": "last"}]
    target = tmp_path / "out.jsonl"
    done = run_batch(write(tmp_path / "in.jsonl", lines), target, settings)
    out = read(target)
    assert len(out) == len(lines) and done.failed == len(faults)
    for line, (fault, message) in zip(out, faults.items(), strict=False):
        assert line["error"]["type"] == "invalid_request_error", fault[:50]
        assert message in line["error"]["message"], fault[:50]
    assert out[-1]["id"] == "last" and "error" not in out[-1]


def test_a_fault_of_the_engine_is_told_in_its_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(prompt: Any, **overrides: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(llm, "agenerate", broken)
    (answer,) = Answerer(llm, 0, 4).answers([Line(0, b'{"prompt": "A", "id": 9}')])
    error = {"type": "server_error", "message": "MemoryError: no room"}
    assert json.loads(answer.text) == {"line": 1, "id": 9, "error": error} and answer.failed


def test_openai_lines_get_what_the_server_answers(tmp_path: Path, settings: Settings, llm: LLM) -> None:
    def line(name: str, url: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": name, "method": "POST", "url": url, "body": {"model": llm.name, **body}}

    lines = [
        line("chat", "/v1/chat/completions", messages=MESSAGES, max_tokens=8, seed=3),
        line("plain", "/v1/completions", prompt="Lily", max_tokens=8),
        line("wrong", "/v1/completions", prompt="Lily", max_tokens=-1),
        line("elsewhere", "/v1/embeddings", input="Lily"),
        line("streamed", "/v1/completions", prompt="Lily", stream=True),
    ]
    target = tmp_path / "out.jsonl"
    done = run_batch(write(tmp_path / "in.jsonl", lines), target, replace(settings, generation={"seed": 10}))
    chat, plain, wrong, elsewhere, streamed = out = read(target)
    assert [entry["custom_id"] for entry in out] == [entry["custom_id"] for entry in lines]
    assert chat["error"] is None and chat["response"]["status_code"] == 200
    text = chat["response"]["body"]["choices"][0]["message"]["content"]
    assert text == llm.chat(MESSAGES, seed=3, max_new_tokens=8).text
    assert plain["response"]["body"]["choices"][0]["text"] == llm.generate("Lily", seed=11, max_new_tokens=8).text
    assert wrong["response"]["status_code"] == 400 and "max_tokens" in json.dumps(wrong["response"]["body"]["error"])
    assert elsewhere["response"] is None and "url must be one of" in elsewhere["error"]["message"]
    assert "stream is not possible" in streamed["error"]["message"]
    assert done.failed == 3 and done.tokens == chat["response"]["body"]["usage"]["completion_tokens"] + 8


def test_openai_lines_have_the_settings_and_a_seed_of_their_own(tmp_path: Path, settings: Settings, llm: LLM) -> None:
    body = {"model": llm.name, "input": "Lily"}
    plain = {"model": llm.name, "prompt": "Lily"}
    lines = [
        {"custom_id": "responses", "method": "POST", "url": "/v1/responses", "body": body},
        {"custom_id": "own", "method": "POST", "url": "/v1/completions", "body": plain | {"max_tokens": 5}},
        {"custom_id": "plain", "method": "POST", "url": "/v1/completions", "body": plain},
    ]
    chosen: dict[str, Any] = {"max_denoising_steps": 3, "max_new_tokens": 9, "temperature": 0.5}
    target = tmp_path / "out.jsonl"
    run_batch(write(tmp_path / "in.jsonl", lines), target, replace(settings, generation=chosen | {"seed": 10}))
    responses, own, plain_ = (entry["response"]["body"] for entry in read(target))
    assert (
        responses["output"][-1]["content"][0]["text"]
        == llm.chat([{"role": "user", "content": "Lily"}], seed=10, **chosen).text
    )
    assert own["choices"][0]["text"] == llm.generate("Lily", seed=11, **chosen | {"max_new_tokens": 5}).text
    assert plain_["choices"][0]["text"] == llm.generate("Lily", seed=12, **chosen).text


def test_the_number_of_rows_changes_no_answer(tmp_path: Path, settings: Settings) -> None:
    source = write(tmp_path / "in.jsonl", [*LINES, *many(9)])
    outputs = []
    for rows in (1, 3, 64):
        run_batch(source, tmp_path / f"{rows}.jsonl", settings, BatchConfig(rows=rows))
        outputs.append((tmp_path / f"{rows}.jsonl").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]


class Counting:
    """Stands for a loaded model: answers at once, remembers what it was asked, and stops after `limit` lines."""

    def __init__(self, limit: int = 10**9) -> None:
        self.limit, self.asked = limit, list[int]()

    def answers(self, lines: Iterable[Line]) -> Iterator[Answered]:
        for line in lines:
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append(line.number)
            yield Answered(line.number, json.dumps({"line": line.number + 1}), 1, line.number == 2)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    answerer = Counting()
    monkeypatch.setattr(batch.Answerer, "load", staticmethod(lambda settings, rows: answerer))
    return answerer


def test_a_stopped_run_goes_on_and_repeats_nothing(tmp_path: Path, settings: Settings, counting: Counting) -> None:
    source, target = write(tmp_path / "in.jsonl", many(20)), tmp_path / "out.jsonl"
    counting.limit = 7
    with pytest.raises(KeyboardInterrupt):
        run_batch(source, target, settings)
    partial = tmp_path / "out.jsonl.partial"
    assert not target.exists() and partial.exists()
    with open(partial, "ab") as file:
        file.write(b'{"line": 7, "failed": fal')  # cut off by a power cut
    counting.limit = 10**9
    seen: list[BatchProgress] = []
    done = run_batch(source, target, settings, advance=seen.append)
    assert counting.asked == list(range(20)), "each line exactly once"
    assert [line["line"] for line in read(target)] == list(range(1, 21))
    assert (done.resumed, done.tokens, done.failed) == (7, 13, 1)
    assert [progress.done for progress in seen] == list(range(7, 21))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_answers_may_come_in_any_order_and_twice(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    with Journal(target, {"format": 1}, 3) as journal:
        news = [
            journal.add(Answered(n, f'{{"n": {n}, "try": {t}}}', 1, False)) for n, t in [(2, 1), (0, 1), (2, 2), (1, 1)]
        ]
        assert news == [True, True, False, True]
        journal.finish()
    assert read(target) == [{"n": 0, "try": 1}, {"n": 1, "try": 1}, {"n": 2, "try": 1}]


def test_a_journal_of_another_batch_is_not_taken_over(tmp_path: Path, settings: Settings, counting: Counting) -> None:
    source, target = write(tmp_path / "in.jsonl", many(5)), tmp_path / "out.jsonl"
    counting.limit = 2
    with pytest.raises(KeyboardInterrupt):
        run_batch(source, target, settings)
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(DataError, match="begun with other generation"):
        run_batch(source, target, replace(settings, generation={"seed": 1}))
    write(source, many(6))
    with pytest.raises(DataError, match="begun with other input_sha256, lines"):
        run_batch(source, target, settings)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept
    (tmp_path / "out.jsonl.partial").write_bytes(kept.replace(b'"failed"', b'failed"'))
    write(source, many(5))
    with pytest.raises(DataError, match="damaged at byte"):
        run_batch(source, target, settings)


def test_faults_of_the_files(tmp_path: Path, settings: Settings, counting: Counting) -> None:
    source, target = write(tmp_path / "in.jsonl", many(2)), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"missing\.jsonl cannot be read: No such file"):
        run_batch(tmp_path / "missing.jsonl", target, settings)
    with pytest.raises(DataError, match="has no lines"):
        run_batch(write(tmp_path / "empty.jsonl", []), target, settings)
    with pytest.raises(DataError, match="is the input"):
        run_batch(source, source, settings)
    with pytest.raises(DataError, match="cannot be written"):
        run_batch(source, tmp_path / "no" / "out.jsonl", settings)
    with Journal(target, {}, 2), pytest.raises(DataError, match="in use"):
        run_batch(source, target, settings)
    target.write_text("precious")
    with pytest.raises(DataError, match="exists already"):
        run_batch(source, target, settings)
    assert target.read_text() == "precious" and not target.with_name("out.jsonl.partial").exists()
    run_batch(source, target, settings, overwrite=True)
    assert len(read(target)) == 2
    for name, value in {"workers": 0, "block": -1, "rows": True, "object_store_bytes": 1}.items():
        with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
            BatchConfig(**{name: value})


def test_workers_without_ray_say_what_to_install(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    source = write(tmp_path / "in.jsonl", many(2))
    with pytest.raises(ConfigError, match=r"2 workers needs the package ray: pip install 'dgemma\[ray\]'"):
        run_batch(source, tmp_path / "out.jsonl", settings, BatchConfig(workers=2))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command("batch", *arguments, "--device", "cpu"),
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=heed_interrupts,
    )


def wait_for_answers(process: subprocess.Popen[bytes], partial: Path, count: int, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not partial.exists() or partial.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, "it is over already"
        assert time.monotonic() < end, "no answers came"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_process_loses_nothing(tmp_path: Path, folder: Path, number: int, status: int) -> None:
    source, target = write(tmp_path / "in.jsonl", many(200)), tmp_path / "out.jsonl"
    arguments = (str(source), str(target), "--model", str(folder), "--rows", "2")
    process = start(*arguments)
    wait_for_answers(process, tmp_path / "out.jsonl.partial", 10)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == status and not target.exists()
    assert (b"the same command goes on" in error) == (number != signal.SIGKILL)
    kept = read_whole(tmp_path / "out.jsonl.partial")
    assert 10 <= len(kept) < 200
    again = dgemma("batch", *arguments, "--device", "cpu")
    assert again.returncode == 0, again.stderr
    assert f"200 lines, 0 of them errors, {len(kept)} from a former run".encode() in again.stderr
    assert b"dgemma" not in again.stdout
    whole = dgemma("batch", str(source), str(tmp_path / "whole.jsonl"), "--model", str(folder), "--device", "cpu")
    assert whole.returncode == 0, whole.stderr
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [line["id"] for line in read(target)] == list(range(200))


def read_whole(partial: Path) -> list[bytes]:
    """The complete answers in a journal."""
    return [raw for raw in partial.read_bytes().splitlines(keepends=True)[1:] if raw.endswith(b"\n")]


def test_the_command_tells_faults_in_one_line(tmp_path: Path, folder: Path) -> None:
    done = dgemma("batch", str(tmp_path / "no.jsonl"), str(tmp_path / "out.jsonl"))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"no.jsonl cannot be read" in done.stderr
    source = write(tmp_path / "in.jsonl", LINES[:1])
    done = dgemma("batch", str(source), str(tmp_path / "out.jsonl"), "--model", str(folder), "-q", "--seed", "5")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert read(tmp_path / "out.jsonl")[0]["seed"] == 5


@pytest.mark.soak
def test_two_workers_of_which_one_is_killed_write_the_same_file(tmp_path: Path, folder: Path) -> None:
    """The workers are killed in the middle of their work, each once; then the driver, and a second run ends it."""
    source, target = write(tmp_path / "in.jsonl", [*LINES, b"nonsense", *many(250)]), tmp_path / "out.jsonl"
    arguments = (str(source), str(target), "--model", str(folder), "--workers", "2", "--block", "8", "--rows", "2")
    process = start(*arguments)
    partial = tmp_path / "out.jsonl.partial"
    wait_for_answers(process, partial, 16)
    (victim, *others) = workers_of(process.pid)
    assert len(others) == 1, "two workers"
    os.kill(victim, signal.SIGKILL)
    wait_for_answers(process, partial, 48)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=120)
    psutil.wait_procs(family, timeout=120)  # Ray ends by itself when its driver is gone
    kept = len(read_whole(partial))
    assert kept < 256
    again = dgemma_slow("batch", *arguments, "--device", "cpu")
    assert f"256 lines, 1 of them errors, {kept} from a former run".encode() in again
    alone = (str(source), str(tmp_path / "alone.jsonl"), "--model", str(folder), "--device", "cpu")
    dgemma_slow("batch", *alone)
    assert target.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def workers_of(driver: int) -> list[int]:
    """Process ids of the actors of a driver that load models."""
    processes = psutil.Process(driver).children(recursive=True)
    return [process.pid for process in processes if "ray::MapWorker" in " ".join(process.cmdline())]


def dgemma_slow(*arguments: str) -> bytes:
    done = subprocess.run(command(*arguments), capture_output=True, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stderr
