"""What goes wrong at a command line: one line and status 2; silence for a closed pipe; 130 for ctrl-C.

All on real processes. What can be told before the model is loaded is told then, in a fraction of a second.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import text_kit
from text_kit import Terminal, command, dgemma, environment, heed_interrupts

from dgemma.trace import TraceReader

SLOW = ("--steps", "100000", "--stability-threshold", "none")  # a canvas that does not end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_kit.save_model(tmp_path_factory.mktemp("models") / "tiny"))


def told(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of an error, without its beginning."""
    line = done.stderr.decode()
    assert done.returncode == 2, (done.returncode, line)
    assert line.startswith("dgemma: error: ") and line.count("\n") == 1 and done.stdout == b"", (line, done.stdout)
    return line.removeprefix("dgemma: error: ").rstrip("\n")


EARLY: dict[str, tuple[list[str | bytes], bytes, str]] = {
    "empty prompt": (["generate", ""], b"", "the prompt is empty"),
    "empty pipe": (["generate"], b"", "the prompt is empty"),
    "a newline only": (["generate", "-"], b"\n", "the prompt is empty"),
    "no tokens": (["generate", "x", "--max-new-tokens", "0"], b"", "max_new_tokens must be a whole number"),
    "negative tokens": (["generate", "x", "--max-new-tokens", "-5"], b"", "of at least 1, got -5"),
    "no steps": (["generate", "x", "--steps", "0"], b"", "max_denoising_steps must be a whole number"),
    "no canvas": (["generate", "x", "--canvas-length", "0"], b"", "canvas_length must be a whole number of at least 1"),
    "NaN": (["generate", "x", "--temperature", "nan"], b"", "temperature must be a number at least 0, got nan"),
    "no number": (["generate", "x", "--steps", "many"], b"", "--steps: steps must be a whole number, got 'many'"),
    "unknown flag": (["generate", "x", "--stpes", "3"], b"", "unrecognized arguments: --stpes 3 (see dgemma --help)"),
    "abbreviated flag": (["generate", "x", "--max", "3"], b"", "unrecognized arguments: --max 3"),
    "unknown mode": (["generate", "x", "--mode", "fast"], b"", "must be one of diffusion, ar, verified, got 'fast'"),
    "no command": ([], b"", "the following arguments are required: COMMAND"),
    "unknown command": (["sing"], b"", "invalid choice: 'sing'"),
    "bytes in a pipe": (["generate"], b"caf\xe9 au lait", "standard input is not UTF-8: byte 0xe9 at offset 3"),
    "bytes in an argument": (["generate", b"caf\xe9"], b"", "the prompt is not UTF-8: b'caf\\xe9'"),
    "trace is a folder": (["generate", "x", "--trace", "/"], b"", "the trace '/' cannot be written: Is a directory"),
    "trace in no folder": (["generate", "x", "--trace", "/no/t"], b"", "trace '/no/t' cannot be written: No such"),
    "no trace to replay": (["replay", "/no/t"], b"", "the trace '/no/t' cannot be read: No such file"),
    "replay of something else": (["replay", __file__], b"", "test_cli_faults.py, line 1: this is no JSON"),
    "replay at no speed": (["replay", "/no/t", "--speed", "0"], b"", "--speed must be a number more than 0"),
    "replay by steps in a pipe": (["replay", "/no/t", "--step"], b"", "--step needs a terminal"),
    "unknown device": (["generate", "x", "--device", "abacus"], b"", "device must be auto, cpu, cuda, cuda:N or mps"),
    "nothing to score": (["score", ""], b"", "the text is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", EARLY)
def test_told_at_once(case: str) -> None:
    arguments, stdin, wanted = EARLY[case]
    # A torch that cannot be imported: nothing of this needs one.
    broken = {"PYTHONPATH": f"{Path(__file__).parent}/no_torch:{text_kit.REPO}"}
    assert wanted in told(dgemma(*arguments, stdin=stdin, env=broken))


def test_settings_faults_are_told_at_once() -> None:
    assert "unknown environment variable DGEMMA_SEDE" in told(dgemma("generate", "x", env={"DGEMMA_SEDE": "1"}))


def test_told_by_the_model(model: str) -> None:
    long = "Once upon a time " * 100
    assert "the model has 256" in told(dgemma("generate", long, "--model", model))
    unknown = told(dgemma("generate", "x", "--model", model, "--sampler", "magic"))
    assert all(name in unknown for name in ("magic", "entropy_bound", "confidence", "ancestral"))


@pytest.mark.parametrize("name", ["generate", "chat", "score", "info"])
def test_a_missing_model_is_named(name: str) -> None:
    arguments = ["info", "/no/such/model"] if name == "info" else [name, "--model", "/no/such/model"]
    assert "/no/such/model" in told(dgemma(*arguments, stdin=b"x"))


def test_a_device_that_is_not_there(model: str) -> None:
    assert "no device 'cuda:9'" in told(dgemma("generate", "x", "--model", model, "--device", "cuda:9"))


def test_bytes_in_a_chat_name_their_place(model: str) -> None:
    done = dgemma("chat", "--quiet", "--model", model, "--max-new-tokens", "4", stdin=b"hi\nd\xff\n")
    assert done.returncode == 2 and done.stdout
    assert done.stderr == b"dgemma: error: standard input is not UTF-8: byte 0xff at offset 4\n"


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_locale_without_unicode(locale: dict[str, str], model: str) -> None:
    done = dgemma("generate", "Schön – 🙂".encode(), "--model", model, "--json", env=locale)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "Schön – 🙂"


def test_a_terminal_without_unicode(model: str) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with Terminal("generate", "Once", "--model", model, **locale) as terminal:
        assert terminal.wait() == 0
        assert terminal.output.isascii() and "-- canvas 1 . step 1/6" in terminal.text


# -- outputs that end -----------------------------------------------------------------------


def shell(line: str, model: str) -> subprocess.CompletedProcess[bytes]:
    """A bash line with `$CALL` for the command, on the tiny model."""
    env = environment(DGEMMA_MODEL=model) | {"CALL": " ".join(map(str, command()))}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, timeout=120)


