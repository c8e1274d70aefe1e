"""The models of the GPU benchmark: the released shape, a tiny one of the same kind, and random weights on a device.

Weights are made where they stay, tensor by tensor from one seed, so a second format begins with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dgemma.bench.models import Shape, fill
from dgemma.checkpoint.load import empty_model
from dgemma.config import LayerConfig, ModelConfig
from dgemma.kernels.matrix import Matrix
from dgemma.model import DiffusionGemma
from dgemma.quant import make_format
from dgemma.quant.protocol import stack_of
from dgemma.quant.sites import install, weight_sites

_SLIDING = LayerConfig(kind="sliding", num_kv_heads=8, head_dim=256)
_FULL = LayerConfig(kind="full", num_kv_heads=2, head_dim=512)
RELEASED = ModelConfig(
    vocab_size=262_144, hidden_size=2816, intermediate_size=2112, num_heads=16, layers=(*(_SLIDING,) * 5, _FULL) * 5,
    num_experts=128, top_k_experts=8, expert_size=704, sliding_window=1024, canvas_length=256, max_positions=262_144,
)  # fmt: skip
"""The text model of `google/diffusiongemma-26B-A4B-it`."""
TINY = Shape(
    vocab=300, hidden=32, layers=2, dense=48, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=2, expert=32, window=16
).config()
"""All parts of the released model, small enough for an interpreter."""


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> DiffusionGemma:
    """`bench.models.random_model`'s law, drawn on the device."""
    model = empty_model(config).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for number, (key, tensor) in enumerate(sorted(model.state_dict().items())):
        # A generator a tensor: what one draws does not depend on how many numbers another took.
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
        fill(key, tensor, generator)
    return model


def quantise(model: DiffusionGemma, name: str, tell: Callable[[str], object] = lambda text: None) -> None:
    """Put matrices of a format in the place of a model's weights, one weight after another; the plain ones go."""
    kind = make_format(name)
    held: dict[str, list[Matrix]] = {}
    for site in weight_sites(model):
        tell(f"{name}: {site}")
        module, _, leaf = site.rpartition(".")
        weight: Tensor = getattr(model.get_submodule(module), leaf).detach()
        if weight.dim() == 2:
            install(model, {site: [kind.matrix(kind.quantize(weight), (weight.shape[0], weight.shape[1]))]})
            continue
        count, rows, columns = weight.shape
        pieces = [kind.quantize(piece) for piece in weight]
        stored = {part: torch.stack([piece[part] for piece in pieces]) for part in pieces[0]}
        held[site] = stack_of(kind, stored, (count, rows, columns))  # type: ignore[assignment]
        both = {f"{module}.gate_up_proj", f"{module}.down_proj"}
        if both <= set(held):
            install(model, {name: held.pop(name) for name in both})
