"""Tuned block sizes: who gets them, what is no table, and a tuner that leaves out what fails or is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_kit  # chooses the interpreter
from torch import Tensor

from dgemma.bench import gpu_tune
from dgemma.bench.gpu_tune import Trial, tune
from dgemma.errors import DgemmaError
from dgemma.kernels import tuning

assert triton_kit.DEVICE
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    rows: int = 32
    outputs: int = 64
    inputs: int = 64
    stages: int = 4


SHIPPED, FOUND = Blocks(), Blocks(rows=16, outputs=128)
KEY = (8, 64, 32, "plain", 0, "torch.bfloat16")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A card at hand, and a home of one's own; the path of the table."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card A")
    forget()
    yield tmp_path / "dgemma" / "blocks.json"
    forget()


def forget() -> None:
    """As in a new process."""
    for cached in (tuning.device_name, tuning._table, tuning._found):
        cached.cache_clear()


def ours(key: tuning.Key = KEY, kernel: str = "experts") -> Blocks:
    return tuning.blocks(kernel, key, SHIPPED)


def test_what_was_kept_serves_from_then_on(table: Path) -> None:
    assert ours() is SHIPPED
    tuning.keep(table, "Card A", [("experts", KEY, FOUND)])
    assert ours() == FOUND
    forget()
    assert ours() == FOUND, "a new process reads the file"
    assert list(table.parent.iterdir()) == [table], "nothing half written stays"


def test_only_this_device_kernel_shape_and_triton(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.keep(table, "Card A", [("experts", KEY, FOUND)])
    tuning.keep(table, "Card B", [("vocab", KEY, FOUND)])
    assert ours((9, *KEY[1:])) is SHIPPED and ours((*KEY[:3], "fp8", *KEY[4:])) is SHIPPED
    assert ours(kernel="vocab") is SHIPPED, "another card's"
    assert ours() == FOUND, "a second writing keeps the first"
    monkeypatch.setattr("triton.__version__", "0.0")
    forget()
    tuning._entry.cache_clear()
    assert ours() is SHIPPED
    monkeypatch.undo()
    tuning._entry.cache_clear()


def test_another_text_of_the_kernel_is_another_kernel(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.keep(table, "Card A", [("experts", KEY, FOUND)])
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"changed")
    forget()
    tuning._entry.cache_clear()
    assert ours() is SHIPPED
    tuning._entry.cache_clear()


def test_without_a_device_no_file_is_read(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.keep(table, "Card A", [("experts", KEY, FOUND)])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(tuning, "_read", lambda path: pytest.fail("read"))
    assert ours() is SHIPPED


STRANGE = ("", "{", "[]", "3", "null", '{"blocks": {}}', '{"kind": "others", "blocks": {}}', "\x00\xff")


@pytest.mark.parametrize("text", [*STRANGE, json.dumps({"kind": tuning._KIND, "blocks": [1]})])
def test_a_file_that_is_no_table_is_ignored_and_replaced(text: str, table: Path) -> None:
    table.parent.mkdir()
    table.write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="no table of block sizes"):
        assert ours() is SHIPPED
    assert ours(("other",)) is SHIPPED, "and is not read again"
    with pytest.warns(UserWarning, match="no table of block sizes"):
        tuning.keep(table, "Card A", [("experts", KEY, FOUND)])
    assert ours() == FOUND


def test_a_folder_in_the_place_of_the_table(table: Path) -> None:
    table.mkdir(parents=True)
    with pytest.warns(UserWarning, match="no table"):
        assert ours() is SHIPPED


@pytest.mark.parametrize(
    "entry", [None, 3, {}, {"rows": 16}, {**vars(FOUND), "more": 1}, {**vars(FOUND), "rows": 0},
              {**vars(FOUND), "rows": 16.0}, {**vars(FOUND), "rows": True}, {**vars(FOUND), "rows": "16"}],
)  # fmt: skip
def test_an_entry_that_is_no_blocks_is_ignored(entry: Any, table: Path) -> None:
    tuning.keep(table, "Card A", [("experts", KEY, FOUND)])
    content = json.loads(table.read_text())
    content["blocks"] = dict.fromkeys(content["blocks"], entry)
    table.write_text(json.dumps(content))
    forget()
    if entry is None:
        assert ours() is SHIPPED
    else:
        with pytest.warns(UserWarning, match="no block sizes of experts"):
            assert ours() is SHIPPED


def test_a_candidate_serves_inside_only_and_says_for_what() -> None:
    with tuning.trying("experts", FOUND) as asked:
        assert ours() is FOUND and ours(kernel="vocab") is SHIPPED
    assert ours() is SHIPPED and asked == {KEY}


# -- the tuner ------------------------------------------------------------------------------


def trial(result: Any) -> Trial:
    """A kernel that gives what `result` makes of the blocks it is served."""

    def call() -> tuple[Tensor, ...]:
        return (result(tuning.blocks("experts", KEY, SHIPPED)),)

    return Trial(kernel="experts", about="it", shipped=SHIPPED, calls=[call], want=lambda: (torch.ones(4),))


def test_what_fails_or_is_wrong_is_left_out_and_named() -> None:
    def result(blocks: Blocks) -> Tensor:
        if blocks.outputs == 128:
            raise RuntimeError("out of shared memory\nmore")
        return torch.ones(4) * (1.5 if blocks.rows == 16 else 1.0) * (float("nan") if blocks.inputs == 128 else 1.0)

    found, kept = tune(trial(result), CPU, few=False)
    assert list(found["ms"]) == ["rows 32, outputs 64, inputs 64, stages 4"] and found["best"] == vars(SHIPPED)
    assert sorted(found["skipped"].values()) == [
        "DgemmaError: relative error 0.5", "DgemmaError: relative error nan", "RuntimeError: out of shared memory",
    ]  # fmt: skip
    assert kept == [("experts", KEY, SHIPPED)]


def test_the_fastest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Blocks()

    def result(blocks: Blocks) -> Tensor:
        nonlocal now
        now = blocks
        return torch.ones(4)

    def timings(call: Any, device: Any, inner: int) -> list[float]:
        call()
        return [0.1 if now.rows == 16 else 0.2]

    monkeypatch.setattr(gpu_tune, "timings", timings)
    found, kept = tune(trial(result), CPU, few=False)
    assert len(found["ms"]) == 4 and found["best"]["rows"] == 16 and kept[0][2].rows == 16
    assert len(tune(trial(result), CPU, few=True)[0]["ms"]) == 2


def test_no_candidate_is_an_error() -> None:
    with pytest.raises(DgemmaError, match="it: no candidate ran"):
        tune(trial(lambda blocks: torch.zeros(4)), CPU, few=True)
