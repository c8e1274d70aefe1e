"""Tensor names: one table from ours to Hugging Face's; the other direction is derived from it.

Knows names only: no shapes, no files. `#` stands for the layer index.
"""

from __future__ import annotations

from types import MappingProxyType

from dgemma.errors import CheckpointError

_DECODER = "model.decoder."
_ENCODER = "model.encoder.language_model."

_TABLE = MappingProxyType(
    {
        "embed.weight": "model.decoder.embed_tokens.weight",
        "norm.weight": "model.decoder.norm.weight",
        "self_conditioning.pre_norm.weight": "model.decoder.self_conditioning.pre_norm.weight",
        "self_conditioning.mlp.gate_proj.weight": "model.decoder.self_conditioning.gate_proj.weight",
        "self_conditioning.mlp.up_proj.weight": "model.decoder.self_conditioning.up_proj.weight",
        "self_conditioning.mlp.down_proj.weight": "model.decoder.self_conditioning.down_proj.weight",
        "layers.#.attention.q_proj.weight": "model.decoder.layers.#.self_attn.q_proj.weight",
        "layers.#.attention.k_proj.weight": "model.decoder.layers.#.self_attn.k_proj.weight",
        "layers.#.attention.v_proj.weight": "model.decoder.layers.#.self_attn.v_proj.weight",
        "layers.#.attention.o_proj.weight": "model.decoder.layers.#.self_attn.o_proj.weight",
        "layers.#.attention.q_norm.weight": "model.decoder.layers.#.self_attn.q_norm.weight",
        "layers.#.attention.k_norm.weight": "model.decoder.layers.#.self_attn.k_norm.weight",
        "layers.#.mlp.gate_proj.weight": "model.decoder.layers.#.mlp.gate_proj.weight",
        "layers.#.mlp.up_proj.weight": "model.decoder.layers.#.mlp.up_proj.weight",
        "layers.#.mlp.down_proj.weight": "model.decoder.layers.#.mlp.down_proj.weight",
        "layers.#.input_norm.weight": "model.decoder.layers.#.input_layernorm.weight",
        "layers.#.post_attention_norm.weight": "model.decoder.layers.#.post_attention_layernorm.weight",
        # HF: _1 and the bare `pre` belong to the dense branch, _2 to the experts, the bare `post` to the sum.
        "layers.#.pre_mlp_norm.weight": "model.decoder.layers.#.pre_feedforward_layernorm.weight",
        "layers.#.post_mlp_norm.weight": "model.decoder.layers.#.post_feedforward_layernorm_1.weight",
        "layers.#.pre_experts_norm.weight": "model.decoder.layers.#.pre_feedforward_layernorm_2.weight",
        "layers.#.post_experts_norm.weight": "model.decoder.layers.#.post_feedforward_layernorm_2.weight",
        "layers.#.post_norm.weight": "model.decoder.layers.#.post_feedforward_layernorm.weight",
        "layers.#.router.proj.weight": "model.decoder.layers.#.router.proj.weight",
        "layers.#.router.scale": "model.decoder.layers.#.router.scale",
        "layers.#.router.per_expert_scale": "model.decoder.layers.#.router.per_expert_scale",
        "layers.#.experts.gate_up_proj": "model.decoder.layers.#.experts.gate_up_proj",
        "layers.#.experts.down_proj": "model.decoder.layers.#.experts.down_proj",
        "layers.#.decoder_scalar": "model.decoder.layers.#.layer_scalar",
        # The only text tensors of HF's encoder: everything else is tied, buffers are not.
        "layers.#.encoder_scalar": "model.encoder.language_model.layers.#.layer_scalar",
        "canvas_embed": "dgemma.canvas_embed",
    }
)
_DECODER_ONLY = ("layers.#.decoder_scalar", "layers.#.encoder_scalar", "canvas_embed")
_ALIASES = {
    _ENCODER + hf.removeprefix(_DECODER): ours
    for ours, hf in _TABLE.items()
    if ours not in _DECODER_ONLY and not ours.startswith("self_conditioning.")
}
_ALIASES["lm_head.weight"] = "embed.weight"
_OURS = MappingProxyType({hf: ours for ours, hf in _TABLE.items()} | _ALIASES)

SKIPPED_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
"""Tensors of a released checkpoint that belong to a part which is not built yet."""


def hf_name(ours: str) -> str:
    """The name in HF's file of a tensor of our `state_dict`; a `CheckpointError` if we have none."""
    pattern, index = _pattern(ours)
    if ".base_layer." in ours:
        raise CheckpointError(f"tensor {ours!r} belongs to a model with a LoRA adapter: merge it, or save the adapter")
    if pattern not in _TABLE:
        raise CheckpointError(f"tensor {ours!r} has no name in the checkpoint format")
    return _TABLE[pattern].replace("#", index)


def our_name(hf: str) -> str | None:
    """Our name of a tensor in HF's file, or None. Knows the aliases that some files use for tied tensors."""
    pattern, index = _pattern(hf)
    ours = _OURS.get(pattern)
    return None if ours is None else ours.replace("#", index)


def is_skipped(hf: str) -> bool:
    """Whether a tensor of a released checkpoint is recognised but belongs to a part that is not built yet."""
    return hf.startswith(SKIPPED_PREFIXES)


def _pattern(name: str) -> tuple[str, str]:
    """`a.layers.12.b` as (`a.layers.#.b`, `12`); names without a layer index as they are."""
    parts = name.split(".")
    if "#" in parts:
        return "", ""
    for place, part in enumerate(parts[1:], start=1):
        # Only the canonical spelling: "007" or a superscript two is no index.
        if parts[place - 1] == "layers" and part.isdecimal() and str(int(part)) == part:
            return ".".join([*parts[:place], "#", *parts[place + 1 :]]), part
    return name, ""
