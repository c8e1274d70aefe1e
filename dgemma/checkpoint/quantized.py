"""Quantised checkpoints: a folder like any other, whose `config.json` names a weight format in `quantization_config`.

A quantised weight is stored as its parts, named after it (`...q_proj.weight.codes`); a stack of experts as stacks of
parts. Knows which tensors belong together, not what is in them: that is the format's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.checkpoint.files import CODES, DTYPES, Entry, open_tensors
from dgemma.errors import CheckpointError, ConfigError
from dgemma.kernels.matrix import Matrix
from dgemma.model import DiffusionGemma
from dgemma.quant import Part, WeightFormat, make_format
from dgemma.quant.protocol import stack_of
from dgemma.quant.sites import install, weight_sites

# Without HF's key `quant_method` transformers refuses the folder; with one that it does not know it only warns, and
# fills the weights that it misses with random numbers.
SECTION, MAKER = "quantization_config", "dgemma"
COMPUTE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Pack:
    """One quantised weight: its shape, and for each part the name it is stored by and where."""

    shape: tuple[int, ...]
    parts: Mapping[str, tuple[str, Entry]]


def section_of(weight_format: WeightFormat) -> dict[str, Any]:
    """What `config.json` says of a format."""
    section = {"made_by": MAKER, "format": weight_format.name, "group": weight_format.group}
    return section | ({"head": True} if weight_format.head else {})


def format_of(raw: Mapping[str, Any], folder: Path) -> WeightFormat | None:
    """The format that a `config.json` names; None if its weights are plain."""
    section = raw.get(SECTION)
    if section is None:
        return None
    if not isinstance(section, Mapping) or section.get("made_by") != MAKER:
        method = section.get("quant_method") if isinstance(section, Mapping) else section
        raise CheckpointError(f"{folder} is quantised by {method!r}; dgemma reads plain weights and its own formats")
    try:
        return make_format(str(section.get("format")), section.get("group"), head=bool(section.get("head")))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {SECTION}: {error}") from None


def split_packs(
    entries: Mapping[str, Entry],
    model: DiffusionGemma,
    weight_format: WeightFormat | None,
    ours: Callable[[str], str | None],
) -> tuple[dict[str, Pack], dict[str, Entry]]:
    """Quantised weights by our names, and the other tensors by their stored ones. Shapes and types are checked."""
    if weight_format is None:
        return {}, dict(entries)
    sites = weight_sites(model)
    found: dict[str, dict[str, tuple[str, Entry]]] = defaultdict(dict)
    plain = {}
    for stored, entry in entries.items():
        weight, _, part = stored.rpartition(".")
        name = ours(weight)
        if name in sites:
            found[name][part] = stored, entry
        else:
            plain[stored] = entry
    packs = {name: Pack(sites[name], parts) for name, parts in found.items()}
    for name, pack in packs.items():
        _check(name, pack, weight_format)
    for name in sites:
        if ".experts." in name and (name in packs) != (_partner(name) in packs):
            raise CheckpointError(f"of the two weights of {name.rpartition('.')[0]!r} only one is quantised")
    return packs, plain


def _partner(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.{'down_proj' if leaf == 'gate_up_proj' else 'gate_up_proj'}"


def part_shapes(shape: tuple[int, ...], weight_format: WeightFormat) -> dict[str, Part]:
    """The parts of a weight of that shape; those of a stack have its axis in front."""
    *stack, rows, columns = shape
    layout = weight_format.layout((rows, columns))
    return {part: Part((*stack, *size), dtype) for part, (size, dtype) in layout.items()}


def _check(name: str, pack: Pack, weight_format: WeightFormat) -> None:
    wanted = part_shapes(pack.shape, weight_format)
    if set(wanted) != set(pack.parts):
        raise CheckpointError(
            f"weight {name!r} is stored as {', '.join(sorted(pack.parts))}; "
            f"{weight_format.name} has the parts {', '.join(sorted(wanted))}"
        )
    for part, (stored, entry) in pack.parts.items():
        if (entry.shape, entry.dtype) != wanted[part]:
            raise CheckpointError(
                f"tensor {stored!r} of {entry.file} is {entry.dtype} {list(entry.shape)}, "
                f"{weight_format.name} asks for {wanted[part].dtype} {list(wanted[part].shape)}"
            )


def check_plain(entries: Mapping[str, Entry]) -> None:
    """Codes are no weights of their own."""
    for name, entry in entries.items():
        if entry.dtype in CODES.values():
            (kind,) = (kind for kind, dtype in CODES.items() if dtype is entry.dtype)
            raise CheckpointError(f"tensor {name!r} of {entry.file} is stored as {kind}, not {', '.join(DTYPES)}")


def check_compute(dtype: torch.dtype, folder: Path) -> None:
    if dtype not in COMPUTE:
        allowed = " or ".join(str(one).removeprefix("torch.") for one in COMPUTE)
        given = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{folder} has quantised weights, which multiply in {allowed}, not in {given}")


def fill_packs(
    model: DiffusionGemma, packs: Mapping[str, Pack], weight_format: WeightFormat, device: torch.device
) -> None:
    """Put a matrix in the place of every quantised weight. On the CPU its parts may stay views of the mapped file."""
    matrices: dict[str, Sequence[Matrix]] = {}
    handles: dict[Path, Any] = {}
    for name, pack in sorted(packs.items(), key=_place):
        if weight_format.copies:
            handles.clear()  # the pages that were read go with their mapping
        parts = {}
        for part, (stored, entry) in pack.parts.items():
            if entry.file not in handles:
                handles[entry.file] = open_tensors(entry.file)
            parts[part] = handles[entry.file].get_tensor(stored).to(device)
        matrices[name] = _matrices(parts, pack.shape, weight_format)
    install(model, matrices)


def _place(pack: tuple[str, Pack]) -> tuple[Path, str]:
    return min((entry.file, pack[0]) for _, entry in pack[1].parts.values())


def _matrices(parts: Mapping[str, Tensor], shape: Sequence[int], weight_format: WeightFormat) -> Sequence[Matrix]:
    *stack, rows, columns = shape
    if not stack:
        return [weight_format.matrix(parts, (rows, columns))]
    return stack_of(weight_format, parts, (stack[0], rows, columns))
