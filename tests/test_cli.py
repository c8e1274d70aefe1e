"""The `dgemma` command on a tiny random model: what it prints into pipes and terminals, and its exit status."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import text_kit
from text_kit import Terminal, dgemma

import dgemma as package
from dgemma.api import LLM
from dgemma.cli import COMMANDS, main
from dgemma.events import Committed, Draft, Finished
from dgemma.trace import TraceReader
from dgemma.view import Progress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_kit.save_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("DGEMMA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """In this process, for speed: what a pipe would get."""
    status = main(arguments)
    said = capsys.readouterr()
    assert status == 0, said.err
    assert said.err == ""
    return said.out


# -- generate -------------------------------------------------------------------------------


def test_generate_into_a_pipe_is_the_text_alone(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = LLM.load(model).generate("Once upon", seed=5).text
    assert run(capsys, "generate", "Once upon", "--model", model, "--seed", "5").removesuffix(
        "\n"
    ) == text.removesuffix("\n")


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_json_agrees_with_the_library(mode: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    got = json.loads(run(capsys, "generate", "Once", "--model", model, "--json", "--mode", mode, "--seed", "1"))
    want = LLM.load(model).generate("Once", mode=mode, seed=1)
    assert got["text"] == want.text and got["token_ids"] == list(want.token_ids)
    assert got["steps"] == list(want.steps) and got["stops"] == list(want.stops)
    assert (got["seed"], got["mode"], got["model"]) == (1, mode, "tiny")
    assert got["finish_reason"] == want.finish_reason and got["prompt"] == "Once"
    assert got["prompt_tokens"] == len(want.prompt_token_ids)
    assert got["tokens_per_forward"] == pytest.approx(want.tokens_per_forward, abs=1e-4)
    assert got["seconds"] > 0


def test_every_generation_flag_reaches_the_model(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "t.jsonl"
    flags = {
        "max-new-tokens": 9, "steps": 3, "seed": 4, "canvas-length": 8, "sampler": "confidence", "entropy-bound": 0.2,
        "accept-confidence": 0.5, "t-max": 1.5, "t-min": 0.5, "temperature": 0.7, "top-k": 9, "top-p": 1.0,
        "stability-threshold": 2, "confidence-threshold": 0.5, "convention": "jax", "mode": "diffusion",
    }  # fmt: skip
    written = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run(capsys, "generate", "x", "--model", model, "--trace", str(trace), *written)
    told = TraceReader.open(trace).header.settings
    names = {name.replace("-", "_"): value for name, value in flags.items()}
    names["max_denoising_steps"] = names.pop("steps")
    assert {name: told[name] for name in names} == names


def test_environment_and_file_reach_the_model(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"model = {json.dumps(model)}\nseed = 8\nmax_new_tokens = 5\n")
    monkeypatch.setenv("DGEMMA_CONFIG", str(config))
    monkeypatch.setenv("DGEMMA_SEED", "9")
    got = json.loads(run(capsys, "generate", "x", "--json"))
    assert got["seed"] == 9 and len(got["token_ids"]) <= 5


@pytest.mark.parametrize(
    ("arguments", "given"), [(["-"], b"Once\n"), ([], b"Once\n"), ([], b"Once\r\n"), ([], b"Once")]
)
def test_a_prompt_from_a_pipe(
    arguments: list[str], given: bytes, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert json.loads(run(capsys, "generate", *arguments, "--model", model, "--json"))["prompt"] == "Once"


def test_trace_and_replay(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    text = run(capsys, "generate", "Once", "--model", model, "--trace", str(trace), "--seed", "2")
    assert run(capsys, "replay", str(trace)) == text
    reader, progress = TraceReader.open(trace), Progress()
    kinds = set()
    for moment in reader:
        progress.observe(moment)
        kinds.add(type(moment.event))
    assert kinds == {Draft, Committed, Finished} and progress.text == text.removesuffix("\n")
    assert reader.header.prompt == "Once" and reader.header.model == "tiny" and reader.header.seed == 2


# -- the other commands ---------------------------------------------------------------------


def test_score(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    want = LLM.load(model).score("Lily ran.", prompt="Once")
    got = json.loads(run(capsys, "score", "Lily ran.", "--prompt", "Once", "--model", model, "--json"))
    assert got["total"] == pytest.approx(want.total) and got["bits_per_byte"] == pytest.approx(want.bits_per_byte)
    assert got["token_ids"] == list(want.token_ids) and len(got["logprobs"]) == len(want.token_ids)
    text = run(capsys, "score", "Lily ran.", "--prompt", "Once", "--model", model)
    assert f"bits per byte   {want.bits_per_byte:.4f}\n" in text and f"{want.total:.4f} nats" in text


def test_info(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(run(capsys, "info", model, "--json"))
    llm = LLM.load(model)
    weights = dict(llm.engine.runner.model.named_parameters())
    total = sum(weight.numel() for weight in weights.values())
    assert facts["parameters"]["total"] == total
    assert facts["parameters"]["active"] == total - facts["parameters"]["experts"] // 2
    assert facts["weights"]["bytes"] == (Path(model) / "model.safetensors").stat().st_size
    assert facts["generation"]["max_denoising_steps"] == 6 and facts["tokenizer"]["chat_template"] is True
    assert facts["card"] == "# Tiny\n\nRandom." and facts["files"]["README.md"] == 35
    text = run(capsys, "info", model)
    assert text.startswith(f"tiny ({model})\n") and "sliding window           8\n" in text


def test_info_of_a_broken_folder_tells_what_there_is(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    facts = json.loads(run(capsys, "info", str(tmp_path), "--json"))
    assert "tokenizer.json is missing" in facts["tokenizer"]["problem"]
    assert "neither model.safetensors" in facts["weights"]["problem"]


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    return main(["chat", *arguments])


def test_chat_in_a_pipe(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, Any]]] = []
    stream = LLM.chat_stream

    def spy(self: LLM, messages: Any, **options: Any) -> Any:
        asked.append([*messages, options["seed"]])
        return stream(self, messages, **options)

    monkeypatch.setattr(LLM, "chat_stream", spy)
    script = "Hi\n\nMore\n/seed 7\n//slash\n/reset\nAgain\n/quit\nNever\n"
    assert chat(monkeypatch, script, "--model", model, "--seed", "1", "--system", "Be.", "--max-new-tokens", "6") == 0
    roles = [[m["role"] for m in messages[:-1]] for messages in asked]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert [messages[-1] for messages in asked] == [1, 1, 7, 7]
    assert [messages[-2]["content"] for messages in asked] == ["Hi", "More", "/slash", "Again"]
    said = capsys.readouterr()
    answers = [m["content"] for m in asked[2] if not isinstance(m, int) and m["role"] == "assistant"]
    assert said.out.startswith(answers[0].rstrip("\n") + "\n" + answers[1].rstrip("\n"))
    assert said.err.startswith("tiny · float32 on cpu")


def test_chat_needs_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_kit.save_model(tmp_path / "base", template=None)
    assert chat(monkeypatch, "Hi\n", "--model", str(folder)) == 2
    assert capsys.readouterr().err == "dgemma: error: the model 'base' has no chat template; use `dgemma generate`\n"


def test_chat_says_that_a_model_is_a_demo(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgemma.api._SHIPPED", Path(model).parent)
    assert chat(monkeypatch, "", "--model", model) == 0
    assert "small demo model" in (told := capsys.readouterr().err)
    assert "dgemma chat --model google/diffusiongemma-26B-A4B-it" in told


def test_version_and_help() -> None:
    assert dgemma("--version").stdout.decode() == f"dgemma {package.__version__}\n"
    told = dgemma("--help").stdout.decode()
    assert all(f"    {command.NAME}" in told and command.HELP in told for command in COMMANDS)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from dgemma.cli import main; main(['chat', '--help']); assert 'torch' not in sys.modules"
    env = text_kit.environment()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert b"--max-new-tokens" in done.stdout


# -- terminals ------------------------------------------------------------------------------


def test_generate_in_a_terminal(model: str) -> None:
    with Terminal("generate", "Once upon", "--model", model, "--seed", "1", columns=110) as terminal:
        assert terminal.wait() == 0
        text = terminal.text
        assert "── canvas 1 · step 1/6 ━━━━━━━━━━━━ · T 0.80 · entropy" in text and "canvas 2" in text
        assert "token limit · 24 tokens in " in text and "6+6 steps" in text and "seed 1" in text
        assert b"\x1b[38;2;" in terminal.output or b"\x1b[38;5;" in terminal.output
        assert terminal.restored


@pytest.mark.parametrize(("flag", "told"), [("--no-live", True), ("--quiet", False)])
def test_a_terminal_without_the_canvas(flag: str, told: bool, model: str) -> None:
    with Terminal("generate", "Once upon", "--model", model, flag) as terminal:
        assert terminal.wait() == 0
        assert "canvas 1" not in terminal.text
        assert ("token limit" in terminal.text) == told and ("Once upon" in terminal.text) == told


def test_chat_in_a_terminal(model: str) -> None:
    with Terminal("chat", "--model", model, "--max-new-tokens", "8") as terminal:
        assert "ctrl-D" in terminal.wait_for("› ")
        terminal.send("hello\n")
        terminal.wait_for("token limit · 8 tokens")
        terminal.send("/nonsense\n")
        terminal.wait_for("dgemma: error: unknown command /nonsense; known: /reset, /seed N, /help, /quit")
        terminal.send("/help\n")
        terminal.wait_for("forget the conversation")
        # Only at the prompt is ctrl-D a key; before that, switching the terminal's mode may swallow it.
        terminal.wait_for("› ", after="forget the conversation")
        terminal.send("\x04")
        assert terminal.wait() == 0 and terminal.restored


def test_ctrl_c_in_a_chat_stops_the_answer_only(model: str) -> None:
    slow = ("--steps", "100000", "--stability-threshold", "none")
    with Terminal("chat", "--model", model, *slow) as terminal:
        terminal.wait_for("› ")
        terminal.send("hello\n")
        terminal.wait_for("canvas 1")
        terminal.send("\x03")
        terminal.wait_for("stopped; the conversation goes on without this turn")
        terminal.wait_for("› ")
        terminal.send("/quit\n")
        assert terminal.wait() == 0 and "Traceback" not in terminal.text


def test_replay_in_a_terminal(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.jsonl"
    run(capsys, "generate", "Once", "--model", model, "--trace", str(trace))
    with Terminal("replay", str(trace), "--speed", "50") as terminal:
        assert terminal.wait() == 0
        assert "canvas 1" in terminal.text and "token limit · 24 tokens" in terminal.text and terminal.restored
    with Terminal("replay", str(trace), "--step") as terminal:
        terminal.wait_for("step 1/6")
        terminal.send(" ")
        terminal.wait_for("step 2/6")
        terminal.send("q")
        assert terminal.wait() == 0
        assert "interrupted" in terminal.text and "step 3/6" not in terminal.text and terminal.restored


# -- the shipped model ----------------------------------------------------------------------


@pytest.mark.skipif(
    not (text_kit.REPO / "dgemma/models/default/config.json").is_file(), reason="no model is shipped yet"
)
def test_the_shipped_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    got = json.loads(run(capsys, "generate", "Once upon a time", "--json", "--max-new-tokens", "40"))
    assert got["model"] == "default" and got["text"].isprintable()
    facts = json.loads(run(capsys, "info", "--json"))
    assert facts["name"] == "default" and "problem" not in facts["weights"] | facts["tokenizer"]
    assert chat(monkeypatch, "Tell me a story about a fox.\n", "--max-new-tokens", "40") == 0
    said = capsys.readouterr()
    assert "small demo model" in said.err and said.out.strip()
