"""Tiny random DiffusionGemma models of `transformers`, the same weights as our model, and the peer's forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.utils import logging

from dgemma.checkpoint import our_name
from dgemma.config import ModelConfig
from dgemma.model import DiffusionGemma

logging.disable_progress_bar()

# The vision tower is not compared here; this is the smallest that transformers builds.
TINY_VISION = {
    "model_type": "gemma4_vision", "hidden_size": 4, "intermediate_size": 1, "num_hidden_layers": 0,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "patch_size": 1,
    "pooling_kernel_size": 1, "position_embedding_size": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A tiny model. `layers` is one letter per layer, s(liding) or f(ull); the last must be f."""

    vocab: int = 256
    hidden: int = 64
    dense: int = 96
    layers: str = "sfsf"
    heads: int = 4
    kv: int = 2
    full_kv: int | None = 1
    dim: int = 16
    full_dim: int = 32
    experts: int = 4
    top_k: int = 2
    expert: int = 24
    window: int = 8
    canvas: int = 16
    partial: float = 0.25
    factor: float | None = None

    def text(self) -> dict[str, Any]:
        """Keyword arguments of HF's text configuration (constructor spelling)."""
        names = {"s": "sliding_attention", "f": "full_attention"}
        factor = {} if self.factor is None else {"factor": self.factor}
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense,
            "num_hidden_layers": len(self.layers),
            "layer_types": [names[letter] for letter in self.layers],
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "num_global_key_value_heads": self.full_kv,
            "head_dim": self.dim,
            "global_head_dim": self.full_dim,
            "num_experts": self.experts,
            "top_k_experts": self.top_k,
            "moe_intermediate_size": self.expert,
            "sliding_window": self.window,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1_000_000.0,
                    "partial_rotary_factor": self.partial,
                    **factor,
                },
            },
        }


def hf_config(shape: Shape) -> DiffusionGemmaConfig:
    return DiffusionGemmaConfig(text_config=shape.text(), vision_config=dict(TINY_VISION), canvas_length=shape.canvas)


def hf_model(shape: Shape, seed: int = 0, attention: str = "sdpa") -> DiffusionGemmaForBlockDiffusion:
    """A float32 model with everything random: weights, norms, scales, and unequal non-unit layer scalars."""
    config = hf_config(shape)
    config._attn_implementation, config._experts_implementation = attention, "eager"
    model = DiffusionGemmaForBlockDiffusion(config).eval().requires_grad_(False)
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Random values in every text tensor, sized so that logits spread (std >= 1) and attention is not a spike."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if our_name(name) is None:
            continue
        if name.endswith("layer_scalar"):
            value = uniform(tensor, 0.6, 1.5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value = 0.25 + 0.1 * normal(tensor)
        elif "norm" in name or name.endswith("router.scale"):
            value = 1 + 0.3 * normal(tensor)
        elif name.endswith("per_expert_scale"):
            value = uniform(tensor, 0.4, 2.0)
        elif "embed_tokens" in name or name == "lm_head.weight":
            value = 0.5 * normal(tensor)
        else:
            value = 1.2 * normal(tensor) * tensor.shape[-1] ** -0.5
        with torch.no_grad():
            tensor.copy_(value)


def our_model(model: torch.nn.Module, config: ModelConfig | None = None) -> DiffusionGemma:
    """Our model with a copy of the weights of `transformers`' (through the name table, no files)."""
    config = config or ModelConfig.from_hf(model.config.to_dict())
    state = {our_name(name): tensor.clone() for name, tensor in model.state_dict().items() if our_name(name)}
    ours = DiffusionGemma(config).to(model.dtype)
    ours.load_state_dict(state, strict=True)
    return ours.eval().requires_grad_(False)


def saved(model: DiffusionGemmaForBlockDiffusion, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def hf_load(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> DiffusionGemmaForBlockDiffusion:
    """Never `.to(bfloat16)`: that would round the rotation frequencies."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


@dataclass
class Peer:
    """The reference's side of a comparison: a left-padded batch, its cache, and one canvas per row.

    `hidden` and `logits` are what the last `encode` or `denoise` returned.
    """

    model: DiffusionGemmaForBlockDiffusion
    pad: int = 0

    def __post_init__(self) -> None:
        self.cache: Any = None
        self.seen = torch.zeros(0, 0, dtype=torch.bool)

    def encode(self, rows: list[Tensor]) -> list[Tensor]:
        """Append ragged `rows` to the cache (ragged only the first time) -> hidden states per row."""
        width = max(len(row) for row in rows)
        ids = torch.stack([torch.cat([row.new_full((width - len(row),), self.pad), row]) for row in rows])
        fresh = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
        self.seen = fresh if self.cache is None else torch.cat([self.seen, fresh], dim=1)
        positions = (self.seen.long().cumsum(1) - 1).clamp(min=0)[:, -width:]
        out = self.model.model.encoder(
            input_ids=ids,
            attention_mask=None if bool(self.seen.all()) else self.seen.long(),
            position_ids=positions,
            past_key_values=self.cache,
        )
        self.cache = out.past_key_values
        return [hidden[width - len(row) :] for hidden, row in zip(out.last_hidden_state, rows, strict=True)]

    def denoise(self, canvas: Tensor, signal: Tensor | None = None, use: Tensor | None = None) -> Tensor:
        """Logits `[B, C, V]` of `canvas [B, C]`; `signal` are the previous logits, `use [B]` who gets them."""
        places = torch.arange(canvas.shape[1])
        whole = torch.cat([self.seen, torch.ones_like(canvas, dtype=torch.bool)], dim=1)
        return self.model(
            past_key_values=self.cache,
            decoder_input_ids=canvas,
            decoder_position_ids=self.seen.long().sum(1, keepdim=True) + places,
            decoder_attention_mask=None if bool(self.seen.all()) else whole.long(),
            self_conditioning_logits=signal,
            self_conditioning_mask=use,
        ).logits

    def head(self, hidden: Tensor) -> Tensor:
        """The decoder's head on encoder states: how Gemma 4 would predict the next token."""
        cap = self.model.final_logit_softcapping
        return torch.tanh(self.model.lm_head(hidden).float() / cap) * cap
