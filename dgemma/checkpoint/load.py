"""A checkpoint folder to a model: strict, streaming, and without a second copy of the weights.

The model is built without storage, every name, shape and type is checked against the headers, and only then
are the tensors put in place one by one. With the stored type on the CPU they stay views of the mapped file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dgemma.checkpoint.files import (
    CONFIG,
    GENERATION,
    Entry,
    find_folder,
    open_tensors,
    read_headers,
    read_json,
)
from dgemma.checkpoint.names import hf_name, is_skipped, our_name
from dgemma.checkpoint.quantized import check_compute, check_plain, fill_packs, format_of, split_packs
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.errors import CheckpointError, ConfigError, RequestError
from dgemma.model import DiffusionGemma
from dgemma.quant import WeightFormat
from dgemma.quant.sites import install_head


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with what its folder says about it.

    `name` is the hub id, the shipped name or the folder's. `skipped` lists stored tensors of parts that are
    not built yet (the vision tower). `format` is that of quantised weights, None if all are plain.
    """

    model: DiffusionGemma
    config: ModelConfig
    generation: GenerationConfig
    folder: Path
    name: str
    skipped: tuple[str, ...] = ()
    format: WeightFormat | None = None


def load_checkpoint(
    path_or_id: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Checkpoint:
    """Load a folder in HF's format, a hub id, or a shipped model by name.

    `dtype` None keeps the stored type. Peak memory is the weights plus one tensor. A missing, unknown or
    wrong-shaped tensor, tied tensors that differ, and any broken file are a `CheckpointError`. Quantised weights stay
    packed; `dtype` (float32 or bfloat16) is then that of everything else and of the activations.
    """
    return assemble(path_or_id, ModelConfig.from_hf, DIFFUSION, device, dtype)


@dataclass(frozen=True)
class Naming:
    """How a family of checkpoints calls its tensors. `ours` and `stored` translate; `skipped` knows what is left out.

    `optional` are tensors of ours that the family lacks (the caller makes them), `part` what it is a checkpoint of.
    """

    ours: Callable[[str], str | None]
    stored: Callable[[str], str]
    skipped: Callable[[str], bool]
    optional: Callable[[str], bool]
    part: str


DIFFUSION = Naming(ours=our_name, stored=hf_name, skipped=is_skipped, optional=lambda ours: False, part="model")


def assemble(
    path_or_id: str | Path,
    configure: Callable[[Mapping[str, Any]], ModelConfig],
    naming: Naming,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Checkpoint:
    """A checkpoint of any family: `configure` reads `config.json`, `naming` the tensors; optional ones stay meta."""
    folder, name = find_folder(path_or_id)
    raw = read_json(folder / CONFIG)
    try:
        config = configure(raw)
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: {str(error).removeprefix('config.json: ')}") from error
    generation = _generation(folder, raw, config)
    weight_format = format_of(raw, folder)
    entries = read_headers(folder)
    model = empty_model(config)
    packs, plain = split_packs(entries, model, weight_format, naming.ours)
    check_plain(plain)
    wanted = {ours: tensor for ours, tensor in model.state_dict().items() if ours not in packs}
    sources, skipped = _match(plain, wanted, naming, folder)
    if dtype is None:
        dtype = _stored_dtype(plain[source] for names in sources.values() for source in names)
    if weight_format is not None:
        check_compute(dtype, folder)
        fill_packs(model, packs, weight_format, torch.device(device))
    _fill(model, plain, sources, torch.device(device), dtype)
    if weight_format is not None and weight_format.head and model.embed.weight.device.type == "cpu":
        install_head(model, weight_format)
    return Checkpoint(model.eval(), config, generation, folder, name, skipped, weight_format)


def empty_model(config: ModelConfig) -> DiffusionGemma:
    """The network without storage."""
    with torch.device("meta"), _NoInit():
        return DiffusionGemma(config)


class _NoInit(TorchFunctionMode):
    """Leaves out `torch.nn.init`: on storage that is not there, it imports the compiler (seconds, and 80 MB)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _generation(folder: Path, raw: Mapping[str, object], config: ModelConfig) -> GenerationConfig:
    path, nested = folder / GENERATION, raw.get("generation_config")
    # Older MLX conversions keep the generation settings inside config.json.
    data = read_json(path) if path.exists() else nested if isinstance(nested, dict) else {}
    try:
        # HF writes null for "not set", which falls back to the defaults; it never means "off" in a file.
        return GenerationConfig.from_hf({k: v for k, v in data.items() if v is not None}, config)
    except (RequestError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _match(
    entries: Mapping[str, Entry], wanted: Mapping[str, Tensor], naming: Naming, folder: Path
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Our name -> stored names (several when tied tensors were written twice), and what is skipped."""
    sources: dict[str, list[str]] = {}
    skipped = []
    for stored, entry in entries.items():
        ours = naming.ours(stored)
        if naming.skipped(stored):
            skipped.append(stored)
        elif ours is None or ours not in wanted:
            raise CheckpointError(f"tensor {stored!r} of {entry.file} has no place in the {naming.part} of {CONFIG}")
        elif entry.shape != tuple(wanted[ours].shape):
            raise CheckpointError(
                f"tensor {stored!r} of {entry.file} has shape {list(entry.shape)}, "
                f"{CONFIG} asks for {list(wanted[ours].shape)}"
            )
        else:
            sources.setdefault(ours, []).append(stored)
    missing = [naming.stored(ours) for ours in wanted if ours not in sources and not naming.optional(ours)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"tensor {missing[0]!r}{more} missing in {folder}")
    return sources, tuple(sorted(skipped))


def _stored_dtype(entries: Iterable[Entry]) -> torch.dtype:
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(f"the tensors are stored in several types ({names}); choose one with dtype=")
    return dtypes.pop()


def _fill(
    model: DiffusionGemma,
    entries: Mapping[str, Entry],
    sources: Mapping[str, list[str]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    places = {stored: ours for ours, names in sources.items() for stored in names}
    filled: dict[str, str] = {}
    for stored, tensor in _read(entries, places, device, dtype):
        ours = places[stored]
        module_name, _, leaf = ours.rpartition(".")
        module = model.get_submodule(module_name)
        if ours in filled:
            if not torch.equal(getattr(module, leaf), tensor):
                raise CheckpointError(
                    f"tensors {filled[ours]!r} and {stored!r} differ, but the model ties them into one"
                )
            continue
        filled[ours] = stored
        setattr(module, leaf, nn.Parameter(tensor) if leaf in module._parameters else tensor)


def _read(
    entries: Mapping[str, Entry], names: Iterable[str], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Tensors one by one, file by file, in the wanted type and place."""
    ordered = sorted(names, key=lambda name: (entries[name].file, name))
    for file, group in groupby(ordered, lambda name: entries[name].file):
        handle = open_tensors(file)
        for name in group:
            stored = handle.get_tensor(name)
            tensor = stored.to(device=device, dtype=dtype)
            if tensor is not stored:
                # A copy was made: closing the mapping gives the pages back, so that they do not add up.
                del stored
                handle = open_tensors(file)
            yield name, tensor
