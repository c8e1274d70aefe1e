"""Where a checkpoint's files are and what their headers say; no tensor is read here.

Every fault is a `CheckpointError` that names the file or the tensor.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dgemma.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
SHIPPED = Path(__file__).resolve().parent.parent / "models"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}  # only as parts of a quantised weight
_HUB_FILES = ["*.json", "*.jinja", "README.md"]


@dataclass(frozen=True)
class Entry:
    """One stored tensor, as the header of `file` describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_folder(path_or_id: str | Path, *, weights: bool = True) -> tuple[Path, str]:
    """Folder and name of a checkpoint: a shipped name ("default"), a folder, or a hub id (downloaded).

    `weights` false leaves the weights of a hub id where they are: enough to describe a model. A folder of the same
    name as a shipped model is reached as "./name".
    """
    text = str(path_or_id)
    if re.fullmatch(r"[A-Za-z0-9_-]+", text) and (SHIPPED / text).is_dir():
        return SHIPPED / text, text
    path = Path(text).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is the folder that holds {CONFIG}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return _download(text, weights), text
    shipped = sorted(folder.name for folder in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    raise CheckpointError(
        f"no checkpoint {text!r}: neither a folder, nor a hub id of the form owner/name, "
        f"nor a shipped model ({', '.join(shipped) or 'none'})"
    )


def _download(hub_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # half a second to import, and only needed for hub ids

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*_HUB_FILES, *["*.safetensors"] * weights]))
    except Exception as error:  # offline, gated, unknown: the hub raises from many trees, none of them ours
        raise CheckpointError(
            f"{hub_id} is no local folder and could not be downloaded from the hub: {_short(error)}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_short(error)}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by its stored name. A single file goes before an index, as with HF."""
    if (folder / SINGLE).exists():
        return _header(folder / SINGLE)
    if (folder / INDEX).exists():
        return _sharded(folder, folder / INDEX)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise CheckpointError(f"{pickles[0]} is a pickle, which can run code; dgemma reads safetensors only")
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def open_tensors(file: Path) -> Any:
    """`safe_open` on the CPU (tensors are views of the mapped file)."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {_short(error)}") from None


def _sharded(folder: Path, index: Path) -> dict[str, Entry]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map")
    entries: dict[str, Entry] = {}
    for name in sorted({str(file) for file in places.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file of this folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, but {index.name} names it")
        for tensor, entry in _header(folder / name).items():
            if places.get(tensor) != name:
                raise CheckpointError(f"tensor {tensor!r} of {folder / name} is not listed so in {index.name}")
            entries[tensor] = entry
    for tensor, name in places.items():
        if tensor not in entries:
            raise CheckpointError(f"tensor {tensor!r}, listed in {index.name}, is missing in {folder / name}")
    return entries


def _header(file: Path) -> dict[str, Entry]:
    entries = {}
    with open_tensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (a safe_open is no mapping)
            piece = handle.get_slice(name)
            dtype = (DTYPES | CODES).get(piece.get_dtype())
            if dtype is None:
                known = ", ".join(DTYPES)
                raise CheckpointError(f"tensor {name!r} of {file} is stored as {piece.get_dtype()}, not {known}")
            entries[name] = Entry(file, tuple(piece.get_shape()), dtype)
    return entries


def _short(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
