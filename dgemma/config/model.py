"""The model's shape, and how Hugging Face's `config.json` spells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dgemma.errors import ConfigError

LayerKind = Literal["sliding", "full"]
_HF_KINDS: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "full"}
_MODEL_TYPES = ("diffusion_gemma", "diffusion_gemma4")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Attention shape of one layer. `kind` decides window, rotation and whether V is K."""

    kind: LayerKind
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotation of one layer kind: `theta`, the share of dims that turn, and the frequency divisor."""

    theta: float
    partial: float = 1.0
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a DiffusionGemma text model (source: HF `DiffusionGemmaTextConfig`).

    `num_experts = 0` selects Gemma 4's dense block, which HF's DiffusionGemma cannot build.
    `canvas_positions > 0` adds a learned embedding of that many canvas positions (ours; absent from released
    checkpoints, zero-initialised). `canvas_widths` (ours, too) are the widths of a model trained at several, ascending.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    layers: tuple[LayerConfig, ...]
    num_experts: int
    top_k_experts: int
    expert_size: int
    sliding_window: int
    canvas_length: int = 256
    canvas_positions: int = 0
    canvas_widths: tuple[int, ...] = ()
    max_positions: int = 131_072
    softcap: float = 30.0
    norm_eps: float = 1e-6
    rope_sliding: RopeConfig = RopeConfig(theta=10_000.0)
    rope_full: RopeConfig = RopeConfig(theta=1_000_000.0, partial=0.25)
    pad_token: int = 0
    eos_tokens: tuple[int, ...] = (1,)
    bos_token: int = 2

    @property
    def trained_widths(self) -> list[int]:
        """The widths of canvas that the model was trained with, ascending."""
        return sorted({self.canvas_length, *self.canvas_widths})

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "sliding_window",
            "canvas_length",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if any(width < 1 for width in self.canvas_widths) or list(self.canvas_widths) != sorted(
            set(self.canvas_widths)
        ):
            raise ConfigError(f"canvas_widths must be ascending whole numbers from 1, got {list(self.canvas_widths)}")
        if not self.layers:
            raise ConfigError("a model needs at least one layer, got none")
        if self.num_experts and not 1 <= self.top_k_experts <= self.num_experts:
            raise ConfigError(f"top_k_experts must be in 1..{self.num_experts}, got {self.top_k_experts}")
        for index, layer in enumerate(self.layers):
            if layer.head_dim % 2 or self.num_heads % layer.num_kv_heads:
                raise ConfigError(
                    f"layer {index}: head_dim {layer.head_dim} must be even and num_kv_heads "
                    f"{layer.num_kv_heads} must divide the {self.num_heads} heads"
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def rope(self, kind: LayerKind) -> RopeConfig:
        return self.rope_sliding if kind == "sliding" else self.rope_full

    @staticmethod
    def from_hf(data: Mapping[str, Any]) -> ModelConfig:
        """Read HF's `config.json`, in both spellings of the full layers' shape.

        Constructor spelling: `global_head_dim`, `num_global_key_value_heads`; saved spelling: `per_layer_config`.
        """
        kind = data.get("model_type")
        if kind not in _MODEL_TYPES or "text_config" not in data:
            raise ConfigError(f"config.json: model_type is {kind!r}; dgemma reads {' or '.join(_MODEL_TYPES)}")
        text = dict(data["text_config"])
        try:
            return _model_from_text(text, data)
        except KeyError as error:
            raise ConfigError(f"config.json: text_config lacks {error.args[0]!r}") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.json: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The same shape as HF `config.json` writes it (saved spelling). Our own keys carry the prefix `dgemma_`."""
        names = {v: k for k, v in _HF_KINDS.items()}
        sliding = next((x for x in self.layers if x.kind == "sliding"), self.layers[0])
        text: dict[str, Any] = {
            "model_type": "diffusion_gemma_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": sliding.num_kv_heads,
            "head_dim": sliding.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "pad_token_id": self.pad_token,
            "eos_token_id": list(self.eos_tokens),
            "bos_token_id": self.bos_token,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": self.rope_sliding.theta},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": self.rope_full.partial,
                    "rope_theta": self.rope_full.theta,
                    **({"factor": self.rope_full.factor} if self.rope_full.factor != 1.0 else {}),
                },
            },
            "attention_bias": False,
            "attention_dropout": 0.0,
            "sliding_window": self.sliding_window,
            "layer_types": [names[layer.kind] for layer in self.layers],
            "final_logit_softcapping": self.softcap,
            "num_experts": self.num_experts or None,
            "top_k_experts": self.top_k_experts or None,
            "moe_intermediate_size": self.expert_size or None,
            "per_layer_config": {
                str(i): {"head_dim": layer.head_dim, "num_key_value_heads": layer.num_kv_heads}
                for i, layer in enumerate(self.layers)
                if layer.kind == "full"
            },
        }
        return {
            "model_type": _MODEL_TYPES[0],
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "canvas_length": self.canvas_length,
            "tie_word_embeddings": True,
            "eos_token_id": list(self.eos_tokens),
            "text_config": text,
            **({"dgemma_canvas_positions": self.canvas_positions} if self.canvas_positions else {}),
            **({"dgemma_canvas_widths": list(self.canvas_widths)} if self.canvas_widths else {}),
        }


