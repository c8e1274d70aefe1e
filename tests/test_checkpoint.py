"""Loading and saving in HF's format: both directions bit for bit, strict, streaming."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf import Shape, hf_config, hf_load, hf_model, our_model, saved
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from dgemma.checkpoint import files as checkpoint_files
from dgemma.checkpoint import hf_name, load_checkpoint, our_name, save_checkpoint
from dgemma.checkpoint.names import _TABLE, is_skipped
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.errors import CheckpointError
from dgemma.model import DiffusionGemma

SHAPE = Shape(layers="sfsf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(ours: DiffusionGemma, state: dict[str, Tensor]) -> None:
    """Every tensor of ours is bit for bit the one under HF's name."""
    for name, tensor in ours.state_dict().items():
        theirs = state[hf_name(name)]
        assert tensor.dtype is theirs.dtype and torch.equal(tensor, theirs), name


def dense_config() -> ModelConfig:
    shape = Shape(experts=0, top_k=0, expert=0)
    return ModelConfig.from_hf({"model_type": "diffusion_gemma", "text_config": shape.text()})


# -- names ---------------------------------------------------------------------------


def test_table_is_a_bijection_with_the_tensors_transformers_saves(tmp_path: Path) -> None:
    stored = load_file(saved(hf_model(SHAPE), tmp_path) / "model.safetensors")
    text = {name for name in stored if not is_skipped(name)}
    ours = our_model(hf_model(SHAPE)).state_dict()
    assert {hf_name(name) for name in ours} == text
    assert {our_name(name) for name in text} == set(ours)
    assert len(set(_TABLE.values())) == len(_TABLE)


def test_released_names_are_known() -> None:
    """Spec 6.1: 1,047 tensors, of which the vision part is skipped for now."""
    names = {hf_name(ours.replace("#", str(layer))) for ours in _TABLE for layer in range(30)}
    full = [f"model.decoder.layers.{layer}.self_attn.v_proj.weight" for layer in (5, 11, 17, 23, 29)]
    assert len(names - set(full) - {"dgemma.canvas_embed"}) == 691
    vision = "model.encoder.vision_tower.encoder.layers.3.self_attn.q_proj.linear.weight"
    assert is_skipped(vision) and is_skipped("model.encoder.embed_vision.embedding_projection.weight")
    assert not is_skipped("model.encoder.vision_tower_2.weight")
    assert our_name("model.encoder.vision_tower.std_bias") is None


