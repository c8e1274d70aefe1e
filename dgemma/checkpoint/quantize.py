"""A checkpoint folder to a quantised one, a shard at a time: plain weights are read from the mapped file as needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.checkpoint.files import CONFIG, GENERATION, Entry, open_tensors, read_headers, read_json
from dgemma.checkpoint.load import Checkpoint, load_checkpoint
from dgemma.checkpoint.names import hf_name
from dgemma.checkpoint.quantized import SECTION, check_compute, part_shapes, section_of
from dgemma.checkpoint.save import MAX_SHARD_BYTES, write_folder
from dgemma.errors import CheckpointError
from dgemma.quant import Part, WeightFormat
from dgemma.quant.sites import packed_modules, weight_sites

# Not the card and reports: they give figures of other weights than these.
_COPIED = ("tokenizer*", "special_tokens_map.json", "*processor_config.json", "*.jinja", "LICENSE*")


@dataclass(frozen=True)
class Quantised:
    """What became of a checkpoint: folders, bytes of weights before and after, how many weights are quantised."""

    source: Path
    folder: Path
    format: WeightFormat
    bytes_before: int
    bytes_after: int
    quantised: int
    plain: int


def quantize_checkpoint(
    source: str | Path,
    folder: str | Path,
    weight_format: WeightFormat,
    *,
    dtype: torch.dtype | None = None,
    advance: Callable[[int, int], object] = lambda done, total: None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Quantised:
    """Write `source` (a folder, shipped name or hub id) to `folder`, which must not exist or be empty, all or nothing.

    `dtype` None keeps the type of what stays plain. `advance(done, total)` is told bytes of source weights.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder; a quantised checkpoint takes a new one")
    checkpoint = load_checkpoint(source, dtype=dtype)
    if checkpoint.format is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is quantised already ({checkpoint.format.name}); quantise its source"
        )
    assert not packed_modules(checkpoint.model)
    check_compute(checkpoint.model.embed.weight.dtype, checkpoint.folder)
    work = _Work(checkpoint, weight_format, advance)
    write_folder(folder, work.sizes, work.read, work.texts(), _extra(checkpoint.folder), max_shard_bytes)
    before = {entry.file for entry in read_headers(checkpoint.folder).values()}
    return Quantised(
        source=checkpoint.folder,
        folder=folder,
        format=weight_format,
        bytes_before=sum(path.stat().st_size for path in before),
        bytes_after=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        quantised=len(work.sites),
        plain=len(work.plain),
    )


class _Work:
    """Which tensors the new folder holds, and making some of them."""

    def __init__(
        self, checkpoint: Checkpoint, weight_format: WeightFormat, advance: Callable[[int, int], object]
    ) -> None:
        self._checkpoint, self._format, self._advance = checkpoint, weight_format, advance
        state = checkpoint.model.state_dict()
        self.sites = weight_sites(checkpoint.model)
        self._parts = {
            f"{hf_name(name)}.{part}": (name, part, spec)
            for name, shape in self.sites.items()
            for part, spec in part_shapes(shape, weight_format).items()
        }
        self.plain = {hf_name(name): tensor for name, tensor in state.items() if name not in self.sites}
        self._weights = {name: state[name] for name in self.sites}
        self._entries = read_headers(checkpoint.folder)
        self.sizes = {name: _nbytes(spec) for name, (*_, spec) in self._parts.items()}
        self.sizes |= {name: tensor.nbytes for name, tensor in self.plain.items()}
        self.sizes |= {name: _nbytes(self._entries[name]) for name in checkpoint.skipped}
        self._done, self._total = 0, sum(tensor.nbytes for tensor in self._weights.values())

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors of one shard. A weight that two shards share is quantised for each."""
        made: dict[str, Tensor] = {}
        wanted = {self._parts[name][0]: None for name in names if name in self._parts}
        for weight in wanted:
            parts = self._quantised(weight)
            made |= {name: parts[self._parts[name][1]] for name in names if self._parts.get(name, ("",))[0] == weight}
        for name in names:
            if name in self.plain:
                made[name] = self.plain[name].contiguous()
            elif name not in self._parts:
                made[name] = open_tensors(self._entries[name].file).get_tensor(name)
        return made

    def texts(self) -> dict[str, dict[str, Any]]:
        """The JSON files: the source's own, and the format."""
        folder = self._checkpoint.folder
        config = read_json(folder / CONFIG) | {SECTION: section_of(self._format)}
        config["dtype"] = str(self._checkpoint.model.embed.weight.dtype).removeprefix("torch.")
        path = folder / GENERATION
        return {CONFIG: config, GENERATION: read_json(path) if path.exists() else self._checkpoint.generation.to_hf()}

    def _quantised(self, name: str) -> dict[str, Tensor]:
        weight = self._weights[name]
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"tensor {hf_name(name)!r} of {self._checkpoint.folder} is not finite")
        pieces = []
        for piece in weight if weight.dim() == 3 else [weight]:
            pieces.append(self._format.quantize(piece))
            self._done += piece.nbytes
            self._advance(min(self._done, self._total), self._total)
        if weight.dim() == 2:
            return pieces[0]
        return {part: torch.stack([piece[part] for piece in pieces]) for part in pieces[0]}


def _nbytes(tensor: Part | Entry) -> int:
    return tensor.dtype.itemsize * math.prod(tensor.shape)


def _extra(folder: Path) -> dict[str, bytes]:
    """What goes along unchanged: the tokenizer's files, the chat template, the licence."""
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(found)}
