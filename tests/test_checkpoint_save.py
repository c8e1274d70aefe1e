"""Saving is all or nothing: a failure leaves nothing half-written and an earlier checkpoint as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import Shape, hf_model, our_model
from safetensors.torch import load_file, save_file

from dgemma.checkpoint import load_checkpoint, save, save_checkpoint
from dgemma.config import GenerationConfig
from dgemma.errors import CheckpointError
from dgemma.model import DiffusionGemma

SHAPE = Shape(layers="sf", vocab=64, hidden=32, dense=32, expert=8)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 20_000


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return our_model(hf_model(SHAPE))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def other(model: DiffusionGemma) -> DiffusionGemma:
    changed = DiffusionGemma(model.config)
    changed.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})
    return changed


def test_extra_files_are_written_and_replaced(model: DiffusionGemma, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, model, GenerationConfig(), {"tokenizer.json": b"{}", "chat_template.jinja": b"a"})
    save_checkpoint(tmp_path, model, GenerationConfig(), {"chat_template.jinja": b"b"})
    assert (tmp_path / "tokenizer.json").read_bytes() == b"{}"
    assert (tmp_path / "chat_template.jinja").read_bytes() == b"b"
    names = {"config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja"}
    assert set(content(tmp_path)) == names


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "config.json", WEIGHTS, INDEX, ".hidden", ""])
def test_extra_files_with_other_names_are_refused(model: DiffusionGemma, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="plain file name"):
        save_checkpoint(tmp_path / "x", model, GenerationConfig(), {name: b""})
    assert not (tmp_path / "x").exists()


def test_single_and_sharded_replace_each_other(model: DiffusionGemma, tmp_path: Path) -> None:
    second = other(model)
    first = {}
    for index, limit in enumerate([2**30, SHARD_BYTES, 30_000, 2**30]):
        current = (model, second)[index % 2]
        save_checkpoint(tmp_path, current, GenerationConfig(), max_shard_bytes=limit)
        loaded = load_checkpoint(tmp_path).model.state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in current.state_dict().items())
        stored = {name for name in content(tmp_path) if name.startswith("model")}
        assert (WEIGHTS in stored) == (limit == 2**30) != (INDEX in stored)
        first[index] = len(stored)
    assert first[1] > first[2] > first[0] == first[3] == 1


def test_shards_respect_the_limit_and_total(model: DiffusionGemma, tmp_path: Path) -> None:
    sharded = save_checkpoint(tmp_path, model, GenerationConfig(), max_shard_bytes=SHARD_BYTES)
    index = json.loads((sharded / INDEX).read_text())
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in sharded.glob("model-*")]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= SHARD_BYTES
    assert len(set(index["weight_map"].values())) == len(sizes)


@pytest.mark.parametrize("step", ["weights", "text", "flush", "rename", "rename last", "interrupt"])
@pytest.mark.parametrize("limit", [2**30, SHARD_BYTES])
def test_a_failed_save_keeps_the_old_checkpoint(
    step: str, limit: int, model: DiffusionGemma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"tokenizer.json": b"old"}
    save_checkpoint(tmp_path, model, GenerationConfig(), extra, max_shard_bytes=limit)
    before = content(tmp_path)
    full, calls = OSError(errno.ENOSPC, "No space left on device"), []

    def fail_at(number: int, error: BaseException, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == number:
                raise error
            return call(*args, **kwargs)

        return failing

    last = len(before) if step == "rename last" else 2
    with monkeypatch.context() as patch:
        if step == "weights":
            patch.setattr(save, "save_file", fail_at(1, full, save_file))
        elif step == "text":
            patch.setattr(Path, "write_text", fail_at(2, full, Path.write_text))
        elif step == "flush":
            patch.setattr(os, "fsync", fail_at(2, full, os.fsync))
        else:
            error = KeyboardInterrupt() if step == "interrupt" else full
            patch.setattr(Path, "replace", fail_at(last, error, Path.replace))
        with pytest.raises(KeyboardInterrupt if step == "interrupt" else CheckpointError) as caught:
            save_checkpoint(tmp_path, other(model), GenerationConfig(), {"tokenizer.json": b"new"}, limit)
        fresh = tmp_path / "fresh"
        calls.clear()
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            save_checkpoint(fresh, model, GenerationConfig(), {"tokenizer.json": b"new"}, limit)
    if step != "interrupt":
        assert "No space left" in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not fresh.exists()
    assert content(tmp_path) == before
    load_checkpoint(tmp_path)


def test_places_that_cannot_be_written(model: DiffusionGemma, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file/inside"):
        save_checkpoint(tmp_path / "file" / "inside", model, GenerationConfig())
    (tmp_path / "x" / "config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"x/config\.json is in the way"):
        save_checkpoint(tmp_path / "x", model, GenerationConfig())
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["config.json"]


def test_weights_of_another_type_are_not_saved(model: DiffusionGemma, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"float64.*bfloat16"):
        save_checkpoint(tmp_path / "x", model, GenerationConfig(), dtype=torch.float64)
    assert not (tmp_path / "x").exists()


FULL_DISK = """
import os, sys
from pathlib import Path
from dgemma.checkpoint import load_checkpoint, save_checkpoint
from dgemma.config import GenerationConfig
from dgemma.errors import CheckpointError

disk, source, shard = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
folder, model = disk / "run", load_checkpoint(source).model
save_checkpoint(folder, model, GenerationConfig())

def content():
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

def fails(word, **options):
    before = content()
    try:
        save_checkpoint(folder, model, GenerationConfig(max_new_tokens=3), **options)
    except CheckpointError as error:
        assert word in str(error), error
    else:
        raise SystemExit("the save should have failed: " + word)
    assert content() == before
    load_checkpoint(folder)

fails("No space left")
fails("No space left", max_shard_bytes=shard, extra_files={"tokenizer.json": b"new"})
assert os.system(f"mount -o remount,ro {disk}") == 0
fails("ead-only")
print("kept")
"""


def test_a_full_and_a_read_only_disk(model: DiffusionGemma, tmp_path: Path) -> None:
    """A real file system with room for one checkpoint and a half; skipped where none may be mounted."""
    source, disk = save_checkpoint(tmp_path / "source", model, GenerationConfig()), tmp_path / "disk"
    disk.mkdir()
    room = sum(path.stat().st_size + 4096 for path in source.iterdir()) * 3 // 2
    isolated = ["unshare", "-rm", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={room} tmpfs {disk}"
    if not shutil.which("unshare") or subprocess.run([*isolated, mount], capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    arguments = f"{disk} {source} {SHARD_BYTES}"
    done = subprocess.run(
        [*isolated, f'{mount} && exec "$0" -c "$1" {arguments}', sys.executable, FULL_DISK],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "kept", done.stdout + done.stderr
