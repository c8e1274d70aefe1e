"""The checkpoints of the speed table: seeded random weights in the usual format, for us and for transformers.

Their text means nothing; their shapes do. "default" is the shipped model and needs no making.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from dgemma.checkpoint import save_checkpoint
from dgemma.config import GenerationConfig, LayerConfig, LayerKind, ModelConfig
from dgemma.errors import RequestError
from dgemma.model import DiffusionGemma

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_SHARD = 256 * 2**20  # bytes of a file: what saving needs beside the weights
_QK_NORM = 0.25  # the reference is chaotic in float32 on random weights with larger q and k
_CARD = """\
---
license: apache-2.0
---
# {name}

Random weights (seed {seed}) for measuring speed. It writes noise.
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Full layers have one key/value head of twice the size, every sixth and the last layer is one."""

    vocab: int
    hidden: int
    layers: int
    dense: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert: int
    window: int = 1024

    def config(self) -> ModelConfig:
        def layer(index: int) -> LayerConfig:
            full = (index + 1) % 6 == 0 or index == self.layers - 1
            kind: LayerKind = "full" if full else "sliding"
            return LayerConfig(
                kind=kind,
                num_kv_heads=1 if full else self.kv_heads,
                head_dim=self.head_dim * (2 if full else 1),
            )

        return ModelConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.dense,
            num_heads=self.heads,
            layers=tuple(layer(index) for index in range(self.layers)),
            num_experts=self.experts,
            top_k_experts=self.top_k,
            expert_size=self.expert,
            sliding_window=self.window,
            max_positions=16_384,
        )


# transformers has no block without experts: "one expert" of width 8 is as dense as it gets.
SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "dense640": Shape(
            vocab=32_768, hidden=640, layers=18, dense=2048, heads=4, kv_heads=2, head_dim=256,
            experts=1, top_k=1, expert=8,
        ),
        "moe262k": Shape(
            vocab=262_144, hidden=704, layers=8, dense=528, heads=4, kv_heads=2, head_dim=256,
            experts=32, top_k=4, expert=176,
        ),
    }
)  # fmt: skip


def make_checkpoint(name: str, folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the checkpoint called `name` to `folder`; a `RequestError` for a name that is none."""
    if name not in SHAPES:
        raise RequestError(f"the checkpoint must be one of {', '.join(SHAPES)}; got {name!r}")
    return write_random(SHAPES[name].config(), folder, name, seed, dtype)


def write_random(config: ModelConfig, folder: str | Path, name: str, seed: int, dtype: torch.dtype) -> Path:
    """A complete checkpoint of `config` with random weights. Holds the weights once, in `dtype`."""
    model = random_model(config, seed, dtype)
    generation = GenerationConfig(max_new_tokens=config.canvas_length, stop_tokens=config.eos_tokens)
    files = {"README.md": _CARD.format(name=name, seed=seed).encode(), **_tokenizer_files()}
    return save_checkpoint(folder, model, generation, files, max_shard_bytes=_SHARD)


def random_model(config: ModelConfig, seed: int, dtype: torch.dtype) -> DiffusionGemma:
    """Matrices N(0, 1/fan_in), so that logits have unit spread; norms near one, those of q and k near a quarter."""
    with torch.device("meta"):
        model = DiffusionGemma(config).to(dtype)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(model.state_dict().items()):
        fill(key, tensor, generator)
    return model


def fill(key: str, tensor: Tensor, generator: torch.Generator) -> None:
    """One random weight, in place, by the law of `random_model`."""
    if key.endswith("_scalar"):
        tensor.fill_(1.0)
    elif tensor.dim() == 1:
        base = _QK_NORM if "q_norm" in key or "k_norm" in key else 1.0
        tensor.normal_(base, 0.1 * base, generator=generator)
    else:
        tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)


def _tokenizer_files() -> dict[str, bytes]:
    """A token a byte: any text can be a prompt, whatever the vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    names = {f"{token[1:-1]}_token": token for token in _SPECIAL}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
