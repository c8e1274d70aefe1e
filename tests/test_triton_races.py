"""The watch over launches sees faults that the interpreter's numbers do not show."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_kit import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="watches the interpreter")


@triton.jit
def _copy(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def _overlapping(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def _one_after_the_other(x, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + BLOCK + at, tl.load(x + at) + 1)


@triton.jit
def _one_before_the_other(x, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + BLOCK + at) + 1)


@triton.jit
def _turned(x, out, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    turned = tl.load(out + BLOCK - 1 - at)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + at, turned)


@triton.jit
def _mirrored(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + BLOCK - 1 - at, tl.load(x + at))


@triton.jit
def _doubled(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) * 2)


@triton.jit
def _all_in_one_place(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at * 0, tl.load(x + at))


@triton.jit
def _add_up(x, out, BLOCK: tl.constexpr):
    tl.atomic_add(out, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@pytest.fixture
def memory() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(16.0), torch.zeros(16)


def test_what_is_sound_passes(memory: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Also with a program beyond the end that does nothing, the same value in one place, barriers, and in place."""
    x, out = memory
    _copy[(3,)](x, out, 14, BLOCK=8)
    assert torch.equal(out[:14], x[:14]) and not out[14:].any()
    _turned[(1,)](x, out, BLOCK=16, BARRIER=True)
    assert torch.equal(out, x.flip(0))
    _all_in_one_place[(1,)](torch.ones(8), out, BLOCK=8)
    _doubled[(1,)](x, BLOCK=16)
    assert torch.equal(x, 2 * torch.arange(16.0))


def test_beyond_a_tensor(memory: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, out = memory
    with pytest.raises(Exception, match="_copy: program 3 goes beyond its tensors"):
        _copy[(3,)](x, out, 17, BLOCK=8)
    with pytest.raises(Exception, match="program 2 goes beyond"):
        _copy[(2,)](x, out[:8].clone(), 16, BLOCK=8)


@pytest.mark.parametrize(
    ("kernel", "arguments", "programs", "said"),
    [
        (_overlapping, 2, 2, "program 2 writes what program 1 writes"),
        (_one_after_the_other, 1, 2, "program 2 reads what program 1 writes"),
        (_one_before_the_other, 1, 2, "program 2 writes what program 1 reads"),
        (_all_in_one_place, 2, 1, "stores two values in one place"),
        (_add_up, 2, 1, "atomic"),
    ],
)
def test_races_of_programs(
    memory: tuple[torch.Tensor, torch.Tensor], kernel: triton.JITFunction, arguments: int, programs: int, said: str
) -> None:
    with pytest.raises(Exception, match=said):
        kernel[(programs,)](*memory[:arguments], BLOCK=4)


def test_races_of_threads(memory: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(Exception, match="program 1 reads what it writes"):
        _turned[(1,)](*memory, BLOCK=16, BARRIER=False)
    with pytest.raises(Exception, match="program 1 writes what it reads"):
        _mirrored[(1,)](memory[0], BLOCK=16)
