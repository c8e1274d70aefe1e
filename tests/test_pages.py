"""Packed weights leave memory once: their originals go back to the file, unless they were changed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from engine_kit import config, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgemma.checkpoint import load_checkpoint, save_checkpoint
from dgemma.checkpoint.files import open_tensors
from dgemma.engine import Runner
from dgemma.kernels import native
from dgemma.kernels.pages import give_back
from dgemma.train.init import new_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
WEIGHTS = "model.safetensors"


def resident(file: Path) -> int:
    """Bytes of a mapped file in this process's memory, as the system counts them."""
    size, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            here = line.endswith(f" {file}")
        elif here and line.startswith("Rss:"):
            size += 1024 * int(line.split()[1])
    return size


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, Tensor]:
    file = tmp_path / WEIGHTS
    save_file({"weight": torch.arange(1 << 21, dtype=torch.int32).view(2048, 1024)}, file)
    weight = open_tensors(file).get_tensor("weight")
    assert int(weight.long().sum()) == (1 << 20) * ((1 << 21) - 1)
    assert resident(file) >= weight.nbytes
    return file, weight


def test_what_was_only_read_goes_and_comes_back(mapped: tuple[Path, Tensor]) -> None:
    file, weight = mapped
    given = give_back(weight)
    assert weight.nbytes - 2 * 4096 <= given <= weight.nbytes
    assert resident(file) <= 100_000
    assert torch.equal(weight, torch.arange(1 << 21, dtype=torch.int32).view(2048, 1024))


def test_a_changed_page_stays(mapped: tuple[Path, Tensor]) -> None:
    file, weight = mapped
    weight[700:703] += 1
    weight[2000] = -1
    given = give_back(weight)
    assert 0 < given <= weight.nbytes - 4 * 4096
    assert resident(file) <= 100_000
    wanted = torch.arange(1 << 21, dtype=torch.int32).view(2048, 1024).clone()
    wanted[700:703] += 1
    wanted[2000] = -1
    assert torch.equal(weight, wanted)


def test_memory_without_a_file_stays() -> None:
    weight = torch.full((1024, 1024), 3)
    assert give_back(weight) == 0 and bool((weight == 3).all())
    assert give_back(torch.empty(0)) == give_back(torch.ones(3)) == 0


@pytest.mark.skipif(native.load() is None, reason="without compiled ops nothing is packed")
@pytest.mark.parametrize("experts", [0, 4])
def test_an_engine_holds_its_weights_once(tmp_path: Path, experts: int) -> None:
    """And they are still there to be saved, with what was changed in memory before."""
    more = {"num_experts": experts, "top_k_experts": min(2, experts), "expert_size": 192 if experts else 0}
    shape = tiny_config(hidden_size=256, intermediate_size=768, **more)
    save_checkpoint(tmp_path / "one", new_model(shape, 3).bfloat16(), config())
    file = tmp_path / "one" / WEIGHTS
    before = {name: tensor.clone() for name, tensor in load_file(file).items()}  # no second mapping of the file

    model = load_checkpoint(tmp_path / "one").model
    model.requires_grad_(False)
    changed = model.layers[1].mlp.up_proj.weight
    changed[5] = 2.0
    packed = sum(w.nbytes for name, w in model.named_parameters() if "proj" in name)
    assert packed > 5_000_000 and sum(float(w.float().sum()) for w in model.parameters())
    assert resident(file) > packed
    runner = Runner(model)
    assert runner._stack is not None
    assert resident(file) < 0.15 * packed

    assert bool((changed[5] == 2.0).all()) and runner._stack._layers[1]._mlp._gate_up.dense()[768 + 5].eq(2.0).all()
    save_checkpoint(tmp_path / "two", model, config())
    after = load_file(tmp_path / "two" / WEIGHTS)
    differ = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert len(differ) == 1 and differ[0].endswith("layers.1.mlp.up_proj.weight")
