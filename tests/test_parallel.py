"""Several processes are one run: real `torchrun` with two gloo processes against one, and the state on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import parallel_run
import pytest
import torch
from parallel_run import CASES, RESUMED

from dgemma.errors import CheckpointError, ConfigError
from dgemma.kernels.packed import has_bfloat16
from dgemma.train import state
from dgemma.train.parallel import Parallel

REPO = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}

Results = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, list[Results], Path]:
    """Every case in one process, then in two; the folder has their states."""
    folder = tmp_path_factory.mktemp("parallel")
    one = {name: parallel_run.run(case, Parallel(), folder / "one" / name) for name, case in CASES.items()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(REPO / "tests" / "parallel_run.py"), str(folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = [{path.name[:-5]: torch.load(path) for path in folder.glob(f"*.{rank}.pt")} for rank in (0, 1)]
    return one, two, folder


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.mark.parametrize("name", ["muon", "adamw", "frozen", "no encoder"])
def test_two_processes_have_the_losses_and_weights_of_one(runs: tuple[Results, list[Results], Path], name: str) -> None:
    one, two = runs[0][name], [results[name] for results in runs[1]]
    losses = torch.tensor(one["losses"])
    assert losses[:, 0].unique().numel() == len(losses)
    for rank in two:
        assert (torch.tensor(rank["losses"]) - losses).abs().max() < 1e-5
        assert (torch.tensor(rank["norms"]) - torch.tensor(one["norms"])).abs().max() < 1e-4
        assert abs(rank["after"] - one["after"]) < 1e-5
        for kind in ("weights", "averaged", "plain"):
            assert furthest(rank[kind], one[kind]) < 2e-4, kind
    assert furthest(two[0]["plain"], two[1]["plain"]) == 0


def test_bfloat16_weights_at_muons_full_rate_stay_near(runs: tuple[Results, list[Results], Path]) -> None:
    one, two = runs[0]["bf16"], runs[1][0]["bf16"]
    assert (torch.tensor(one["losses"]) - torch.tensor(two["losses"])).abs().max() < 2e-2


def test_muon_on_shards_is_muon_bit_for_bit(runs: tuple[Results, list[Results], Path]) -> None:
    one = parallel_run.same_gradients(Parallel())
    for results in runs[1]:
        for name, master in results["same gradients"].items():
            # Muon iterates in float32 where a processor has no bfloat16; there a product's last bits know its shape.
            same = torch.equal(master, one[name])
            assert same or (not has_bfloat16() and torch.allclose(master, one[name], atol=1e-4)), name


def test_a_rank_holds_about_half(runs: tuple[Results, list[Results], Path]) -> None:
    for name in CASES:
        held = [results[name]["bytes"] / runs[0][name]["bytes"] for results in runs[1]]
        assert max(held) <= 0.55 and sum(held) >= 1.0, name


@pytest.mark.parametrize("name", RESUMED)
def test_a_state_moves_between_one_process_and_two(
    runs: tuple[Results, list[Results], Path], name: str, tmp_path: Path
) -> None:
    one, (two, other), folder = runs
    saved_by_two = state.latest(folder / "two" / name)
    assert saved_by_two is not None and saved_by_two.name == "step-00000005"
    alone = parallel_run.run(CASES[name], Parallel(), tmp_path, saved_by_two)
    together = two[f"{name}.resumed"]
    for kind, values in one[name]["state"].items():
        assert furthest(alone["loaded"][kind], two[name]["state"][kind]) == 0, kind
        assert furthest(together["loaded"][kind], values) == 0, kind
        assert furthest(other[f"{name}.resumed"]["loaded"][kind], values) == 0, kind
    assert abs(alone["losses"][0][0] - together["losses"][0][0]) < 1e-5


def test_a_batch_with_fewer_examples_than_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 examples cannot be shared by 6 processes"):
        Parallel(0, 6).check(parallel_run.batch(0))


def test_one_process_alone_needs_no_group() -> None:
    alone = Parallel.from_environment()
    assert (alone.rank, alone.world) == (0, 1)
    assert alone.sum([1.5, 2.0]) == [1.5, 2.0] and alone.any(True) and not alone.any(False)
    alone.close()


# -- the state on disk ---------------------------------------------------------------


def tensors(value: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(int(value))
    return {
        "masters": {"a": torch.full((300, 7), value), "b.c": torch.randn(5, generator=generator)},
        "steps": {"a": torch.tensor(int(value)), "low": torch.randn(4, generator=generator).bfloat16()},
    }


def test_a_state_comes_back_bit_for_bit_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        state.save(tmp_path, step, tensors(step), {"step": step, "name": "ü"}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    last = state.latest(tmp_path)
    assert last is not None and last.name == "step-00000010"
    filled, expected = tensors(99), tensors(10)
    kept = filled["masters"]["a"]
    assert state.load(last, filled) == {"step": 10, "name": "ü"}
    assert kept is filled["masters"]["a"] and float(kept[0, 0]) == 10  # in place
    for part, values in expected.items():
        for name, value in values.items():
            assert torch.equal(filled[part][name], value), name


def test_unfinished_and_damaged_states_are_passed_over(tmp_path: Path) -> None:
    assert state.latest(tmp_path / "none") is None
    for step in (1, 2, 3):
        state.save(tmp_path, step, tensors(step), {}, keep=3)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.part")
    (tmp_path / "step-00000002" / "info.json").unlink()
    found = state.latest(tmp_path)
    assert found is not None and found.name == "step-00000001"
    state.save(tmp_path, 3, tensors(3), {}, keep=3)  # over the remains
    found = state.latest(tmp_path)
    assert found is not None and found.name == "step-00000003" and not (tmp_path / "step-00000003.part").exists()


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    path = state.save(tmp_path, 1, tensors(1), {})
    with pytest.raises(CheckpointError, match=r"step-00000001.*more"):
        state.load(path, tensors(1) | {"more": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="step-00000001"):
        state.load(path, tensors(1) | {"steps": {"a": torch.zeros(9)}})
    (data,) = path.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="step-00000001"):
        state.load(path, tensors(1))
    (path / "info.json").write_text("{")
    with pytest.raises(CheckpointError, match="step-00000001"):
        state.load(path, tensors(1))


SAVES = """
import sys, torch
from pathlib import Path
from dgemma.train import state
for step in range(1, 100000):
    values = {name: torch.full((400_000,), float(step)) for name in "abcd"}
    state.save(Path(sys.argv[1]), step, values, {"step": step})
"""


def test_kill_9_in_the_middle_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path)], env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if state.latest(tmp_path) is not None and any(tmp_path.glob("*.part/*")):
                break
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.glob("*.part")), "killed between two saves, not in one"
    last = state.latest(tmp_path)
    assert last is not None
    filled = {name: torch.zeros(400_000) for name in "abcd"}
    step = state.load(last, filled)["step"]
    assert step == json.loads((last / "info.json").read_text())["step"] == int(last.name[5:])
    assert all(bool((value == step).all()) for value in filled.values())
