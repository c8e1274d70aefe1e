"""LoRA on the shared weights: deltas that were really trained, folded in once, readable by peft and by transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hf import Peer, Shape, hf_load, hf_model, our_model
from naive import NaiveCache, denoise, encode
from safetensors.torch import load_file, save_file
from text_kit import byte_level
from torch import Tensor
from transformers import DiffusionGemmaForBlockDiffusion

from dgemma import LLM
from dgemma.checkpoint import load_checkpoint, save_checkpoint
from dgemma.config import GenerationConfig
from dgemma.errors import CheckpointError, ConfigError
from dgemma.model import DiffusionGemma
from dgemma.train.attend import Layout
from dgemma.train.lora import TARGETS, LoraConfig, add_lora, is_adapted, load_adapter, merge, save_adapter
from dgemma.train.lora.sites import layers_of, tensors_of
from dgemma.train.objective import Batch, denoising_loss

peft = pytest.importorskip("peft")
SHAPE = Shape(layers="sf", vocab=64, hidden=32, dense=32, expert=8, experts=3)
CONFIGS = {
    "dense": LoraConfig(rank=3, alpha=6, targets=TARGETS, experts=False),
    "experts": LoraConfig(rank=3, alpha=6, targets=()),
}
STEPS = 50
PROMPT = torch.randint(64, (11,), generator=torch.Generator().manual_seed(3))
CANVAS = torch.randint(64, (16,), generator=torch.Generator().manual_seed(4))


@dataclass
class Case:
    config: LoraConfig
    base: DiffusionGemma
    model: DiffusionGemma  # adapted and trained; tests copy it before they change it
    weights: dict[str, Tensor]  # the base's, before anything happened


def batch(seed: int) -> Batch:
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones(2, 24, dtype=torch.bool), Layout(torch.tensor([2, 5]), 24, 16, 8))


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> Case:
    config, base = CONFIGS[request.param], our_model(hf_model(SHAPE))
    model = copy.deepcopy(base)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    add_lora(model, config, seed=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(STEPS):
        denoising_loss(model, batch(step), torch.Generator().manual_seed(step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Case(config, base, model, weights)


@torch.no_grad()
def passes(model: DiffusionGemma) -> dict[str, Tensor]:
    """Logits of both passes; the second canvas pass is told the first one's prediction."""
    cache = NaiveCache(model.config)
    encoded = model.logits(encode(model, cache, PROMPT))
    first = model.logits(denoise(model, cache, CANVAS))
    return {"encode": encoded, "denoise": model.logits(denoise(model, cache, CANVAS, model.soft_embedding(first)))}


@torch.no_grad()
def hf_passes(model: DiffusionGemmaForBlockDiffusion) -> dict[str, Tensor]:
    peer = Peer(model)
    encoded = peer.head(peer.encode([PROMPT])[0])
    first = peer.denoise(CANVAS[None])
    return {"encode": encoded, "denoise": peer.denoise(CANVAS[None], first)[0]}


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    return {name: (a[name] - b[name]).abs().max().item() for name in a}


def merged(case: Case) -> DiffusionGemma:
    model = copy.deepcopy(case.model)
    merge(model)
    return model


def test_the_adapter_alone_was_trained_and_matters_in_both_passes(case: Case) -> None:
    difference = gap(passes(case.base), passes(case.model))
    assert difference["encode"] >= 0.1 and difference["denoise"] >= 0.1
    assert {id(p) for p in case.model.parameters() if p.requires_grad} == {
        id(t) for t in tensors_of(case.model).values()
    }
    assert all(tensor.abs().max() > 0 for tensor in tensors_of(case.model).values())
    stripped = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in case.model.state_dict().items()
        if ".lora_" not in name
    }
    assert stripped.keys() == case.weights.keys()
    assert all(torch.equal(stripped[name], tensor) for name, tensor in case.weights.items())


def test_every_shared_weight_has_one_delta(case: Case) -> None:
    """One A and one B for each adapted weight of the stored model, however many passes read it."""
    weights = [name for name in case.weights if wanted(name, case.config)]
    assert len(tensors_of(case.model)) == 2 * len(weights) > 0


def wanted(name: str, config: LoraConfig) -> bool:
    if ".experts." in name:
        return config.experts
    return name.endswith("_proj.weight") and not config.experts


