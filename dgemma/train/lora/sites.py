"""Where LoRA deltas go: the configuration, the weights it chooses, and peft's layers on them. No file, no training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dgemma.config import is_whole
from dgemma.errors import ConfigError
from dgemma.model import DiffusionGemma

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION, *MLP, "self_conditioning")
_EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
Sites = Mapping[str, tuple[Tensor, ...]]
ADAPTER = "default"  # peft's name of the one adapter


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which weights get a delta `alpha / rank * B A`, and of what rank.

    `targets` are projections of every layer (`q_proj`, `k_proj`, `v_proj`, `o_proj` of attention; `gate_proj`,
    `up_proj`, `down_proj` of the dense MLP) and `self_conditioning` (its MLP). `experts` adds both fused weights of
    every layer, each expert with its own A and B. The router, norms, scalars and embeddings stay as they are.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (*ATTENTION, *MLP)
    experts: bool = True

    def __post_init__(self) -> None:
        if not is_whole(self.rank, 1):
            raise ConfigError(f"lora rank must be a whole number of at least 1, got {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora alpha must be a positive number, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora dropout must be at least 0 and below 1, got {self.dropout!r}")
        if isinstance(self.targets, str):
            raise ConfigError(f"lora targets must be a list of names, got the text {self.targets!r}")
        object.__setattr__(self, "targets", tuple(self.targets))
        for name in self.targets:
            if name not in TARGETS:
                raise ConfigError(f"lora target {name!r} is unknown; allowed: {', '.join(TARGETS)} (and experts: true)")
        if not self.targets and not self.experts:
            raise ConfigError("lora has nothing to adapt: give targets, or experts: true")
        if self.dropout and self.experts:
            raise ConfigError("lora dropout works on the input of a projection; with experts: true it must be 0")


def load_peft() -> Any:
    try:
        import peft  # two seconds to import, and only needed here
    except ImportError as error:
        raise ConfigError(f"LoRA needs the package peft (pip install 'dgemma[train]'): {error}") from None
    return peft


def choose(model: DiffusionGemma, config: LoraConfig) -> Sites:
    """Our names of the modules to adapt, each with its weights, in model order."""
    if config.experts and not model.config.num_experts:
        raise ConfigError("the model has no experts to adapt; set lora experts: false")
    sites: dict[str, tuple[Tensor, ...]] = {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if parent == "self_conditioning.mlp":
            wanted = "self_conditioning" in config.targets
        elif parent.endswith((".attention", ".mlp")):
            wanted = leaf in config.targets
        else:
            wanted = leaf == "experts" and config.experts
        if wanted:
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            weights = _EXPERT_WEIGHTS if leaf == "experts" else ("weight",)
            sites[name] = tuple(getattr(base, weight) for weight in weights)
    if not sites:
        raise ConfigError(f"the model has none of the lora targets {', '.join(config.targets)}")
    return sites


def peft_config(config: LoraConfig, sites: Sites) -> Any:
    modules = [name for name in sites if not name.endswith("experts")]
    parameters = [f"{name}.{weight}" for name in sites if name.endswith("experts") for weight in _EXPERT_WEIGHTS]
    return load_peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
    )


def layers_of(model: nn.Module) -> dict[str, Any]:
    """peft's layers by name; a wrapper of a wrapper comes first."""
    return {name: module for name, module in model.named_modules() if "lora_A" in module._modules}


def weight_name(layer: Any) -> str:
    return getattr(layer, "parameter_name", "weight")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by their names in a file (peft leaves the adapter's own name out)."""
    return {
        f"{name}.{part}.weight": getattr(layer, part)[ADAPTER].weight
        for name, layer in layers_of(model).items()
        for part in ("lora_A", "lora_B")
    }


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected(sites: Sites, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an adapter of these sites has; experts lie stacked along the rank axis."""

    def pairs() -> Iterator[tuple[str, tuple[int, ...]]]:
        for site, weights in sites.items():
            # peft wraps in the order of the weights, so the first one is the innermost.
            for depth, weight in enumerate(reversed(weights)):
                rows = rank * (weight.shape[0] if weight.ndim == 3 else 1)
                name = site + ".base_layer" * depth
                yield f"{name}.lora_A.weight", (rows, weight.shape[-1])
                yield f"{name}.lora_B.weight", (weight.shape[-2], rows)

    return dict(pairs())
