"""Which weights of a model a format applies to, and putting matrices in their place.

The projections of attention, the dense MLPs (self-conditioning's too) and the experts. Embedding, router, norms and
scalars keep their type: they are small, or decide what rounding must not (the choice of an expert); so does the head,
whose rounding moves entropies, unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from dgemma.kernels.cpu_vocab import CHUNK
from dgemma.kernels.matrix import Matrix
from dgemma.model import DiffusionGemma
from dgemma.model.layers import Linear
from dgemma.model.moe import Experts, Router
from dgemma.quant.protocol import WeightFormat

_STACKS = ("gate_up_proj", "down_proj")


def weight_sites(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight to be quantised: `(out, in)`, or `(experts, out, in)` of a stack."""
    return {name: tuple(getattr(module, leaf).shape) for name, module, leaf in _sites(model)}


def packed_modules(model: nn.Module) -> list[str]:
    """Names of the modules that multiply by a `Matrix` and have no plain weight any more."""
    kinds = ((name, module) for name, module in model.named_modules() if isinstance(module, Linear | Experts))
    return [name for name, module in kinds if getattr(module, "matrix", None) or getattr(module, "matrices", None)]


def install(model: nn.Module, matrices: Mapping[str, Sequence[Matrix]]) -> None:
    """Replace weights (by their names) by matrices: one of a Linear, one an expert of a stack (both stacks or none)."""
    for name in matrices:
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, Linear):
            (matrix,) = matrices[name]
            module.replace(matrix)
        elif leaf == _STACKS[0]:
            assert isinstance(module, Experts)
            module.replace(matrices[name], matrices[f"{module_name}.{_STACKS[1]}"])


def install_head(model: DiffusionGemma, weight_format: WeightFormat) -> None:
    """Let logits be products with the embedding in this format, made anew from it, in pieces of the vocabulary."""
    pieces = model.embed.weight.detach().split(CHUNK)
    shapes = ((piece.shape[0], piece.shape[1]) for piece in pieces)
    model.head = [
        weight_format.matrix(weight_format.quantize(piece), shape) for piece, shape in zip(pieces, shapes, strict=True)
    ]


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    routers = tuple(name for name, module in model.named_modules() if isinstance(module, Router))
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield from ((f"{name}.{leaf}", module, leaf) for leaf in _STACKS)
        elif isinstance(module, Linear) and not name.startswith(routers):
            yield f"{name}.weight", module, "weight"
