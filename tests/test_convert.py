"""An autoregressive Gemma 4 becomes a DiffusionGemma: same next-token logits, stated initial values; freezing."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf import TINY_VISION, Shape, randomise
from naive import NaiveCache, encode
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

from dgemma import kernels
from dgemma.checkpoint import load_checkpoint, save_checkpoint
from dgemma.checkpoint.autoregressive import add_diffusion_parts, autoregressive_config, load_autoregressive
from dgemma.config import ModelConfig
from dgemma.diffusion.loss import Objective
from dgemma.errors import CheckpointError, ConfigError
from dgemma.model import DiffusionGemma
from dgemma.train.attend import Layout
from dgemma.train.freeze import GROUPS, FreezePhase, apply_freeze, group_of
from dgemma.train.init import new_model
from dgemma.train.loop import LoopConfig, train
from dgemma.train.objective import Batch, denoising_loss
from dgemma.train.optim import ScheduleConfig
from dgemma.train.recipe import load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "convert"

SHAPES = {
    # Prompts below have 37 tokens: several windows.
    "experts": Shape(layers="ssfsf", window=8),
    "one expert": Shape(layers="sf", experts=1, top_k=1, window=5, kv=4, full_kv=2),
    "dense": Shape(layers="ssf", experts=0, window=6),
    "half rotation": Shape(layers="sf", partial=0.5, factor=2.0, full_dim=64, window=12),
}


def text_config(shape: Shape, **changes: Any) -> dict[str, Any]:
    experts = {"enable_moe_block": shape.experts > 0}
    if not shape.experts:
        experts |= {"num_experts": None, "top_k_experts": None, "moe_intermediate_size": None}
    fixed = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "final_logit_softcapping": 30.0}
    return {**shape.text(), **fixed, **experts, **changes}


def peer(shape: Shape, whole: bool = False) -> torch.nn.Module:
    """A float32 Gemma 4 of `transformers`, text only or with its (smallest) vision tower; all text tensors random."""
    if whole:
        config = Gemma4Config(text_config=text_config(shape), vision_config=dict(TINY_VISION))
    else:
        config = Gemma4TextConfig(**text_config(shape))
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = (Gemma4ForConditionalGeneration if whole else Gemma4ForCausalLM)(config).eval().requires_grad_(False)
    prefix = "model.language_model." if whole else "model."
    # `randomise` speaks DiffusionGemma's names.
    names = {
        key.replace(prefix, "model.encoder.language_model."): tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if key.startswith(prefix)
    }
    randomise(SimpleNamespace(state_dict=lambda keep_vars: names), 3)  # type: ignore[arg-type]
    return model


def our_logits(model: DiffusionGemma, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(encode(model, NaiveCache(model.config), ids))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("whole", [False, True], ids=["text", "with vision"])
def test_encode_logits_equal_the_autoregressive_models(name: str, whole: bool, tmp_path: Path) -> None:
    theirs = peer(SHAPES[name], whole)
    theirs.save_pretrained(tmp_path)
    loaded = load_autoregressive(tmp_path, canvas_length=16)
    ids = torch.randint(0, 256, (37,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0]
    ours = our_logits(loaded.model, ids)
    assert expected.std() > 0.5
    assert (ours - expected).abs().max() <= 1e-4
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    assert loaded.config.canvas_length == 16 and loaded.folder == tmp_path
    # transformers saves the full layers' shape in another spelling than it takes it.
    assert loaded.config == autoregressive_config({"model_type": "gemma4_text", **text_config(SHAPES[name])}, 16)
    assert bool(loaded.skipped) == whole and all("vision" in skipped for skipped in loaded.skipped)


def test_new_parts_start_as_stated_and_the_result_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    peer(SHAPES["experts"]).save_pretrained(tmp_path / "ar")
    loaded = load_autoregressive(tmp_path / "ar", canvas_length=4, canvas_positions=4, seed=5)
    model = loaded.model
    for block in model.layers:
        assert torch.equal(block.decoder_scalar, block.encoder_scalar)
        assert block.decoder_scalar is not block.encoder_scalar
        assert not torch.equal(block.encoder_scalar, torch.ones(1))
    assert not model.canvas_embed.any()

    canvas, places = torch.randint(0, 256, (4,)), torch.arange(4)

    def denoised(soft: Tensor | None) -> Tensor:
        return model.denoise(canvas, places, NaiveCache(model.config).denoising(), soft, places)

    # The signal changes nothing yet, but its way out learns at once: the closing matrix has a gradient.
    soft = torch.randn(4, 64)
    assert torch.equal(denoised(soft), denoised(None))
    denoised(soft).square().sum().backward()
    assert model.self_conditioning.mlp.down_proj.weight.grad.abs().max() > 0

    save_checkpoint(tmp_path / "ours", model, loaded.generation)
    again = load_checkpoint(tmp_path / "ours")
    assert again.config == loaded.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_parts_depend_on_the_seed_alone() -> None:
    config = autoregressive_config({"model_type": "gemma4_text", **text_config(SHAPES["dense"])})
    gates = []
    for seed in (1, 1, 2):
        model = new_model(config, 0)
        add_diffusion_parts(model, seed)
        gates.append(model.self_conditioning.mlp.gate_proj.weight)
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size_per_layer_input": 64}, "hidden_size_per_layer_input must be 0, got 64"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers must be 0, got 1"),
        ({"attention_k_eq_v": False}, "attention_k_eq_v must be True, got False"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"hidden_activation": "silu"}, "hidden_activation must be 'gelu_pytorch_tanh', got 'silu'"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping must be a number, got null"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"num_experts": None}, "enable_moe_block is true, but num_experts"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention.rope_type must be 'proportional', got 'yarn'",
        ),
        ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text'"),
    ],
)
def test_what_cannot_be_expressed_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    raw = {"model_type": "gemma4_text", **text_config(SHAPES["experts"]), **changes}
    with pytest.raises(ConfigError, match=named):
        autoregressive_config(raw)
    if "model_type" not in changes:
        with pytest.raises(ConfigError, match=named):
            autoregressive_config({"model_type": "gemma4", "text_config": raw})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=f"config.json: {named}"):
        load_autoregressive(tmp_path)


def test_an_absent_field_has_hfs_default() -> None:
    raw = {"model_type": "gemma4_text", **text_config(SHAPES["experts"])}
    del raw["hidden_size_per_layer_input"]
    with pytest.raises(ConfigError, match=r"hidden_size_per_layer_input must be 0, got 256 \(HF's default"):
        autoregressive_config(raw)


def test_a_file_that_does_not_fit_is_refused_by_tensor(tmp_path: Path) -> None:
    theirs = peer(SHAPES["experts"])
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def load(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        load_autoregressive(tmp_path)

    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.weight.*shape \[64, 96\]"):
        load(intermediate_size=97)
    with pytest.raises(CheckpointError, match=r"model\.layers\.\d\..* has no place"):
        load(enable_moe_block=False)
    kinds = [*config["layer_types"], "full_attention"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.5\.\S+' and \d+ more missing"):
        load(
            num_hidden_layers=6,
            layer_types=kinds,
            per_layer_config={**config["per_layer_config"], "5": {"head_dim": 32}},
        )


CONFIG = autoregressive_config({"model_type": "gemma4_text", **text_config(SHAPES["experts"])}, 4, 4)
DENSE = replace(CONFIG, num_experts=0, top_k_experts=0, expert_size=0, canvas_positions=0)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["experts", "dense"])
def test_groups_part_the_parameters(config: ModelConfig) -> None:
    model = DiffusionGemma(config)
    found: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(group_of(name), set()).add(name.removesuffix(".weight").split(".")[-1])
    missing = {"router", "experts", "canvas_embed"} if config is DENSE else set()
    assert set(found) == set(GROUPS) - {"all"} - missing
    assert found["attention"] == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert found["mlp"] == {"gate_proj", "up_proj", "down_proj"}
    assert found["self_conditioning"] == {"pre_norm", *found["mlp"]}
    assert found["embedding"] == {"embed"}
    assert all(part.endswith("norm") for part in found["norms"])


PHASES = (
    FreezePhase(first_step=0, train=("self_conditioning", "canvas_embed")),
    FreezePhase(first_step=10, train=("norms", "router")),
    FreezePhase(first_step=20, train=("all",)),
)


@pytest.mark.parametrize(
    ("step", "groups"), [(0, PHASES[0].train), (9, PHASES[0].train), (10, PHASES[1].train), (99, ())]
)
def test_a_phase_trains_its_groups_whatever_came_before(step: int, groups: tuple[str, ...]) -> None:
    for before in (None, 0, 15, 50):
        model = DiffusionGemma(CONFIG)
        if before is not None:
            apply_freeze(model, PHASES, before)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        apply_freeze(model, PHASES, step)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not groups or group_of(name) in groups), name
            assert parameter.requires_grad or parameter.grad is None


def test_bad_phases_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown group 'backbone'; allowed: self_conditioning, canvas_embed, .*all"):
        FreezePhase(first_step=0, train=("backbone",))
    with pytest.raises(ConfigError, match="trains nothing"):
        FreezePhase(first_step=0, train=())
    with pytest.raises(ConfigError, match="first_step must be"):
        FreezePhase(first_step=-1, train=("all",))
    for phases in (PHASES[1:], (PHASES[0], PHASES[2], PHASES[1])):
        with pytest.raises(ConfigError, match="begin at step 0 and come in rising order"):
            apply_freeze(DiffusionGemma(CONFIG), phases, 0)
    with pytest.raises(ConfigError, match="no parameters in router"):
        apply_freeze(DiffusionGemma(DENSE), (FreezePhase(first_step=0, train=("router",)),), 0)


class Pieces:
    """Batches of random tokens, a function of the step."""

    def batch(self, step: int) -> Batch:
        ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(step))
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), Layout(torch.tensor([2, 4]), 12, 8, 4))

    def source_name(self, step: int) -> str:
        return "random"


def test_a_run_moves_what_its_phase_trains_and_nothing_else(tmp_path: Path) -> None:
    model = new_model(CONFIG, 0)
    phases = (
        FreezePhase(first_step=0, train=("self_conditioning", "norms")),
        FreezePhase(first_step=2, train=("all",)),
    )
    moved: list[set[str]] = []
    state = {name: p.detach().clone() for name, p in model.named_parameters()}

    def before_step(step: int) -> None:
        nonlocal state
        moved.append({group_of(name) for name, p in model.named_parameters() if not torch.equal(p, state[name])})
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        apply_freeze(model, phases, step)

    config = LoopConfig(steps=4, precision="fp32")
    train(model, Pieces(), config, tmp_path, schedule=ScheduleConfig(warmup=0), before_step=before_step)
    warm = {"self_conditioning", "norms"}
    assert moved == [set(), warm, warm, set(GROUPS) - {"all"}]


def test_the_recipe_is_one_and_freezes_by_known_names() -> None:
    recipe = load_recipe(RECIPES.parent / "convert.yaml", ["model.autoregressive=here"])
    assert recipe.model.autoregressive == "here"
    apply_freeze(DiffusionGemma(CONFIG), recipe.freeze, 0)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    return import_module("lab")


def test_flops_are_those_that_torch_counts_without_attention(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TABLE", {})  # the counter does not know oneDNN's products
    model = new_model(lab.model_config(), 0)
    ids = torch.randint(4096, (4, 96))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), Layout(torch.full((4,), 32), 96, 64, lab.WIDTH))
    for kind in ("ar", "diffusion"):
        with FlopCounterMode(display=False) as counter:
            if kind == "ar":
                loss = lab.encode(model, batch)[0]
            else:
                everyone = Objective(self_conditioning=1.0)
                loss = denoising_loss(model, batch, torch.Generator().manual_seed(0), everyone).total
            loss.backward()
        counts = counter.get_flop_counts()["Global"]
        matrices = sum(n for op, n in counts.items() if "bmm" not in str(op))  # attention is the only batched product
        expected = lab.step_flops(model, batch, kind)
        if kind == "diffusion":  # half of the rows are told there, all of them here
            noisy = batch.layout.canvas_positions().numel()
            backbone = lab.step_flops(model, batch, "ar") / (6 * ids.numel())
            expected += noisy * (backbone + model.embed.weight.numel())
        assert matrices == pytest.approx(expected, rel=0.02)


def test_the_crossing_lies_between_the_runs_around_it(lab: Any) -> None:
    crossing = import_module("proof").crossing

    def points(*pairs: tuple[float, float]) -> list[Any]:
        return [SimpleNamespace(flops=flops, canvas=loss) for flops, loss in pairs]

    falling = points((4.0, 1.0), (1.0, 3.0), (16.0, 0.5))
    assert crossing(falling, 2.0) == (pytest.approx(2.0), False)  # half-way in loss is half-way in log compute
    assert crossing(falling, 0.5) == (pytest.approx(16.0), False)
    assert crossing(falling, 3.5) == (1.0, True)
    assert crossing(falling, 0.4) == (None, False)
