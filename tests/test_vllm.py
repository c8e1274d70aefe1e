"""`serve --engine vllm`: vLLM's command line for a checkpoint, what is said first, and its life as a child process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from text_kit import environment, save_model

from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.errors import CheckpointError, ConfigError
from dgemma.quant import make_format
from dgemma.server import vllm
from dgemma.server.config import ServerConfig
from dgemma.server.vllm import plan, serve_vllm
from dgemma.settings import Settings

SERVER = ServerConfig(host="127.0.0.1", port=8011)


def settings(folder: Path | str, **generation: Any) -> Settings:
    return Settings(model=str(folder), generation=generation)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "tiny")


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def options(arguments: tuple[str, ...]) -> dict[str, str]:
    """Flags with their values; the first two arguments are the command and the model."""
    assert arguments[0] == "serve"
    flags: dict[str, str] = {}
    for argument in arguments[2:]:
        if argument.startswith("--"):
            flags[last := argument] = ""
        else:
            assert flags[last] == "", "one value a flag"
            flags[last] = argument
    return flags


def test_the_command_line_for_the_shipped_model() -> None:
    made = plan(settings("default"), SERVER, 1)
    assert made.arguments[1] == str(Path(vllm.__file__).parents[1] / "models" / "default")
    assert options(made.arguments) == {
        "--served-model-name": "default",
        "--host": "127.0.0.1",
        "--port": "8011",
        "--tensor-parallel-size": "1",
        "--max-num-seqs": "256",
        "--attention-backend": "TRITON_ATTN",
        "--diffusion-config": '{"canvas_length": 16}',
        "--generation-config": "vllm",
        "--limit-mm-per-prompt": '{"image": 0, "video": 0}',
        "--reasoning-parser": "gemma4",
    }
    assert made.environment == {"VLLM_USE_V2_MODEL_RUNNER": "1"} and not made.generation


def test_the_command_line_for_a_checkpoint_as_released(folder: Path) -> None:
    """A vocabulary of 262,144 and canvases of 256 leave room for 4 canvases of logits; images and tools are on."""

    def enlarge(data: dict[str, Any]) -> None:
        data["canvas_length"] = 256
        data["text_config"] |= {"vocab_size": 262_144, "num_attention_heads": 16}
        data["vision_config"] = {"model_type": "gemma4_vision", "num_hidden_layers": 27}

    edit(folder, "config.json", enlarge)
    (folder / "chat_template.jinja").write_text("{{ '<|tool_call>' }}")
    server = replace(SERVER, host="0.0.0.0", port=9, api_keys=("secret",), cors_origins=("https://a.example",))
    made = plan(Settings(model=str(folder), dtype="bfloat16"), server, 6, ("--max-model-len", "4096"))
    flags = options(made.arguments)
    assert made.arguments[1] == str(folder) and made.arguments[-2:] == ("--max-model-len", "4096")
    assert flags["--max-num-seqs"] == "4" and flags["--diffusion-config"] == '{"canvas_length": 256}'
    assert flags["--tensor-parallel-size"] == "4", "16 heads on 6 GPUs"
    assert (flags["--host"], flags["--port"], flags["--dtype"]) == ("0.0.0.0", "9", "bfloat16")
    assert "--limit-mm-per-prompt" not in flags
    assert flags["--tool-call-parser"] == "gemma4" and "--enable-auto-tool-choice" in flags
    assert flags["--allowed-origins"] == '["https://a.example"]'
    assert made.environment["VLLM_API_KEY"] == "secret" and "secret" not in " ".join(made.arguments)


def test_settings_of_the_server_become_a_generation_config(folder: Path) -> None:
    made = plan(settings(folder, max_denoising_steps=12, entropy_bound=0.2, canvas_length=8), SERVER, 1)
    flags = options(made.arguments)
    assert "--generation-config" not in flags and flags["--diffusion-config"] == '{"canvas_length": 8}'
    assert made.generation["max_denoising_steps"] == 12
    assert made.generation["sampler_config"] == {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2}
    assert made.generation["stability_threshold"] == 1 and made.generation["eos_token_id"] == [1, 6]
    assert "max_new_tokens" not in made.generation, "it would cap every request"
    assert "max_denoising_steps 12, t_min 0.4" in made.notes[-1]


def test_a_checkpoint_that_says_nothing_of_the_sampler_gets_a_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    made = plan(settings(folder), SERVER, 1)
    assert made.generation["t_max"] == 0.8 and made.generation["max_denoising_steps"] == 48


def test_what_vllm_will_refuse_is_told(folder: Path) -> None:
    told = " ".join(plan(settings(folder), SERVER, 1).notes)
    for word in ("temperature", "seed", "logit_bias", "structured output", "presence_penalty", "include_canvas"):
        assert word in told


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"seed": 3}, "no setting seed for a whole server"),
        ({"mode": "ar"}, "no setting mode"),
        ({"max_new_tokens": 9}, "no setting max_new_tokens"),
        ({"confidence_threshold": None}, "confidence_threshold must be a number, got none"),
        ({"t_min": 5.0}, "t_max must be greater than t_min"),
    ],
)
def test_settings_that_vllm_does_not_have(folder: Path, generation: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(settings(folder, **generation), SERVER, 1)


def test_checkpoints_that_vllm_cannot_read(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(folder, tmp_path / "small", make_format("int8wo", None))
    with pytest.raises(CheckpointError, match="small is in dgemma's format int8wo"):
        plan(settings(tmp_path / "small"), SERVER, 1)
    with pytest.raises(ConfigError, match="one API key, got 2"):
        plan(settings(folder), replace(SERVER, api_keys=("a", "b")), 1)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        plan(settings(tmp_path / "none"), SERVER, 1)
    edit(folder, "config.json", lambda data: data.update(dgemma_canvas_positions=16))
    with pytest.raises(CheckpointError, match="canvas positions"):
        plan(settings(folder), SERVER, 1)
    edit(
        folder,
        "config.json",
        lambda data: (data.pop("dgemma_canvas_positions"), data["text_config"].update(num_experts=None)),
    )
    with pytest.raises(CheckpointError, match="dense block"):
        plan(settings(folder), SERVER, 1)


def test_without_vllm_and_without_a_gpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"the command vllm is not found: pip install 'vllm>=0\.24'"):
        serve_vllm(settings(folder), SERVER)
    fake(tmp_path, "raise SystemExit")
    monkeypatch.setattr(vllm, "gpu_count", lambda: 0)
    with pytest.raises(ConfigError, match="there is no GPU here"):
        serve_vllm(settings(folder), SERVER)
    monkeypatch.setattr(vllm.importlib.metadata, "version", lambda name: "0.23.1")
    with pytest.raises(ConfigError, match=r"vLLM 0\.23\.1 does not know DiffusionGemma"):
        serve_vllm(settings(folder), SERVER)


# -- its life, with something else in vLLM's place -----------------------------------

SLOW_START = """
import http.server, json, os, signal, sys, time
flags = dict(zip(sys.argv[3::2], sys.argv[4::2]))
def stop(number, frame):
    print("told", number, flush=True)
    sys.exit(0 if number == signal.SIGTERM else 7)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
