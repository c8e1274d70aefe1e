"""Tiny tokenizers, a tiny checkpoint with random weights, and the `dgemma` command as a subprocess."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dgemma.checkpoint import save_checkpoint
from dgemma.config import GenerationConfig, LayerConfig, ModelConfig
from dgemma.model import DiffusionGemma

REPO = Path(__file__).resolve().parent.parent
SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>",
)  # fmt: skip
TEXTS = (
    "Once upon a time there was a little girl named Lily who lived by the river.",
    "The naïve café owner paid 12 €; he laughed – and said: “Schön, nächstes Mal!”",
    "def add(a, b):\n    return a + b\n",
    "user model system thought",
)
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message.role %}{% endif %}
    {{- '<|turn>' ~ role ~ '\\n' }}
    {%- if message.role == 'system' and enable_thinking %}{{ '<|think|>\\n' }}{% endif %}
    {{- message.content | trim ~ '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif -%}
"""


def byte_level(size: int = 400) -> Tokenizer:
    """Byte-level BPE, as the default model's."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer=trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE with byte fallback and `▁` for a space, as Gemma's."""
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzOLT,.:\n"]
    vocab = {word: number for number, word in enumerate(words)}
    vocab |= {"on": len(vocab), "onc": len(vocab) + 1, "▁t": len(vocab) + 2}
    merges = [("o", "n"), ("on", "c"), ("▁", "t")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def config_json(template: str | None = None) -> dict[str, object]:
    """A `tokenizer_config.json` that transformers reads, too."""
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")}
    more = {"chat_template": template} if template else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names, **more}


def save_tokenizer(folder: Path, tokenizer: Tokenizer, template: str | None = TEMPLATE) -> Path:
    """The three files of a checkpoint that concern text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config_json()))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def save_model(folder: Path, template: str | None = TEMPLATE, max_positions: int = 256, experts: int = 4) -> Path:
    """A complete checkpoint of 60 k random parameters; denoises 16 positions in milliseconds."""
    tokenizer = byte_level()
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        layers=(
            LayerConfig(kind="sliding", num_kv_heads=1, head_dim=16),
            LayerConfig(kind="full", num_kv_heads=1, head_dim=16),
        ),
        num_experts=experts,
        top_k_experts=min(2, experts),
        expert_size=16 if experts else 0,
        sliding_window=8,
        canvas_length=16,
        max_positions=max_positions,
    )
    torch.manual_seed(0)
    model = DiffusionGemma(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    generation = GenerationConfig(max_new_tokens=24, max_denoising_steps=6, stop_tokens=(1, 6))
    save_checkpoint(folder, model, generation, {"README.md": b"---\nlicense: x\n---\n# Tiny\n\nRandom.\n"})
    save_tokenizer(folder, tokenizer, template)
    return folder


def environment(**changes: str) -> dict[str, str]:
    """The environment without settings of ours, on one thread, in UTF-8."""
    ours = ("DGEMMA_", "PYTHON", "LC_", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    fixed = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    return kept | fixed | {"XDG_CONFIG_HOME": "/nonexistent"} | changes


def dgemma(
    *arguments: str | bytes, stdin: bytes = b"", env: Mapping[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[bytes]:
    """`python -m dgemma ...` with bytes in and out."""
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, env=environment(**(env or {})), timeout=120, **options
    )  # type: ignore[call-overload,no-any-return]


def command(*arguments: str | bytes) -> Sequence[str | bytes]:
    return [sys.executable, "-m", "dgemma", *arguments]


def heed_interrupts() -> None:
    """For a child: where the tests run as a background job of a shell, SIGINT arrives ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _at_a_keyboard() -> None:
    heed_interrupts()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that ctrl-C is a signal


class Terminal:
    """A program in a pseudo-terminal: what it printed, and what it is sent."""

    def __init__(self, *arguments: str, columns: int = 80, **env: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, columns))
        self.before = termios.tcgetattr(slave)
        self._slave = slave
        self.output = b""
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(TERM="xterm-256color", **env),
            start_new_session=True,
            preexec_fn=_at_a_keyboard,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self._slave)

    def wait_for(self, text: str, seconds: float = 60.0, after: str = "") -> str:
        """Read until `text` has been printed (behind the last `after`); all that was printed so far."""
        end = time.monotonic() + seconds
        while text not in self.text[self.text.rfind(after) if after else 0 :]:
            self._read(end - time.monotonic())
            assert time.monotonic() < end, f"{text!r} never came:\n{self.text}"
        return self.text

    def wait(self, seconds: float = 60.0) -> int:
        """Read until the program has ended; its exit status."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            self._read(0.1)
            assert time.monotonic() < end, f"it does not end:\n{self.text}"
        while self._read(0.1):
            pass
        return int(self.process.returncode)

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    @property
    def text(self) -> str:
        """The output without escape sequences."""
        return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07)", "", self.output.decode(errors="replace"))

    @property
    def restored(self) -> bool:
        """Whether the terminal is as it was: its modes, and a cursor to be seen."""
        shown, hidden = self.output.rfind(b"\x1b[?25h"), self.output.rfind(b"\x1b[?25l")
        return termios.tcgetattr(self._slave) == self.before and shown >= hidden

    def _read(self, seconds: float) -> bytes:
        if not select.select([self.master], [], [], max(seconds, 0.0))[0]:
            return b""
        data = os.read(self.master, 65536)
        self.output += data
        return data
