"""LoRA adapters on disk, in peft's format with HF's module names. Knows files and names, no model and no peft.

HF ties the encoder's text weights to the decoder's. An adapter belongs to a weight, so a file names each site once, on
the decoder's side; what also holds deltas for the encoder's side would count twice when merged, and is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dgemma.checkpoint.files import open_tensors, read_json
from dgemma.checkpoint.names import hf_name, our_name
from dgemma.errors import CheckpointError

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# peft wraps a module once for each adapted parameter of it; `base_layer` is the wrapper inside.
_TENSOR = re.compile(r"(?P<site>.+?)(?P<rest>(\.base_layer)*\.lora_[AB]\.weight)")


def hf_site(ours: str) -> str:
    """HF's name (the decoder's side) of one of our adapted modules: `layers.0.mlp.up_proj`, `layers.0.experts`."""
    leaf = ".gate_up_proj" if ours.endswith(".experts") else ".weight"
    return hf_name(ours + leaf).removesuffix(leaf)


def write_adapter(folder: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write `settings` and `tensors` (by our names, `layers.0.mlp.up_proj.lora_A.weight`) to `folder`.

    Each file is complete or untouched. Returns the folder; a `CheckpointError` where it cannot be written.
    """
    folder = Path(folder)
    stored = {_PREFIX + hf_site(site) + rest: tensor for (site, rest), tensor in _split(tensors).items()}
    weights, text = folder / f".{WEIGHTS}.tmp", folder / f".{SETTINGS}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
        save_file(plain, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.chmod(weights, text.stat().st_mode)  # safetensors creates files for the owner only
        weights.replace(folder / WEIGHTS)
        text.replace(folder / SETTINGS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the adapter could not be written to {folder}: {error}") from error
    finally:
        for path in (weights, text):
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return folder


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of an adapter and its tensors by our names. Any fault is a `CheckpointError`."""
    folder = Path(folder)
    settings, file = read_json(folder / SETTINGS), folder / WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; dgemma reads adapters from safetensors only")
    tensors: dict[str, Tensor] = {}
    with open_tensors(file) as handle:
        for stored in handle.keys():  # noqa: SIM118 (a safe_open is no mapping)
            tensors[_ours(stored, file)] = handle.get_tensor(stored).clone()
    return settings, tensors


def _split(tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    parts = {name: _TENSOR.fullmatch(name) for name in tensors}
    assert all(parts.values()), "an adapter holds lora_A and lora_B weights only"
    return {(m["site"], m["rest"]): tensors[name] for name, m in parts.items() if m}


def _ours(stored: str, file: Path) -> str:
    match = _TENSOR.fullmatch(stored.removeprefix(_PREFIX))
    site = match["site"] if match else ""
    leaf = ".gate_up_proj" if site.endswith(".experts") else ".weight"
    ours = our_name(site + leaf)
    if match is None or ours is None:
        raise CheckpointError(f"tensor {stored!r} of {file} adapts no weight of the model")
    name = ours.removesuffix(leaf)
    if hf_site(name) != site:
        raise CheckpointError(
            f"tensor {stored!r} of {file} adapts the encoder's side of a weight that encoder and decoder share; "
            f"dgemma takes one delta for each weight, stored as {hf_site(name)!r}"
        )
    return name + match["rest"]
