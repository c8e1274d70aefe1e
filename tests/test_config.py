"""The configuration: what is refused, what Hugging Face's files mean, and that both come back unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import Shape, hf_config
from hypothesis import given
from hypothesis import strategies as st
from transformers import DiffusionGemmaConfig
from transformers.models.diffusion_gemma import DiffusionGemmaGenerationConfig

from dgemma.config import EngineConfig, GenerationConfig, LayerConfig, ModelConfig, RopeConfig, token_ids
from dgemma.errors import ConfigError, DgemmaError, RequestError
from dgemma.model import DiffusionGemma

# The released configuration as the constructor spells it, without the vision part.
RELEASED: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "eos_token_id": [1, 106],
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512,
        "num_global_key_value_heads": 2, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "sliding_window": 1024,
        "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
        "use_bidirectional_attention": "vision", "attention_k_eq_v": False,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    },
}  # fmt: skip


def text(**changes: Any) -> dict[str, Any]:
    return {**RELEASED, "text_config": {**RELEASED["text_config"], **changes}}


# -- the released model --------------------------------------------------------------


def test_the_released_configuration() -> None:
    config = ModelConfig.from_hf(RELEASED)
    assert [i for i, layer in enumerate(config.layers) if layer.kind == "full"] == [5, 11, 17, 23, 29]
    assert config.layers[0] == LayerConfig(kind="sliding", num_kv_heads=8, head_dim=256)
    assert config.layers[5] == LayerConfig(kind="full", num_kv_heads=2, head_dim=512)
    assert config.rope_sliding == RopeConfig(theta=10_000.0)
    assert config.rope_full == RopeConfig(theta=1_000_000.0, partial=0.25)
    assert (config.sliding_window, config.softcap, config.canvas_length) == (1024, 30.0, 256)
    assert config.eos_tokens == (1, 106)


def test_the_released_size() -> None:
    """Spec 1.5: 25,823,778,864 parameters, of which 25.251 G text; recomputed from our shapes."""
    with torch.device("meta"):
        model = DiffusionGemma(ModelConfig.from_hf(RELEASED))
    text_size = sum(parameter.numel() for parameter in model.parameters())
    vision = 25_823_778_864 - text_size
    assert abs(text_size / 1e9 - 25.251) < 5e-4
    assert abs(vision / 1e6 - 573) < 0.5
    assert len(model.state_dict()) == 691  # as many text tensors as a GGUF conversion has


def test_defaults_are_the_reference_class_defaults() -> None:
    """What a config.json leaves out means what transformers' class means."""
    shape = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    theirs = DiffusionGemmaConfig(text_config=shape).to_dict()
    ours = ModelConfig.from_hf(theirs)
    assert ours.rope_full == RopeConfig(theta=1e6, partial=0.25) and ours.rope_sliding == RopeConfig(theta=1e4)
    assert ours.sliding_window == 512 and ours.max_positions == 131_072 and ours.softcap == 30.0
    dropped = ("sliding_window", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "layer_types")
    for name in dropped:
        theirs["text_config"].pop(name)
    assert ModelConfig.from_hf(theirs) == ours


def test_absent_global_heads_mean_the_sliding_layers_number() -> None:
    config = ModelConfig.from_hf(text(num_global_key_value_heads=None))
    assert {layer.num_kv_heads for layer in config.layers} == {8}
    assert ModelConfig.from_hf(text(global_head_dim=None)).layers[5].head_dim == 512


def test_the_last_layer_is_always_full() -> None:
    kinds = ["sliding_attention"] * 30
    config = ModelConfig.from_hf(text(layer_types=kinds))
    assert [layer.kind for layer in config.layers] == ["sliding"] * 29 + ["full"]
    assert config.layers[29].head_dim == 512


def test_the_prerelease_name_is_read() -> None:
    assert ModelConfig.from_hf({**RELEASED, "model_type": "diffusion_gemma4"}).num_layers == 30


