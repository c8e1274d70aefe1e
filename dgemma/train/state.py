"""Training state on disk: one folder a step, whole or not there at all, for any number of processes.

The tensors go through `torch.distributed.checkpoint`, so what N ranks saved M ranks can load. Knows names and tensors,
but not what they mean.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as load_sharded
from torch.distributed.checkpoint import save as save_sharded

from dgemma.errors import CheckpointError

INFO = "info.json"
PART = ".part"


def save(folder: Path, step: int, tensors: dict[str, Any], info: dict[str, Any], keep: int = 2) -> Path:
    """Write `folder/step-00000050` with `tensors` (nested dicts; DTensors shard by shard) and `info` (JSON).

    A kill at any moment leaves the states before it, or those and this one. All but the last `keep` are deleted.
    With a process group every rank must call this together, on a file system that all of them see.
    Raises `CheckpointError` when it cannot be written.
    """
    final = folder / f"step-{step:08d}"
    beside = final.with_suffix(PART)
    try:
        if _is_first():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(beside, ignore_errors=True)
        _together()
        with _quiet():
            save_sharded(tensors, storage_writer=FileSystemWriter(beside, sync_files=True))
        if _is_first():
            _write_synced(beside / INFO, json.dumps(info))
            _sync(beside)
            if final.exists():  # an unusable one, or the run was wound back: what is written now counts
                shutil.rmtree(final)
            os.replace(beside, final)
            _sync(folder)
            for old in _steps(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        _together()
    except (OSError, CheckpointException) as error:
        raise CheckpointError(f"{final}: cannot be written: {_cause(error)}") from None
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete state in `folder`, or None."""
    found = _steps(folder)
    return found[-1] if found else None


def load(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Fill `tensors` (as given to `save`, however they are sharded now) in place from `path`; returns its `info`.

    Raises `CheckpointError` for a folder that is damaged or has not got these tensors.
    """
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
        with _quiet():
            load_sharded(tensors, storage_reader=FileSystemReader(path))
    # A damaged file shows as whatever its reader stumbles over, outside of the reader's own exception too.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"{path}: cannot be loaded: {_cause(error)}") from None
    return info


def _cause(error: BaseException) -> str:
    """What went wrong on the first rank where something did, without its traceback."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip() or type(error).__name__


def _steps(folder: Path) -> list[Path]:
    """Complete states, oldest first."""
    found = [path for path in folder.glob("step-*") if path.suffix != PART and _is_whole(path)]
    return sorted(found, key=lambda path: path.name)


def _is_whole(path: Path) -> bool:
    return (path / INFO).is_file() and (path / ".metadata").is_file()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """A rename is on disk only when the folder's own entry is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns that there is only one process, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
