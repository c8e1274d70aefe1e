"""Broken checkpoints are one clear error that names the tensor or the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import Shape, hf_model, our_model
from safetensors.torch import load_file, save_file

from dgemma.checkpoint import load_checkpoint, save_checkpoint
from dgemma.config import GenerationConfig
from dgemma.errors import CheckpointError
from dgemma.model import DiffusionGemma

SHAPE = Shape(layers="sf", vocab=64, hidden=32, dense=32, expert=8)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.decoder.layers.1.post_feedforward_layernorm_2.weight"
SHARD_BYTES = 20_000


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return our_model(hf_model(SHAPE))


@pytest.fixture
def single(model: DiffusionGemma, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "single", model, GenerationConfig())


@pytest.fixture
def sharded(model: DiffusionGemma, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "sharded", model, GenerationConfig(), max_shard_bytes=SHARD_BYTES)


def refuses(folder: Path, *parts: str, **options: Any) -> str:
    """Loading raises one `CheckpointError` whose text has all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, **options)
    text = str(caught.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text
    return text


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) >= 3
    return found


# -- tensors -------------------------------------------------------------------------


def test_missing_tensor(single: Path) -> None:
    edit(single, lambda t: t.pop(NORM))
    refuses(single, NORM, "missing")
    edit(single, lambda t: [t.pop(name) for name in list(t) if "layers.0." in name])
    refuses(single, "more missing")


def test_missing_encoder_scalar_is_not_borrowed_from_the_decoder(single: Path) -> None:
    edit(single, lambda t: t.pop("model.encoder.language_model.layers.1.layer_scalar"))
    refuses(single, "model.encoder.language_model.layers.1.layer_scalar", "missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.decoder.layers.1.self_attn.v_proj.weight",  # known, but layer 1 is full: it has none
        "model.decoder.layers.2.input_layernorm.weight",  # one layer too many
        "dgemma.canvas_embed",  # not in this configuration
        "model.decoder.embed_tokens.bias",
        "model.encoder.audio_tower.weight",
    ],
)
def test_extra_tensor(single: Path, name: str) -> None:
    edit(single, lambda t: t.update({name: torch.zeros(32)}))
    refuses(single, name, "no place", WEIGHTS)


def test_vision_tensors_are_skipped_and_listed(single: Path) -> None:
    more = ["model.encoder.vision_tower.std_bias", "model.encoder.embed_vision.embedding.weight"]
    edit(single, lambda t: t.update({name: torch.zeros(2) for name in more}))
    assert set(more) < set(load_checkpoint(single).skipped)


def test_wrong_shape(single: Path) -> None:
    edit(single, lambda t: t.update({NORM: torch.zeros(31)}))
    refuses(single, NORM, "[31]", "[32]")
    edit(single, lambda t: t.update({NORM: torch.zeros(32, 1)}))
    refuses(single, NORM, "[32, 1]")


def test_config_of_another_size(single: Path) -> None:
    edit_json(single / "config.json", lambda c: c["text_config"].update(vocab_size=65))
    refuses(single, "model.decoder.embed_tokens.weight", "[64, 32]", "[65, 32]")


def test_unreadable_type(single: Path) -> None:
    edit(single, lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}))
    refuses(single, NORM, "I8")


def test_several_types_need_a_choice(single: Path) -> None:
    edit(single, lambda t: t.update({NORM: t[NORM].bfloat16()}))
    refuses(single, "bfloat16, float32", "dtype=")
    loaded = load_checkpoint(single, dtype=torch.bfloat16).model
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


# -- files ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_single_file(single: Path, keep: int) -> None:
    content = (single / WEIGHTS).read_bytes()
    (single / WEIGHTS).write_bytes(content[:keep])
    refuses(single, WEIGHTS, "truncated")


def test_truncated_shard(sharded: Path) -> None:
    path = shards(sharded)[1]
    path.write_bytes(path.read_bytes()[:-100])
    refuses(sharded, path.name, "truncated")


def test_missing_shard(sharded: Path) -> None:
    path = shards(sharded)[2]
    path.unlink()
    refuses(sharded, path.name, "missing", INDEX)


@pytest.mark.parametrize("name", ["elsewhere.safetensors", "../single/model.safetensors", "/etc/passwd"])
def test_index_that_points_elsewhere(sharded: Path, single: Path, name: str) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({NORM: name}))
    refuses(sharded, name, INDEX)


def test_index_that_points_to_the_wrong_shard(sharded: Path) -> None:
    names = [path.name for path in shards(sharded)]

    def swap(index: Any) -> None:
        places = index["weight_map"]
        places[NORM] = next(name for name in names if name != places[NORM])

    edit_json(sharded / INDEX, swap)
    refuses(sharded, NORM, INDEX)


def test_index_and_shard_that_disagree(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(NORM))
    refuses(sharded, NORM, "not listed")
    edit_json(sharded / INDEX, lambda index: index.update(weight_map={}))
    refuses(sharded, INDEX, "weight_map")


def test_no_weights(single: Path) -> None:
    (single / WEIGHTS).unlink()
    refuses(single, str(single), WEIGHTS, INDEX)


def test_pickles_are_refused_unopened(single: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(single / "exploded"),)

    (single / WEIGHTS).unlink()
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuses(single, "pytorch_model.bin", "pickle")
    shutil.move(single / "pytorch_model.bin", single / WEIGHTS)
    refuses(single, WEIGHTS)
    torch.save({NORM: torch.zeros(3)}, single / WEIGHTS)
    refuses(single, WEIGHTS)
    assert not (single / "exploded").exists()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "nonsense", "\udcff"])
def test_invalid_json(single: Path, file: str, content: str) -> None:
    (single / file).write_text(content, errors="surrogateescape")
    refuses(single, file, "JSON")


def test_invalid_index(sharded: Path) -> None:
    (sharded / INDEX).write_text("{")
    refuses(sharded, INDEX, "JSON")


@pytest.mark.parametrize("family", ["llama", "gemma4", None])
def test_another_family(single: Path, family: str | None) -> None:
    edit_json(single / "config.json", lambda config: config.update(model_type=family))
    refuses(single, "config.json", repr(family), "diffusion_gemma")


@pytest.mark.parametrize(
    "change, part",
    [
        ({"hidden_size": None}, "config.json"),
        ({"num_attention_heads": 3}, "heads"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"top_k_experts": 9}, "top_k_experts"),
    ],
)
def test_unusable_config(single: Path, change: dict[str, Any], part: str) -> None:
    edit_json(single / "config.json", lambda config: config["text_config"].update(change))
    refuses(single, "config.json", part)


def test_config_without_a_field(single: Path) -> None:
    edit_json(single / "config.json", lambda config: config["text_config"].pop("hidden_size"))
    refuses(single, "config.json", "hidden_size")
    (single / "config.json").unlink()
    refuses(single, "config.json", "missing")


def test_unusable_generation_config(single: Path) -> None:
    edit_json(single / "generation_config.json", lambda config: config.update(max_denoising_steps=0))
    refuses(single, "generation_config.json", "max_denoising_steps")


def test_a_file_or_nothing_instead_of_a_folder(single: Path) -> None:
    refuses(single / WEIGHTS, WEIGHTS, "file")
    refuses(single / "nothing", "nothing", "neither a folder")