# -- both ways -----------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv, full_kv = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    kinds = [*draw(st.lists(st.sampled_from(["sliding", "full"]), max_size=6)), "full"]
    dim, full_dim = (2 * draw(st.integers(1, 64)) for _ in range(2))
    shapes = {"sliding": (kv, dim), "full": (full_kv, full_dim)}
    experts = draw(st.integers(0, 9))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 300_000)),
        hidden_size=draw(st.integers(1, 4096)),
        intermediate_size=draw(st.integers(1, 4096)),
        num_heads=4,
        layers=tuple(LayerConfig(kind=k, num_kv_heads=shapes[k][0], head_dim=shapes[k][1]) for k in kinds),
        num_experts=experts,
        top_k_experts=draw(st.integers(1, experts)) if experts else 0,
        expert_size=draw(st.integers(1, 99)) if experts else 0,
        sliding_window=draw(st.integers(1, 4096)),
        canvas_length=draw(st.integers(1, 512)),
        canvas_positions=draw(st.sampled_from([0, 256])),
        max_positions=draw(st.integers(1, 10**6)),
        softcap=draw(st.floats(1, 100)),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_sliding=RopeConfig(theta=draw(st.floats(1, 1e6))),
        rope_full=RopeConfig(theta=draw(st.floats(1, 1e6)), partial=draw(st.floats(0.1, 1)), factor=2.0),
        pad_token=draw(st.integers(0, 9)),
        eos_tokens=tuple(draw(st.lists(st.integers(0, 300), min_size=1, max_size=3))),
        bos_token=draw(st.integers(1, 9)),
    )


@given(configs())
def test_every_configuration_survives_our_own_file(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(full_kv=None, kv=4),
        Shape(layers="ssssssf", heads=8, kv=1, dim=32, full_dim=64, partial=0.5),
        Shape(factor=4.0, experts=16, top_k=8, canvas=64, window=100),
    ],
)
def test_transformers_reads_ours_as_its_own(shape: Shape, tmp_path: Path) -> None:
    theirs = hf_config(shape)
    ours = ModelConfig.from_hf(theirs.to_dict())
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    back = DiffusionGemmaConfig.from_pretrained(tmp_path)
    per_layer = ("head_dim", "num_key_value_heads", "global_head_dim", "num_global_key_value_heads")
    for name in shape.text():
        if name not in per_layer:
            assert getattr(back.text_config, name) == getattr(theirs.text_config, name), name
    for index in range(len(shape.layers)):
        mine, wanted = (config.text_config.per_layer_config[index] for config in (back, theirs))
        assert (mine.head_dim, mine.num_key_value_heads) == (wanted.head_dim, wanted.num_key_value_heads)
    assert back.canvas_length == shape.canvas and back.text_config.final_logit_softcapping == 30.0
    assert ModelConfig.from_hf(back.to_dict()) == ours