time.sleep(1)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        folder = flags["--generation-config"]
        config = open(folder + "/generation_config.json").read() if folder != "vllm" else "{}"
        self.send_response(200)
        self.end_headers()
        seen = {"argv": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"), "config": config}
        self.wfile.write(json.dumps(seen).encode())
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(flags["--port"])), Answer).serve_forever()
"""
RUN = """
import sys
from dgemma.errors import DgemmaError
from dgemma.server import vllm
from dgemma.server.config import ServerConfig
from dgemma.settings import Settings
vllm.gpu_count = lambda: 2
settings = Settings(model=sys.argv[1], generation={"max_denoising_steps": 9})
server = ServerConfig(port=int(sys.argv[2]), api_keys=("k",))
try:
    status = vllm.serve_vllm(settings, server, announce=lambda line: print(line, flush=True))
except DgemmaError as error:
    print("error:", error, flush=True)
    status = 2
sys.exit(status)
"""


def fake(folder: Path, code: str) -> None:
    """An executable `vllm` in a folder."""
    path = folder / "vllm"
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(0o755)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Child:
    """`serve_vllm` in a process of its own, with a fake vllm."""

    def __init__(self, folder: Path, place: Path, code: str) -> None:
        place.mkdir()
        fake(place, code)
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), str(self.port)],
            stdout=subprocess.PIPE,
            env=environment(PATH=f"{place}{os.pathsep}{os.environ['PATH']}"),
            text=True,
        )
        self.lines: list[str] = []

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came: {self.lines}")

    def end(self) -> int:
        rest, _ = self.process.communicate(timeout=120)
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def launch(code: str) -> Child:
        children.append(Child(folder, tmp_path / f"bin{len(children)}", code))
        return children[-1]

    yield launch
    for child in children:
        child.process.kill()
        child.process.wait()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 7), (signal.SIGHUP, 7)])
def test_it_waits_for_health_and_passes_signals_on(
    start: Callable[[str], Child], folder: Path, number: int, status: int
) -> None:
    child = start(SLOW_START)
    child.read_until("vLLM answers on")
    before = "".join(child.lines)
    assert "vLLM answers 400 to requests with temperature" in before and "max_denoising_steps 9" in before
    with urllib.request.urlopen(f"http://127.0.0.1:{child.port}/health", timeout=60) as answer:
        seen = json.load(answer)
    assert seen["argv"][:2] == ["serve", str(folder)] and seen["key"] == "k"
    assert json.loads(seen["config"])["max_denoising_steps"] == 9
    child.process.send_signal(number)
    assert child.end() == status
    assert f"told {int(number)}\n" in child.lines, "once, and by us"


def test_its_end_before_it_answered_is_an_error(start: Callable[[str], Child]) -> None:
    child = start("raise SystemExit(3)")
    assert child.end() == 2
    assert "error: vllm ended with status 3 before it answered" in child.lines[-1]


def test_its_own_end_gives_its_status(start: Callable[[str], Child]) -> None:
    child = start(SLOW_START)
    child.read_until("vLLM answers on")
    (running,) = psutil.Process(child.process.pid).children()
    running.kill()
    assert child.end() == 128 + signal.SIGKILL


def test_it_does_not_outlive_us(start: Callable[[str], Child]) -> None:
    child = start(SLOW_START)
    child.read_until("vLLM answers on")
    (running,) = psutil.Process(child.process.pid).children()
    child.process.kill()
    end = time.monotonic() + 60
    while running.is_running() and running.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "it holds the GPUs still"
        time.sleep(0.05)