def test_merging_adds_the_delta_once_and_gives_the_same_logits(case: Case) -> None:
    """W + scale B A, written out from the adapter's own tensors: twice, or not at all, is far away."""
    plain, factors = merged(case), tensors_of(case.model)
    scale = case.config.alpha / case.config.rank
    for name, weight in plain.state_dict().items():
        site, inner = name.removesuffix(".weight"), ""
        if ".experts." in name:
            site, inner = name.rpartition(".")[0], ".base_layer" if name.endswith("gate_up_proj") else ""
        if not wanted(name, case.config):
            assert torch.equal(weight, case.weights[name])
            continue
        a, b = factors[f"{site}{inner}.lora_A.weight"], factors[f"{site}{inner}.lora_B.weight"]
        if ".experts." in name:
            a, b = a.view(len(weight), -1, a.shape[1]), b.view(len(b), -1, len(weight)).permute(2, 0, 1)
        delta = scale * (b @ a).detach()
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(weight - case.weights[name], delta, atol=1e-6, rtol=0)
    assert all(value <= 1e-5 for value in gap(passes(plain), passes(case.model)).values())


def test_a_copy_has_deltas_of_its_own(case: Case) -> None:
    model, trained = copy.deepcopy(case.model), passes(case.model)
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.mul_(0 if ".lora_B" in name else 1)
    assert all(value <= 1e-5 for value in gap(passes(model), passes(case.base)).values())
    assert gap(passes(case.model), trained) == {"encode": 0.0, "denoise": 0.0}


def test_merging_gives_back_a_plain_model(case: Case) -> None:
    plain, fresh = copy.deepcopy(case.model), DiffusionGemma(case.base.config)
    held = plain.state_dict()  # someone else's view of the weights, as a mapped file would be
    merge(plain)
    assert all(torch.equal(tensor, case.model.state_dict()[name]) for name, tensor in held.items())
    assert list(plain.state_dict()) == list(fresh.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in fresh.modules()]
    assert vars(plain).keys() == vars(fresh).keys()
    assert all(p.requires_grad for p in plain.parameters())
    with pytest.raises(ConfigError, match="merged already"):
        merge(plain)
    add_lora(plain, case.config)  # and a second round may begin


def test_a_merged_checkpoint_loads_in_transformers_and_here(case: Case, tmp_path: Path) -> None:
    plain = merged(case)
    byte_level(400).save(str(tmp_path / "tokenizer.json"))
    save_checkpoint(tmp_path, plain, GenerationConfig(max_new_tokens=8))
    expected = passes(plain)
    assert all(value <= 1e-4 for value in gap(hf_passes(hf_load(tmp_path, torch.float32)), expected).values())
    assert gap(passes(load_checkpoint(tmp_path).model), expected) == {"encode": 0.0, "denoise": 0.0}
    assert len(LLM.load(tmp_path, device="cpu").generate([1, 5, 9], seed=0).token_ids) > 0


def test_an_adapted_model_is_not_saved_as_a_checkpoint(case: Case, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"base_layer"):
        save_checkpoint(tmp_path / "out", case.model, GenerationConfig())
    assert not (tmp_path / "out").exists()


def test_an_adapter_survives_its_file_bit_for_bit(case: Case, tmp_path: Path) -> None:
    save_adapter(tmp_path, case.model, case.config, base="some/model")
    model = copy.deepcopy(case.base)
    assert load_adapter(tmp_path, model) == case.config
    loaded = tensors_of(model)
    assert loaded.keys() == tensors_of(case.model).keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors_of(case.model).items())
    assert gap(passes(model), passes(case.model)) == {"encode": 0.0, "denoise": 0.0}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"


