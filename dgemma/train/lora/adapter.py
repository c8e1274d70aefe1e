"""LoRA: a frozen model with small trained deltas, on dense projections and on the fused expert weights.

`peft` makes the layers and their file format. Encoding and denoising are two calls of the same modules, so a weight has
one delta that acts in both passes and is folded in once. Knows no data and no loop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dgemma.checkpoint.adapters import SETTINGS, hf_site, read_adapter, write_adapter
from dgemma.errors import CheckpointError, ConfigError
from dgemma.model import DiffusionGemma
from dgemma.train.lora.experts import factors, low_rank_experts
from dgemma.train.lora.sites import (
    ADAPTER,
    TARGETS,
    LoraConfig,
    Sites,
    choose,
    expected,
    layers_of,
    load_peft,
    peft_config,
    shapes_of,
    tensors_of,
    weight_name,
)

__all__ = ["TARGETS", "LoraConfig", "add_lora", "is_adapted", "load_adapter", "merge", "save_adapter"]


def add_lora(model: DiffusionGemma, config: LoraConfig, seed: int = 0) -> None:
    """Put a delta beside every chosen weight, in place; afterwards only the deltas require gradients.

    A is random (a function of `seed`), B is zero: the model computes what it did before. A `ConfigError` if the model
    has an adapter already, or lacks what the configuration names.
    """
    if is_adapted(model):
        raise ConfigError("the model has an adapter already; merge it first")
    sites = choose(model, config)
    peft = load_peft()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft_config(config, sites), model)
    model.requires_grad_(False)
    for name, layer in layers_of(model).items():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
        if name.endswith(".experts"):
            layer.forward = partial(low_rank_experts, layer, ADAPTER)
    model.train(model.training)  # new layers start in training mode: dropout


def is_adapted(model: DiffusionGemma) -> bool:
    """Whether the model holds an adapter that is not merged."""
    return bool(layers_of(model))


@torch.no_grad()
def merge(model: DiffusionGemma) -> None:
    """Fold every delta into its weight, once, and take the adapter away: a plain model, all of it trainable again.

    The sum is taken in float32 at least and rounded once to the weight's type. A `ConfigError`, with nothing changed,
    if there is no adapter (merged before?) or if it holds values that are not finite.
    """
    layers = layers_of(model)
    if not layers:
        raise ConfigError("the model has no adapter to merge: none was added, or it is merged already")
    for name, tensor in tensors_of(model).items():
        if not tensor.isfinite().all():
            raise ConfigError(f"the adapter cannot be merged: {name} holds values that are not finite")
    for layer in layers.values():
        weight = getattr(layer.get_base_layer(), weight_name(layer))
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (factor.to(wide) for factor in factors(layer, ADAPTER, weight))
        # Not in place: on the CPU a loaded weight is a view of the checkpoint's mapped file.
        weight.data = (weight.to(wide) + layer.scaling[ADAPTER] * (b @ a)).to(weight.dtype)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        if child != "base_layer":  # a wrapper inside another goes with it
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
    model.requires_grad_(True)


def save_adapter(folder: str | Path, model: DiffusionGemma, config: LoraConfig, base: str | None = None) -> Path:
    """Write the adapter of `model` (made with `config`) in peft's format; `base` is the checkpoint it belongs to."""
    tensors, sites = tensors_of(model), choose(model, config)
    if not tensors:
        raise ConfigError("the model has no adapter to save: none was added, or it is merged already")
    scales = {layer.scaling[ADAPTER] for layer in layers_of(model).values()}
    if shapes_of(tensors) != expected(sites, config.rank) or scales != {config.alpha / config.rank}:
        raise ConfigError("the model's adapter was made with another lora configuration than the one to be saved")
    return write_adapter(folder, _settings(config, sites) | {"base_model_name_or_path": base}, tensors)


@torch.no_grad()
def load_adapter(folder: str | Path, model: DiffusionGemma) -> LoraConfig:
    """Add the adapter of `folder` to a plain model, ready to train on or to merge; returns its configuration.

    A `CheckpointError`, with the model as it was, for a file that does not fit the model or uses a feature of peft
    other than plain LoRA.
    """
    settings, stored = read_adapter(folder)
    names = [name.split(".lora_")[0].removesuffix(".base_layer") for name in stored]
    leaves = {"self_conditioning" if n.startswith("self_cond") else n.rpartition(".")[2] for n in names}
    try:
        config = LoraConfig(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            dropout=settings.get("lora_dropout", 0.0),
            targets=tuple(name for name in TARGETS if name in leaves),
            experts="experts" in leaves,
        )
        sites = choose(model, config)
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{Path(folder) / SETTINGS} does not fit the model: {error}") from error
    _check_plain(settings, _settings(config, sites), Path(folder) / SETTINGS)
    if (found := shapes_of(stored)) != (wanted := expected(sites, config.rank)):
        name = sorted(set(found.items()) ^ set(wanted.items()))[0][0]
        raise CheckpointError(
            f"{folder} does not fit the model: {name} has shape {found.get(name, 'missing')}, "
            f"{wanted.get(name, 'nothing')} is needed (an adapter covers all layers)"
        )
    add_lora(model, config)
    for name, tensor in tensors_of(model).items():
        tensor.copy_(stored[name])
    return config


def _settings(config: LoraConfig, sites: Sites) -> dict[str, Any]:
    """What stands in `adapter_config.json`: the same configuration with HF's names, decoder side only."""
    settings = peft_config(config, {hf_site(name): weights for name, weights in sites.items()}).to_dict()
    settings["peft_type"] = settings["peft_type"].value
    return json.loads(json.dumps(settings, default=sorted))


def _check_plain(found: Mapping[str, Any], plain: Mapping[str, Any], file: Path) -> None:
    """Refuse every setting that would change what the tensors mean."""
    free = {"target_modules", "target_parameters", "peft_version", "base_model_name_or_path", "revision", "task_type",
            "inference_mode", "auto_mapping", "init_lora_weights", "exclude_modules"}  # fmt: skip
    for key, value in found.items():
        if key not in free and (value or None) != (plain.get(key) or None):
            raise CheckpointError(f"{file}: {key} = {value!r} is not supported, only plain LoRA")