@pytest.mark.parametrize(
    "stored, ours",
    [
        ("model.encoder.language_model.layers.7.layer_scalar", "layers.7.encoder_scalar"),
        ("model.decoder.layers.7.layer_scalar", "layers.7.decoder_scalar"),
        ("model.encoder.language_model.layers.7.self_attn.q_proj.weight", "layers.7.attention.q_proj.weight"),
        ("model.encoder.language_model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "embed.weight"),
        ("dgemma.canvas_embed", "canvas_embed"),
        ("model.encoder.language_model.self_conditioning.pre_norm.weight", None),
        ("model.decoder.layers.07.layer_scalar", None),
        ("model.decoder.layers.#.layer_scalar", None),
        ("model.decoder.layers.-1.layer_scalar", None),
        ("model.decoder.layers.1.layer_scalar.extra", None),
    ],
)
def test_stored_names(stored: str, ours: str | None) -> None:
    assert our_name(stored) == ours


def test_a_tensor_without_a_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lora_a"):
        hf_name("layers.0.lora_a")


# -- both directions -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharded", [False, True])
def test_we_load_what_transformers_saves(dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    saved(hf_model(SHAPE), tmp_path / "f32")
    theirs = hf_load(tmp_path / "f32", dtype)
    saved(theirs, tmp_path / "x", max_shard_size="60KB" if sharded else "1GB")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == (5 if sharded else 1) or sharded
    loaded = load_checkpoint(tmp_path / "x")
    same(loaded.model, theirs.state_dict())
    assert {t.dtype for t in loaded.model.state_dict().values()} == {dtype}
    assert loaded.name == "x" and loaded.folder == tmp_path / "x"
    assert loaded.config == ModelConfig.from_hf(theirs.config.to_dict())
    assert all(is_skipped(name) for name in loaded.skipped) and len(loaded.skipped) == 3
    assert not any(t.is_meta for t in loaded.model.state_dict().values())
    assert not loaded.model.training


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_loads_what_we_save(dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    theirs = hf_model(SHAPE)
    ours = our_model(theirs)
    save_checkpoint(tmp_path, ours, GenerationConfig(), max_shard_bytes=70_000 if sharded else 2**30, dtype=dtype)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    back, info = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert back.dtype is dtype
    state = back.state_dict()
    same(ours.to(dtype), state)
    scalars = [
        state[f"model.{half}.layers.{i}.layer_scalar"]
        for i in range(4)
        for half in ("decoder", "encoder.language_model")
    ]
    assert len({scalar.item() for scalar in scalars}) == 8, "encoder and decoder scalars stay apart"
    again = load_checkpoint(tmp_path)
    same(again.model, state)
    assert again.config == ours.config


def test_dtype_converts_while_loading(tmp_path: Path) -> None:
    ours = our_model(hf_model(SHAPE))
    save_checkpoint(tmp_path, ours, GenerationConfig(), max_shard_bytes=70_000)
    half = load_checkpoint(tmp_path, dtype=torch.bfloat16).model
    for name, tensor in ours.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16()), name


@pytest.mark.parametrize("positions", [0, 24])
def test_our_own_variants_come_back(positions: int, tmp_path: Path) -> None:
    """The dense block and the canvas position embedding, which transformers does not have."""
    from dataclasses import replace

    config = replace(dense_config(), canvas_positions=positions)
    model = DiffusionGemma(config)
    for tensor in model.state_dict().values():
        tensor.normal_()
    save_checkpoint(tmp_path, model, GenerationConfig(max_new_tokens=31))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == config and loaded.skipped == ()
    assert loaded.generation.max_new_tokens == 31
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert ("dgemma.canvas_embed" in load_file(tmp_path / "model.safetensors")) == (positions > 0)


def test_the_loaded_model_computes_the_same(tmp_path: Path) -> None:
    from naive import NaiveCache, denoise, encode

    ours = our_model(hf_model(SHAPE))
    save_checkpoint(tmp_path, ours, GenerationConfig())
    loaded = load_checkpoint(tmp_path).model
    results = []
    for model in (ours, loaded):
        cache = NaiveCache(model.config)
        with torch.no_grad():
            results.append((encode(model, cache, torch.arange(13)), denoise(model, cache, torch.arange(16))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_can_be_trained_after_loading(tmp_path: Path) -> None:
    """The mapping is private: writing to a loaded tensor must not reach the file."""
    save_checkpoint(tmp_path, our_model(hf_model(SHAPE)), GenerationConfig())
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load_checkpoint(tmp_path).model
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    save_checkpoint(tmp_path, model, GenerationConfig())
    same(model, load_file(tmp_path / "model.safetensors"))


# -- aliases, shipped names, the hub -------------------------------------------------


def test_tied_aliases_are_accepted_when_equal(tmp_path: Path) -> None:
    ours = our_model(hf_model(SHAPE))
    save_checkpoint(tmp_path, ours, GenerationConfig())
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        tied = name.replace("model.decoder.", "model.encoder.language_model.")
        renamed[tied if our_name(tied) == our_name(name) else name] = tensor
    assert sum(name.startswith("model.encoder.language_model.") for name in renamed) > 50
    save_file(renamed, tmp_path / "model.safetensors")
    same(load_checkpoint(tmp_path).model, stored)

    save_file(
        renamed | {"lm_head.weight": stored["model.decoder.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    same(load_checkpoint(tmp_path).model, stored)

    save_file(
        stored | {"lm_head.weight": stored["model.decoder.embed_tokens.weight"] + 1},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' and 'model.decoder.embed_tokens.weight' differ"):
        load_checkpoint(tmp_path)


def test_untied_checkpoints_are_refused_by_tensor(tmp_path: Path) -> None:
    config = hf_config(SHAPE)
    config.tie_word_embeddings = False
    DiffusionGemmaForBlockDiffusion(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="differ"):
        load_checkpoint(tmp_path)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(checkpoint_files, "SHIPPED", tmp_path / "models")
    yield save_checkpoint(tmp_path / "models" / "default", our_model(hf_model(SHAPE)), GenerationConfig())


def test_shipped_names(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_files.SHIPPED.name == "models"
    loaded = load_checkpoint("default")
    assert loaded.name == "default" and loaded.folder == shipped
    with pytest.raises(CheckpointError, match=r"'tiny'.*default"):
        load_checkpoint("tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").mkdir()
    assert load_checkpoint("default").folder == shipped
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_checkpoint("./default")


def test_the_package_folder_is_where_shipped_models_lie() -> None:
    import dgemma

    assert Path(dgemma.__file__).parent / "models" == checkpoint_files.SHIPPED


def test_hub_ids(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        calls.append((repo, tuple(allow_patterns)))
        return str(shipped)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_checkpoint("google/diffusiongemma-26B-A4B-it").name == "google/diffusiongemma-26B-A4B-it"
    checkpoint_files.find_folder("google/diffusiongemma-26B-A4B-it", weights=False)
    few = ("*.json", "*.jinja", "README.md")
    assert [patterns for _, patterns in calls] == [(*few, "*.safetensors"), few]

    def offline(repo: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"owner/name is no local folder.*no route to host$"):
        load_checkpoint("owner/name")


def test_offline_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"nobody/nothing-here is no local folder and could not be downloaded"):
        load_checkpoint("nobody/nothing-here")


# -- configuration -------------------------------------------------------------------


def test_both_spellings_of_the_full_layers_are_one_shape(tmp_path: Path) -> None:
    theirs = hf_config(SHAPE)
    theirs.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" in stored["text_config"] and "global_head_dim" not in stored["text_config"]
    written = {"model_type": "diffusion_gemma", "canvas_length": 16, "text_config": SHAPE.text()}
    config = ModelConfig.from_hf(written)
    assert config == ModelConfig.from_hf(stored) == ModelConfig.from_hf(theirs.to_dict())
    assert [layer.head_dim for layer in config.layers] == [16, 32, 16, 32]
    assert [layer.num_kv_heads for layer in config.layers] == [2, 1, 2, 1]
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("cap", [None, 30.0, 50.0])
def test_softcap_survives_both_savers(cap: float | None, tmp_path: Path) -> None:
    """`save_pretrained` leaves the default out; ours writes it; both mean 30."""
    text = SHAPE.text() | ({} if cap is None else {"final_logit_softcapping": cap})
    theirs = DiffusionGemmaConfig(text_config=text, canvas_length=16)
    theirs.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    ours = ModelConfig.from_hf(stored)
    assert ours.softcap == (cap or 30.0) == theirs.text_config.final_logit_softcapping
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    back = DiffusionGemmaConfig.from_pretrained(tmp_path)
    assert back.text_config.final_logit_softcapping == ours.softcap
    assert ModelConfig.from_hf(back.to_dict()) == ours


def test_generation_settings_come_back_through_transformers(tmp_path: Path) -> None:
    chosen = GenerationConfig(
        max_new_tokens=64, max_denoising_steps=7, t_min=0.1, t_max=0.9, entropy_bound=0.25,
        stability_threshold=2, confidence_threshold=0.01, stop_tokens=(1, 106, 50), pad_token=0,
    )  # fmt: skip
    save_checkpoint(tmp_path, our_model(hf_model(SHAPE)), chosen)
    assert load_checkpoint(tmp_path).generation == chosen
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)
    theirs = model.generation_config
    assert theirs.max_denoising_steps == 7 and theirs.eos_token_id == [1, 106, 50]
    model.save_pretrained(tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").generation == chosen


def test_unset_generation_fields_take_the_defaults(tmp_path: Path) -> None:
    """transformers writes null for what is not set."""
    saved(hf_model(SHAPE), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_denoising_steps"] is None
    assert load_checkpoint(tmp_path).generation == GenerationConfig(stop_tokens=(1,))
    (tmp_path / "generation_config.json").unlink()
    assert load_checkpoint(tmp_path).generation == GenerationConfig(stop_tokens=(1,))


# -- memory --------------------------------------------------------------------------

MEASURE = """
import sys, torch
from dgemma.checkpoint import load_checkpoint

def peak():
    # VmHWM: the most pages this process ever had in memory at once. It counts anonymous pages (copies) and
    # file pages (the mapped weights) alike, so neither a hidden copy nor a mapping kept beside one can hide.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder, dtype = sys.argv[1:]
warm = load_checkpoint(folder + "/small")          # imports, thread pools, safetensors' own buffers
try:
    open("/proc/self/clear_refs", "w").write("5")  # resets VmHWM to what is resident now
except OSError:
    pass  # not allowed here: the base is then the peak of the warm-up, hardly more
base = peak()
model = load_checkpoint(folder + "/big", dtype=getattr(torch, dtype)).model
tensors = list(model.state_dict().values())
total = sum(t.nbytes for t in tensors)
touched = sum(t.view(-1)[:: 2048 // t.element_size()].float().sum().item() for t in tensors)  # every page
print(total, peak() - base)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about 200 MB in bfloat16 (two shards), and a small one to warm up with."""
    folder = tmp_path_factory.mktemp("memory")
    save_checkpoint(folder / "small", our_model(hf_model(SHAPE)), GenerationConfig())
    shape = Shape(vocab=4096, hidden=512, dense=2048, experts=16, expert=512, layers="sssssf")
    with torch.device("meta"):
        model = DiffusionGemma(ModelConfig.from_hf(hf_config(shape).to_dict()))
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for tensor in model.state_dict().values():
        tensor.fill_(0.01)
    save_checkpoint(folder / "big", model, GenerationConfig(), max_shard_bytes=120 * 2**20)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_the_weights(dtype: str, big: Path) -> None:
    """At most 1.15 x the weights in memory at any time, everything counted, every page touched.

    Stored type: the mapped file is the only copy. Other type: the copies, and one mapped tensor at a time.
    """
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big), dtype], capture_output=True, text=True, cwd=root, check=True
    )
    total, used = map(int, done.stdout.split())
    print(f"{dtype}: weights {total / 2**20:.0f} MiB, peak {used / 2**20:.0f} MiB, {used / total:.3f} x")
    assert total > (190 if dtype == "bfloat16" else 380) * 10**6
    assert 0.9 * total < used <= 1.15 * total