def test_peft_reads_the_file_on_the_transformers_model(case: Case, tmp_path: Path) -> None:
    """Merged in peft, in place or for good, it is our merged model.

    Unmerged it cannot be: HF's encoder has modules of its own on the tied weights, and the file has no delta for them
    (it would be added to the one weight twice). So peft's unmerged encoder is still the base.
    """
    save_adapter(tmp_path, case.model, case.config)
    assert not any("encoder" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(hf_model(SHAPE), tmp_path)
    unmerged, base, ours = hf_passes(theirs.get_base_model()), hf_passes(hf_model(SHAPE)), passes(merged(case))
    assert gap(unmerged, base)["encode"] == 0.0 and gap(unmerged, base)["denoise"] >= 0.1
    theirs.merge_adapter()
    assert all(value <= 1e-4 for value in gap(hf_passes(theirs.get_base_model()), ours).values())
    theirs.unmerge_adapter()
    plain = our_model(theirs.merge_and_unload())  # through the name table: tied halves are the same tensor
    for name, tensor in merged(case).state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_low_rank_experts_are_what_peft_computes() -> None:
    model = our_model(hf_model(SHAPE))
    add_lora(model, CONFIGS["experts"])
    for index, tensor in enumerate(tensors_of(model).values()):
        torch.nn.init.normal_(tensor, std=0.2, generator=torch.Generator().manual_seed(index))
    layer = layers_of(model)["layers.0.experts"]
    slope = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (layer, lambda *args: type(layer).forward(layer, *args)):
        x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        weights, ids = model.layers[0].router(x.detach())
        out = forward(x, weights, ids)
        out.backward(slope)
        grads = {name: t.grad for name, t in tensors_of(model).items() if t.grad is not None}
        results.append({"out": out.detach(), "x": x.grad, **grads})
        for tensor in tensors_of(model).values():
            tensor.grad = None
    assert results[0].keys() == results[1].keys() and len(results[0]) == 6
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_rounds_once(experts: int, dtype: torch.dtype) -> None:
    model = our_model(hf_model(replace(SHAPE, experts=experts, top_k=1))).to(dtype)
    before = model.layers[1].experts.gate_up_proj.double()
    add_lora(model, LoraConfig(rank=2, alpha=1, targets=("q_proj",)))
    for tensor in tensors_of(model).values():
        torch.nn.init.normal_(tensor, std=0.5)
    factors = tensors_of(model)
    a, b = (factors[f"layers.1.experts.base_layer.lora_{part}.weight"].double() for part in "AB")
    wide = before + 0.5 * b.view(len(b), 2, experts).permute(2, 0, 1) @ a.view(experts, 2, -1)
    merge(model)
    error = (model.layers[1].experts.gate_up_proj.double() - wide).abs()
    assert (error <= wide.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()


def test_a_seed_fixes_the_start_and_leaves_the_global_generator_alone() -> None:
    starts = []
    for seed in (1, 1, 2):
        model = our_model(hf_model(SHAPE))
        expected = passes(model)
        state = torch.get_rng_state()
        add_lora(model, CONFIGS["dense"], seed)
        assert torch.equal(state, torch.get_rng_state())
        assert gap(passes(model), expected) == {"encode": 0.0, "denoise": 0.0}
        assert not any(module.training for module in model.modules())
        starts.append(tensors_of(model)["layers.0.mlp.up_proj.lora_A.weight"])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": 2.5}, "got 2.5"),
        ({"alpha": 0}, "positive number"),
        ({"dropout": 1.0, "experts": False}, "below 1"),
        ({"dropout": 0.1}, "experts"),
        ({"targets": ("q_proj", "router")}, "'router' is unknown; allowed: q_proj, k_proj"),
        ({"targets": "q_proj"}, "list of names"),
        ({"targets": (), "experts": False}, "nothing to adapt"),
    ],
)
def test_wrong_configurations_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**options)  # type: ignore[arg-type]


def test_a_model_must_have_what_is_named() -> None:
    base = our_model(hf_model(SHAPE))
    dense = DiffusionGemma(replace(base.config, num_experts=0))
    with pytest.raises(ConfigError, match="no experts"):
        add_lora(dense, LoraConfig())
    full = DiffusionGemma(replace(base.config, layers=base.config.layers[1:]))
    with pytest.raises(ConfigError, match="none of the lora targets v_proj"):
        add_lora(full, LoraConfig(targets=("v_proj",), experts=False))
    add_lora(base, LoraConfig())
    with pytest.raises(ConfigError, match="already"):
        add_lora(base, LoraConfig())


def test_what_cannot_be_merged_or_saved_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_adapter(tmp_path, case.base, case.config)
    with pytest.raises(ConfigError, match="another lora configuration"):
        save_adapter(tmp_path, case.model, replace(case.config, alpha=1))
    assert not list(tmp_path.iterdir())
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        next(iter(tensors_of(model).values()))[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        merge(model)
    assert is_adapted(model)


def encoder_side(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    both = load_file(file)
    both |= {n.replace("decoder.layers", "encoder.language_model.layers"): t.clone() for n, t in both.items()}
    save_file(both, file)


def one_missing(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)


def setting(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (encoder_side, "one delta for each weight"),
        (one_missing, "missing"),
        (setting("use_rslora", True), "use_rslora"),
        (setting("rank_pattern", {"q_proj": 2}), "rank_pattern"),
        (setting("r", 4), "shape"),
        (setting("peft_type", "LOHA"), "peft_type"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "is missing"),
    ],
)
def test_a_file_that_does_not_fit_leaves_the_model_alone(
    damage: Callable[[Path], None], said: str, case: Case, tmp_path: Path
) -> None:
    save_adapter(tmp_path, case.model, case.config)
    damage(tmp_path)
    model = copy.deepcopy(case.base)
    with pytest.raises(CheckpointError, match=said):
        load_adapter(tmp_path, model)
    assert not is_adapted(model)
