"""An autoregressive Gemma 4 checkpoint (HF names) as the start of a DiffusionGemma.

DiffusionGemma's backbone *is* Gemma 4's, so its names and fields are those of HF's DiffusionGemma with another prefix;
this file knows the prefix, the fields that only Gemma 4 has, and the initial values of the parts that it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgemma.checkpoint.load import Checkpoint, Naming, assemble
from dgemma.checkpoint.names import hf_name, our_name
from dgemma.config import ModelConfig
from dgemma.errors import ConfigError
from dgemma.model import DiffusionGemma
from dgemma.model.block import Block

_DIFFUSION = ("model.encoder.language_model.", "model.decoder.")
_HEAD = "lm_head.weight"
_OTHER_SENSES = ("model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio.")

# Field of HF's `Gemma4TextConfig`, its default there, and the only value that our backbone can express.
_FIXED: tuple[tuple[str, Any, Any, str], ...] = (
    ("hidden_size_per_layer_input", 256, 0, "per-layer input embeddings (PLE) have no place in DiffusionGemma"),
    ("num_kv_shared_layers", 0, 0, "every layer needs keys and values of its own"),
    ("attention_k_eq_v", False, True, "DiffusionGemma's full layers have no v_proj"),
    ("attention_bias", False, False, "the projections have no bias"),
    ("tie_word_embeddings", True, True, "the head is the embedding"),
    ("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh", "the kernels know no other activation"),
)
_ROTATIONS = (("sliding_attention", "default"), ("full_attention", "proportional"))


def load_autoregressive(
    path_or_id: str | Path,
    *,
    canvas_length: int = 256,
    canvas_positions: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """A DiffusionGemma that encodes as `Gemma4ForCausalLM` or `Gemma4ForConditionalGeneration` (text) predicts.

    `encode` and `logits` give the autoregressive model's logits; what only `denoise` uses starts as
    `add_diffusion_parts` says. `canvas_length` and `canvas_positions` are ours to choose, an autoregressive checkpoint
    has neither. The tokenizer is in the returned `folder`; `skipped` lists image and audio tensors. A feature that
    DiffusionGemma cannot express, a missing, unknown or wrong-shaped tensor is a `CheckpointError` that names it.
    """
    loaded = assemble(
        path_or_id, lambda raw: autoregressive_config(raw, canvas_length, canvas_positions), _GEMMA, device, dtype
    )
    add_diffusion_parts(loaded.model, seed)
    return loaded


def autoregressive_config(raw: Mapping[str, Any], canvas_length: int = 256, canvas_positions: int = 0) -> ModelConfig:
    """Our shape of HF's Gemma 4 `config.json`: `gemma4_text` (flat) or `gemma4` (with a `text_config`).

    A field that is absent has HF's default. What cannot be expressed is a `ConfigError` that names the field.
    """
    kind = raw.get("model_type")
    if kind == "gemma4" and isinstance(raw.get("text_config"), Mapping):
        text = {"tie_word_embeddings": raw.get("tie_word_embeddings", True), **raw["text_config"]}
    elif kind == "gemma4_text":
        text = dict(raw)
    else:
        raise ConfigError(f"model_type is {kind!r}; an autoregressive checkpoint is 'gemma4_text' or 'gemma4'")
    for field, default, needed, why in _FIXED:
        given = text.get(field, default)
        # HF writes null for "none of it" in fields that count something.
        if (needed if given is None and needed == 0 else given) != needed:
            absent = "" if field in text else " (HF's default; the field is absent)"
            raise ConfigError(f"{field} must be {needed!r}, got {given!r}{absent}: {why}")
    if not text.get("final_logit_softcapping"):
        raise ConfigError("final_logit_softcapping must be a number, got null: DiffusionGemma always bends its logits")
    rope = text.get("rope_parameters") or {}
    for layer, needed in _ROTATIONS:
        given = (rope.get(layer) or {}).get("rope_type", needed)
        if given != needed:
            raise ConfigError(f"rope_parameters.{layer}.rope_type must be {needed!r}, got {given!r}")
    if not text.get("enable_moe_block", False):
        text |= {"num_experts": 0, "top_k_experts": 0, "moe_intermediate_size": 0}
    elif not (text.get("num_experts") and text.get("moe_intermediate_size")):
        raise ConfigError("enable_moe_block is true, but num_experts or moe_intermediate_size is not given")
    top = {"canvas_length": canvas_length, "dgemma_canvas_positions": canvas_positions}
    if "eos_token_id" in raw:
        top["eos_token_id"] = raw["eos_token_id"]
    return ModelConfig.from_hf({"model_type": "diffusion_gemma", "text_config": text, **top})


@torch.no_grad()
def add_diffusion_parts(model: DiffusionGemma, seed: int = 0) -> None:
    """Give `model`, whose backbone comes from an autoregressive one, everything else `denoise` needs; in place.

    `decoder_scalar`: the layer's `encoder_scalar`, since both passes share the layer that it was tuned for.
    `self_conditioning`: norm ones, gate and up N(0, 1/fan_in), down zero. So the signal changes nothing at step 0
    (an untrained model's prediction is no help), and it can still be learnt: the gradient of `down` is not zero, and
    gate and up follow as soon as `down` has moved. `canvas_embed`: zero, as in every new model of ours.
    """
    like = model.embed.weight
    generator = torch.Generator().manual_seed(seed)
    for block in model.layers:
        assert isinstance(block, Block)
        block.decoder_scalar = block.encoder_scalar.clone()
    for name, old in list(model.self_conditioning.named_parameters()):
        if name.endswith("norm.weight"):
            value = torch.ones(old.shape)
        elif name.endswith("down_proj.weight"):
            value = torch.zeros(old.shape)
        else:
            value = torch.randn(old.shape, generator=generator) * old.shape[-1] ** -0.5
        _put(model.self_conditioning, name, value, like)
    if model.canvas_embed is not None:
        _put(model, "canvas_embed", torch.zeros(model.canvas_embed.shape), like)


def _put(root: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(module), leaf, nn.Parameter(value.to(like.device, like.dtype)))


def _is_ours_alone(ours: str) -> bool:
    """Whether a tensor of our model exists only for denoising."""
    return ours == "canvas_embed" or ours.startswith("self_conditioning.") or ours.endswith(".decoder_scalar")


def _our_name(stored: str) -> str | None:
    """Our name of a tensor of Gemma 4: HF's two classes differ in a prefix, and DiffusionGemma's encoder in another."""
    for prefix in ("model.language_model.", "model."):
        if stored.startswith(prefix):
            return our_name(_DIFFUSION[0] + stored.removeprefix(prefix))
    return our_name(stored) if stored == _HEAD else None


def _stored_name(ours: str) -> str:
    """The name in `Gemma4ForCausalLM` of one of our tensors, for messages."""
    name = hf_name(ours)
    for prefix in _DIFFUSION:
        name = name.replace(prefix, "model.")
    return name


_GEMMA = Naming(
    ours=_our_name,
    stored=_stored_name,
    skipped=lambda stored: stored.startswith(_OTHER_SENSES),
    optional=_is_ours_alone,
    part="backbone",
)