# -- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    "data, part",
    [
        ({}, "None"),
        ({"model_type": "gemma4", "text_config": {}}, "'gemma4'"),
        ({"model_type": "diffusion_gemma"}, "diffusion_gemma"),
        (text(hidden_activation="silu"), "'silu'"),
        (text(use_bidirectional_attention="all"), "'all'"),
        (text(layer_types=["sliding_attention"] * 29), "layer_types"),
        (text(layer_types=["chunked_attention"] * 30), "chunked_attention"),
        (text(hidden_size="many"), "many"),
        (text(num_attention_heads=15), "15"),
        (text(head_dim=255), "255"),
        (text(top_k_experts=129), "129"),
        (text(vocab_size=0), "vocab_size"),
        (text(num_hidden_layers=0, layer_types=[]), "layer"),
    ],
)
def test_unusable_model_configurations(data: Mapping[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(data)
    assert part in str(caught.value)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size"])
def test_a_missing_field_is_named(name: str) -> None:
    data = text()
    data["text_config"].pop(name)
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_hf(data)


BAD_REQUESTS: list[tuple[str, Any]] = [
    ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("max_new_tokens", True), ("max_new_tokens", "8"),
    ("max_denoising_steps", 0), ("max_denoising_steps", -1), ("seed", 1.5), ("seed", None), ("choice", -1),
    ("top_k", -1), ("canvas_length", 0), ("stability_threshold", -1), ("t_min", -0.1), ("t_max", 0.0),
    ("t_max", float("nan")), ("t_max", float("inf")), ("t_max", 0.4), ("entropy_bound", 0.0), ("entropy_bound", True),
    ("confidence_threshold", 0.0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("accept_confidence", 0),
    ("convention", "both"), ("mode", "beam"),
    # Beyond what the tensors of a pass can hold.
    ("top_k", 2**63), ("max_denoising_steps", 2**64), ("stability_threshold", 2**31), ("choice", 2**31),
    ("temperature", 1e300), ("t_max", 1e39), ("confidence_threshold", 1e300),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD_REQUESTS)
def test_unusable_requests_name_the_value_given(name: str, value: Any) -> None:
    for make in (lambda: GenerationConfig(**{name: value}), lambda: GenerationConfig().with_(**{name: value})):
        with pytest.raises(RequestError) as caught:
            make()
        assert name in str(caught.value) and str(value) in str(caught.value)
        assert isinstance(caught.value, DgemmaError)


def test_an_unknown_parameter_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'temprature'.*temperature"):
        GenerationConfig().with_(temprature=1.0)


def test_allowed_extremes() -> None:
    chosen = GenerationConfig(
        t_min=0, temperature=0, top_p=1, top_k=0, stability_threshold=None, confidence_threshold=None, seed=-5
    )
    assert chosen.with_(seed=2**70).seed == 2**70
    with pytest.raises(FrozenInstanceError):
        chosen.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["max_batch_rows", "max_batch_tokens", "max_requests", "encode_chunk"])
def test_engine_limits(name: str) -> None:
    assert EngineConfig(prefix_cache_tokens=0).prefix_cache_tokens == 0
    for value in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=name):
            EngineConfig(**{name: value})


# -- generation_config.json ----------------------------------------------------------


def test_the_released_generation_config() -> None:
    model = ModelConfig.from_hf(RELEASED)
    data = {
        "max_new_tokens": 256, "max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "confidence_threshold": 0.005, "eos_token_id": [1, 106, 50], "pad_token_id": 0, "transformers_version": "5",
    }  # fmt: skip
    assert GenerationConfig.from_hf(data, model) == GenerationConfig(stop_tokens=(1, 106, 50))
    assert GenerationConfig.from_hf({}, model) == GenerationConfig(stop_tokens=(1, 106))


def test_the_nested_spelling_of_older_conversions() -> None:
    data = {
        "linear_temperature_schedule_config": {"t_min": 0.2, "t_max": 0.6},
        "diffusion_stopping_config": {"stability_threshold": 3, "confidence_threshold": 0.02},
        "sampler_config": {"entropy_bound": 0.3},
        "temperature": 7.0,
        "top_k": 64,
    }
    read = GenerationConfig.from_hf(data, ModelConfig.from_hf(RELEASED))
    assert (read.t_min, read.t_max, read.stability_threshold) == (0.2, 0.6, 3)
    assert (read.confidence_threshold, read.entropy_bound) == (0.02, 0.3)
    assert (read.temperature, read.top_k) == (1.0, 0), "autoregressive settings mean something else here"


def test_transformers_accepts_what_we_write() -> None:
    chosen = GenerationConfig(max_new_tokens=9, t_min=0.1, entropy_bound=0.5, stop_tokens=(1, 5))
    theirs = DiffusionGemmaGenerationConfig(**json.loads(json.dumps(chosen.to_hf())))
    theirs.validate()
    assert theirs.max_new_tokens == 9 and theirs.t_min == 0.1 and theirs.eos_token_id == [1, 5]
    assert theirs.sampler_config.entropy_bound == 0.5
    model = replace(ModelConfig.from_hf(RELEASED), eos_tokens=(7,))
    assert GenerationConfig.from_hf(json.loads(theirs.to_json_string()), model) == chosen


@pytest.mark.parametrize("value, ids", [(None, ()), (3, (3,)), ([1, 2], (1, 2)), ((4,), (4,))])
def test_token_fields(value: Any, ids: tuple[int, ...]) -> None:
    assert token_ids(value) == ids
