"""`dgemma serve --engine vllm`: one model over several GPUs, by stock vLLM on our checkpoints, which are HF's.

Builds vLLM's command line for a checkpoint, says what vLLM refuses, starts it, waits until it answers and passes
signals on. What vLLM does and reads is that of its versions 0.24 to 0.32. Knows no HTTP beyond one probe.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgemma.checkpoint.files import CONFIG, GENERATION, find_folder, read_json
from dgemma.checkpoint.quantized import MAKER, SECTION
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.errors import CheckpointError, ConfigError, RequestError
from dgemma.server.config import ServerConfig
from dgemma.settings import Settings
from dgemma.text.chat import CHANNEL_CLOSE, CHANNEL_OPEN
from dgemma.text.tokenizer import Tokenizer

OLDEST = (0, 24)
PER_SERVER = (
    "max_denoising_steps", "t_min", "t_max", "entropy_bound", "stability_threshold", "confidence_threshold",
    "canvas_length",
)  # fmt: skip
"""Fields of `GenerationConfig` that vLLM takes when it starts; the others it takes per request or not at all."""
REFUSED = (
    "vLLM answers 400 to requests with temperature other than 1, seed, min_p, min_tokens, logit_bias, bad_words, "
    "allowed_token_ids, response_format or another structured output",
    "vLLM ignores presence_penalty, frequency_penalty, repetition_penalty, the object dgemma and "
    "stream_options.include_canvas",
    "vLLM has one sampler (entropy_bound), one canvas width and no mode ar; there are no drafts, no traces and no page",
)
_LOGITS_BYTES = 2**30  # vLLM holds float32 logits of every canvas in a pass
_PROBE_S = 0.5
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Plan:
    """What to run: arguments behind `vllm`, variables to add, and lines to tell the user first."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    notes: tuple[str, ...]
    generation: Mapping[str, Any] = field(default_factory=dict)
    """A `generation_config.json` to start with instead of the checkpoint's; empty: the checkpoint's holds."""