def _model_from_text(text: dict[str, Any], top: Mapping[str, Any]) -> ModelConfig:
    if text.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise ConfigError(f"hidden_activation must be 'gelu_pytorch_tanh', got {text['hidden_activation']!r}")
    if text.get("use_bidirectional_attention") == "all":
        raise ConfigError("use_bidirectional_attention 'all' is not a text generator; allowed: null, 'vision'")
    count = int(text["num_hidden_layers"])
    kinds = text.get("layer_types") or [
        "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)
    ]
    if not kinds or len(kinds) != count or any(kind not in _HF_KINDS for kind in kinds):
        raise ConfigError(f"layer_types must name {count} layers of {sorted(_HF_KINDS)}, got {kinds}")
    kinds = [*kinds[:-1], "full_attention"]  # the reference forces the last layer to full attention
    kv_heads, head_dim = int(text["num_key_value_heads"]), int(text["head_dim"])
    full_dim = int(text.get("global_head_dim") or 512)
    full_kv = int(text.get("num_global_key_value_heads") or kv_heads)
    overrides = text.get("per_layer_config")
    layers = []
    for index, name in enumerate(kinds):
        own: Mapping[str, Any] = {}
        if overrides is not None:
            own = overrides.get(str(index), overrides.get(index, {}))
        elif name == "full_attention":
            own = {"head_dim": full_dim, "num_key_value_heads": full_kv}
        layers.append(
            LayerConfig(
                kind=_HF_KINDS[name],
                num_kv_heads=int(own.get("num_key_value_heads", kv_heads)),
                head_dim=int(own.get("head_dim", head_dim)),
            )
        )
    rope = text.get("rope_parameters") or {}
    sliding, full = rope.get("sliding_attention") or {}, rope.get("full_attention") or {}
    eos = top.get("eos_token_id", text.get("eos_token_id", 1))
    return ModelConfig(
        vocab_size=int(text["vocab_size"]),
        hidden_size=int(text["hidden_size"]),
        intermediate_size=int(text["intermediate_size"]),
        num_heads=int(text["num_attention_heads"]),
        layers=tuple(layers),
        num_experts=int(text.get("num_experts") or 0),
        top_k_experts=int(text.get("top_k_experts") or 0),
        expert_size=int(text.get("moe_intermediate_size") or 0),
        sliding_window=int(text.get("sliding_window") or 512),
        canvas_length=int(top.get("canvas_length") or 256),
        canvas_positions=int(top.get("dgemma_canvas_positions") or 0),
        canvas_widths=token_ids(top.get("dgemma_canvas_widths")),
        max_positions=int(text.get("max_position_embeddings") or 131_072),
        softcap=float(text.get("final_logit_softcapping") or 30.0),
        norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        rope_sliding=RopeConfig(theta=float(sliding.get("rope_theta", 1e4))),
        rope_full=RopeConfig(
            theta=float(full.get("rope_theta", 1e6)),
            partial=float(full.get("partial_rotary_factor", 0.25)),
            factor=float(full.get("factor", 1.0)),
        ),
        pad_token=int(text.get("pad_token_id") or 0),
        eos_tokens=token_ids(eos),
        bos_token=int(text.get("bos_token_id") or 2),
    )


def token_ids(value: Any) -> tuple[int, ...]:
    """A field of whole numbers (null, one or a list; HF writes token ids so) as a tuple."""
    if value is None:
        return ()
    return tuple(int(x) for x in value) if isinstance(value, list | tuple) else (int(value),)