def test_a_reader_that_leaves_is_no_error(model: str) -> None:
    done = shell('$CALL generate x --max-new-tokens 200 | head -c 1 >/dev/null; echo "${PIPESTATUS[0]}"', model)
    assert (done.stdout, done.stderr) == (b"0\n", b"")
    done = shell('$CALL generate --help | true; echo "${PIPESTATUS[0]}"', model)
    assert (done.stdout, done.stderr) == (b"0\n", b"")


def test_a_closed_output_is_an_error(model: str) -> None:
    done = shell("$CALL generate x >&-", model)
    assert done.returncode == 2 and done.stderr == b"dgemma: error: standard output is closed\n"
    assert shell("$CALL generate x >&- 2>&-", model).returncode == 2
    assert shell("$CALL generate '' 2>&-", model).returncode == 2
    assert shell("$CALL generate <&-", model).stderr.startswith(b"dgemma: error: there is no prompt")


def test_a_full_output_is_an_error(model: str) -> None:
    done = shell("$CALL generate x >/dev/full", model)
    assert done.returncode == 2
    assert done.stderr == b"dgemma: error: standard output cannot be written: No space left on device\n"
    done = shell("$CALL generate x --trace /dev/full", model)
    assert done.returncode == 2 and b"'/dev/full' cannot be written: No space left" in done.stderr
    assert b"Traceback" not in done.stderr


# -- ctrl-C ---------------------------------------------------------------------------------


def interrupted(arguments: list[str], seen: Path, number: int = signal.SIGINT) -> tuple[int, bytes, bytes]:
    """Send a signal once the trace `seen` holds a few lines; status and outputs."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command(*arguments), env=environment(), preexec_fn=heed_interrupts, **pipes)  # type: ignore[call-overload]
    try:
        while process.poll() is None and (not seen.exists() or seen.read_bytes().count(b"\n") < 4):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def test_ctrl_c_in_a_pipe_keeps_what_there_is(model: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    slow = ["generate", "Once", "--model", model, "--trace", str(trace), "--mode", "ar", "--max-new-tokens", "240"]
    status, out, err = interrupted(slow, trace)
    assert (status, err) == (130, b"") and out.endswith(b"\n")
    replayed = dgemma("replay", str(trace))
    assert replayed.returncode == 0 and replayed.stdout == out


def test_ctrl_c_with_json_is_still_json(model: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    status, out, err = interrupted(["generate", "x", "--model", model, "--json", "--trace", str(trace), *SLOW], trace)
    assert (status, err) == (130, b"")
    assert json.loads(out)["finish_reason"] == "abort"
    assert len(list(TraceReader.open(trace))) >= 3


def test_a_termination_is_quiet(model: str, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    slow = ["generate", "x", "--model", model, "--trace", str(trace), *SLOW]
    assert interrupted(slow, trace, signal.SIGTERM) == (143, b"", b"")


def test_ctrl_c_in_a_terminal_leaves_it_in_order(model: str) -> None:
    with Terminal("generate", "Once upon", "--model", model, *SLOW) as terminal:
        terminal.wait_for("canvas 1")
        terminal.send("\x03")
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.text and "interrupted · 0 tokens" in terminal.text
        assert terminal.text.rsplit("──", 1)[-1].count("Once upon") >= 1  # the canvas, as it was last seen
        assert terminal.restored