def plan(settings: Settings, server: ServerConfig, gpus: int, extra: tuple[str, ...] = ()) -> Plan:
    """The command line of `vllm serve` for a checkpoint on at most so many GPUs. `extra` goes behind it, as it is.

    Raises `CheckpointError` for a checkpoint and `ConfigError` for settings that vLLM cannot take.
    """
    folder, name = find_folder(settings.model, weights=False)
    local = Path(settings.model).expanduser().is_dir() or "/" not in name
    raw = read_json(folder / CONFIG)
    if isinstance(raw.get(SECTION), dict) and raw[SECTION].get("made_by") == MAKER:
        raise CheckpointError(
            f"{name} is in dgemma's format {raw[SECTION].get('format')}; vLLM needs the plain weights"
        )
    model = ModelConfig.from_hf(raw)
    if model.canvas_positions:
        raise CheckpointError(f"{name} has an embedding of canvas positions, which vLLM does not know")
    if not model.num_experts:
        raise CheckpointError(f"{name} has a dense block; vLLM's DiffusionGemma needs experts")
    generation, own = _generation(folder, model, settings)
    width = generation.canvas_length or model.canvas_length
    parallel = max(n for n in range(1, max(gpus, 1) + 1) if model.num_heads % n == 0)
    arguments = [
        "serve", str(folder.resolve()) if local else name,
        "--served-model-name", name,
        "--host", server.host,
        "--port", str(server.port),
        "--tensor-parallel-size", str(parallel),
        "--max-num-seqs", str(max(1, min(256, _LOGITS_BYTES // (width * model.vocab_size * 4)))),
        "--attention-backend", "TRITON_ATTN",
        "--diffusion-config", json.dumps({"canvas_length": width}),
    ]  # fmt: skip
    if not own:
        # Else max_new_tokens of generation_config.json would cap every request.
        arguments += ["--generation-config", "vllm"]
    vision = raw.get("vision_config")
    if not isinstance(vision, dict) or not vision.get("num_hidden_layers", 1):
        arguments += ["--limit-mm-per-prompt", json.dumps({"image": 0, "video": 0})]
    arguments += _parsers(folder)
    if server.cors_origins:
        arguments += ["--allowed-origins", json.dumps(list(server.cors_origins))]
    if settings.dtype != "auto":
        arguments += ["--dtype", settings.dtype]
    if len(server.api_keys) > 1:
        raise ConfigError(f"vLLM takes one API key, got {len(server.api_keys)}")
    # Not as an argument, where every user of the machine could read it.
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1"} | ({"VLLM_API_KEY": server.api_keys[0]} if server.api_keys else {})
    values = {name: getattr(generation, name) for name in PER_SERVER} | {"canvas_length": width}
    chosen = "for every request: " + ", ".join(f"{name} {value}" for name, value in values.items())
    return Plan((*arguments, *extra), environment, (*REFUSED, chosen), own)


def _generation(folder: Path, model: ModelConfig, settings: Settings) -> tuple[GenerationConfig, dict[str, Any]]:
    """What holds, and the file that says so where the checkpoint's does not."""
    for name in settings.generation:
        if name not in PER_SERVER:
            raise ConfigError(f"vLLM has no setting {name} for a whole server; it takes {', '.join(PER_SERVER)}")
    stored = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    try:
        generation = GenerationConfig.from_hf(stored, model).with_(**settings.generation)
    except RequestError as error:
        raise ConfigError(f"{folder / GENERATION}: {error}") from None
    for name in ("stability_threshold", "confidence_threshold"):
        if getattr(generation, name) is None:
            raise ConfigError(f"vLLM always stops a canvas by its rule; {name} must be a number, got none")
    if generation.sampler != "entropy_bound":
        raise ConfigError(f"vLLM's only sampler is entropy_bound, got {generation.sampler!r}")
    plain = generation.to_hf()
    del plain["max_new_tokens"]
    same = all(
        stored.get(name) == value for name, value in plain.items() if name not in ("eos_token_id", "pad_token_id")
    )
    return generation, {} if same else plain


def _parsers(folder: Path) -> list[str]:
    """Flags for thoughts and tool calls, where the tokenizer has the tokens and the template the words for them."""
    tokenizer = Tokenizer.load(folder)
    found = []
    if tokenizer.token_id(CHANNEL_OPEN) is not None and tokenizer.token_id(CHANNEL_CLOSE) is not None:
        found += ["--reasoning-parser", "gemma4"]
    template = folder / "chat_template.jinja"
    if template.exists() and "<|tool_call>" in template.read_text(encoding="utf-8"):
        found += ["--enable-auto-tool-choice", "--tool-call-parser", "gemma4"]
    return found


def serve_vllm(
    settings: Settings,
    server: ServerConfig,
    *,
    extra: tuple[str, ...] = (),
    announce: Callable[[str], object] = lambda line: None,
) -> int:
    """Run vLLM until it ends; its exit status, 0 if it was told to stop.

    SIGTERM, SIGINT and SIGHUP go on to vLLM. Raises `ConfigError` where vLLM or a GPU is missing, or when vLLM ends
    before it has answered.
    """
    gpus = gpu_count()
    made = plan(settings, server, gpus, extra)
    executable = shutil.which("vllm")
    if executable is None:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"the command vllm is not found: pip install 'vllm>={oldest}' (it needs Linux and a GPU)")
    _check_version()
    if gpus == 0:
        raise ConfigError("there is no GPU here (torch sees 0 CUDA devices), and vLLM needs one; leave --engine out")
    for line in made.notes:
        announce(line)
    with tempfile.TemporaryDirectory(prefix="dgemma-vllm-") as folder:
        arguments = list(made.arguments)
        if made.generation:
            (Path(folder) / GENERATION).write_text(json.dumps(made.generation), encoding="utf-8")
            arguments += ["--generation-config", folder]
        announce("vllm " + " ".join(arguments))
        return _run([executable, *arguments], {**os.environ, **made.environment}, server, announce)


def _run(
    command: list[str], environment: Mapping[str, str], server: ServerConfig, announce: Callable[[str], object]
) -> int:
    told: list[int] = []
    # A session of its own: a ctrl-C must reach vLLM once, through us.
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)

    def pass_on(number: int, frame: object) -> None:
        told.append(number)
        process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        answered = False
        while not answered and process.poll() is None:
            answered = _answers(server)
            if not answered:
                time.sleep(_PROBE_S)
        if answered:
            announce(f"vLLM answers on http://{server.host}:{server.port}")
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
            process.wait()
    if told:
        return 0 if status == 0 or -status in told else status % 256
    if not answered:
        raise ConfigError(f"vllm ended with status {status} before it answered; its output above says why")
    return status if status >= 0 else 128 - status


def _answers(server: ServerConfig) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    try:
        with urllib.request.urlopen(f"http://{host}:{server.port}/health", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _end_with_parent() -> None:
    """In the child: be told to stop if dgemma is killed, for nobody else would free the GPUs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _check_version() -> None:
    try:
        version = importlib.metadata.version("vllm")
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return  # installed elsewhere, or a build of one's own
    if numbers < OLDEST:
        raise ConfigError(
            f"vLLM {version} does not know DiffusionGemma; it needs {'.'.join(map(str, OLDEST))} or later"
        )


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
