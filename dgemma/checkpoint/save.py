"""A model to a folder in HF's format, all or nothing.

Every file is first written beside its place under a temporary name and flushed to disk; only when all are
there are they renamed, the weights (or the index) last. A failure before that leaves no trace, a failure of a
rename takes the finished ones back.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dgemma.checkpoint.files import CONFIG, DTYPES, GENERATION, INDEX, SINGLE, read_json
from dgemma.checkpoint.names import hf_name
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.errors import CheckpointError
from dgemma.model import DiffusionGemma
from dgemma.quant.sites import packed_modules

MAX_SHARD_BYTES = 4 * 2**30

# HF cannot build the model without a vision tower. The smallest one, all zeros, lets it load our save whole.
_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 4,
    "intermediate_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "patch_size": 1,
    "pooling_kernel_size": 1,
    "position_embedding_size": 1,
}


def save_checkpoint(
    folder: str | Path,
    model: DiffusionGemma,
    generation: GenerationConfig,
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `config.json`, `generation_config.json`, weights and `extra_files` (name -> content) to `folder`.

    Weights larger than `max_shard_bytes` are split and indexed. `dtype` None keeps the type they have. An
    existing checkpoint in `folder` is replaced, or kept with a `CheckpointError`. Returns the folder.
    """
    packed = packed_modules(model)
    if packed:
        raise CheckpointError(
            f"{packed[0]} is quantised or packed for its kernel: such a model cannot be saved, "
            "only the checkpoint that it was loaded from copied"
        )
    tensors = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    tensors |= _vision_placeholder(model)
    stored = dtype or model.embed.weight.dtype
    if stored not in DTYPES.values():
        allowed = ", ".join(map(str, DTYPES.values()))
        raise CheckpointError(f"weights cannot be saved as {stored}; allowed: {allowed}")
    return write_folder(
        Path(folder),
        {name: tensor.numel() * stored.itemsize for name, tensor in tensors.items()},
        lambda names: {name: tensors[name].detach().to("cpu", stored).contiguous() for name in names},
        {CONFIG: config_json(model.config, stored), GENERATION: generation.to_hf()},
        extra_files,
        max_shard_bytes,
    )


def write_folder(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[list[str]], Mapping[str, Tensor]],
    texts: Mapping[str, Mapping[str, Any]],
    extra_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """The writing of `save_checkpoint` for tensors that are made shard by shard: `sizes` in bytes by stored name,
    `read(names)` gives those of one shard, `texts` are JSON files.
    """
    extra, texts = dict(extra_files or {}), dict(texts)
    shards = _shards(sizes, max_shard_bytes)
    names = [_shard_name(index, len(shards)) for index in range(len(shards))]
    if len(shards) > 1:
        texts[INDEX] = _index_json(sizes, shards, names)
    for name in extra:
        if Path(name).name != name or name in ("", SINGLE, INDEX, CONFIG, GENERATION) or name[0] == ".":
            raise CheckpointError(f"extra file {name!r} must be a plain file name of its own")
    with _transaction(folder, _stale(folder, {*names, *texts})) as place:
        for name, keys in zip(names, shards, strict=True):
            save_file(dict(read(keys)), place(name), metadata={"format": "pt"})
        for name, content in extra.items():
            place(name).write_bytes(content)
        for name, data in texts.items():
            place(name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return folder


def _vision_placeholder(model: DiffusionGemma) -> dict[str, Tensor]:
    if not model.config.num_experts:
        return {}  # HF cannot build a dense model anyway
    size = model.config.hidden_size
    return {
        "model.encoder.embed_vision.embedding_projection.weight": torch.zeros(size, 4),
        "model.encoder.vision_tower.patch_embedder.input_proj.weight": torch.zeros(4, 3),
        "model.encoder.vision_tower.patch_embedder.position_embedding_table": torch.zeros(2, 1, 4),
    }


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {**config.to_hf(), "dtype": str(dtype).removeprefix("torch."), "vision_config": _VISION}


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds `limit` bytes (unless one tensor alone does)."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _shard_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _index_json(sizes: Mapping[str, int], shards: list[list[str]], names: list[str]) -> dict[str, Any]:
    places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}


def _stale(folder: Path, written: set[str]) -> list[Path]:
    """Weight files of an earlier checkpoint that this one leaves without a purpose."""
    old = {SINGLE, INDEX}
    with suppress(CheckpointError):
        old |= {str(name) for name in dict(read_json(folder / INDEX).get("weight_map") or {}).values()}
    ours = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    # In this order the index and the single file go before the shards: nothing ever points at what is gone.
    gone = (folder / name for name in sorted(old - written, reverse=True) if ours.fullmatch(name))
    return [path for path in gone if path.exists()]


@contextmanager
def _transaction(folder: Path, stale: list[Path]) -> Iterator[Callable[[str], Path]]:
    """Gives `place(name)`, a temporary path; at the end every placed file takes its name, or none does.

    `stale` files are removed after that.
    """
    token, placed = secrets.token_hex(4), dict[str, Path]()

    def place(name: str) -> Path:
        if (folder / name).exists() and not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is in the way: not a file")
        return placed.setdefault(name, folder / f".{name}.{token}.tmp")

    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield place
        for path in placed.values():
            # safetensors creates files for the owner only; a checkpoint is as readable as its config.json.
            shutil.copymode(placed[CONFIG], path)
            _flush(path)
        _rename(folder, placed, token)
        for path in stale:
            path.unlink()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint could not be written to {folder}: {error}") from error
    finally:
        for path in placed.values():
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if made:
            with suppress(OSError):
                folder.rmdir()  # only goes if nothing was written


def _rename(folder: Path, placed: Mapping[str, Path], token: str) -> None:
    order = sorted(placed, key=lambda name: (name in (SINGLE, INDEX), name))
    kept = {name: folder / f".{name}.{token}.old" for name in order if (folder / name).exists()}
    done: list[str] = []
    try:
        for name in order:
            if name in kept:
                _keep(folder / name, kept[name])
            placed[name].replace(folder / name)
            done.append(name)
    except BaseException:
        for name in done:
            if name not in kept:
                (folder / name).unlink()
        for name, backup in kept.items():
            if backup.exists():
                backup.replace(folder / name)
        raise
    finally:
        for backup in kept.values():
            backup.unlink(missing_ok=True)
    _flush(folder)


def _keep(path: Path, backup: Path) -> None:
    try:
        os.link(path, backup)
    except OSError:  # a file system without hard links
        path.replace(backup)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
