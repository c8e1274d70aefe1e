"""Experts by Triton's kernels: against float64, in poisoned memory, odd shapes, fewer bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_kit import DEVICE, norm_error

from dgemma.kernels import reference, scaled, triton_experts, tuning
from dgemma.kernels.triton_experts import Blocks
from dgemma.quant import make_format
from dgemma.quant.protocol import stack_of

SMALL = Blocks(rows=16, outputs=16, inputs=16)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel does not write is NaN, or a row that does not exist."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        if tensor.dtype is torch.float8_e4m3fn:
            return tensor.view(torch.uint8).fill_(0x7F).view(tensor.dtype)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape))).to(DEVICE)


def case(tokens: int, top_k: int, count: int, inner: int, size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, weights, ids ascending and without repeats, gate_up, down; the experts' load is uneven."""
    generator = torch.Generator().manual_seed(tokens + size)
    favour = torch.rand(tokens, count, generator=generator) * torch.linspace(0.2, 1, count)
    ids = favour.topk(top_k, dim=-1).indices.sort(dim=-1).values.to(DEVICE)
    weights = torch.rand(tokens, top_k, generator=generator).to(DEVICE)
    gate_up, down = normal(count, 2 * inner, size) * size**-0.5, normal(count, size, inner, seed=1) * inner**-0.5
    return normal(tokens, size, seed=2).to(dtype), weights, ids, gate_up.to(dtype), down.to(dtype)


def small(*given: Any, blocks: Blocks = SMALL) -> Tensor:
    """`triton_experts.experts` cut so that tiny inputs have several blocks."""
    with tuning.trying("experts", blocks):
        return triton_experts.experts(*given)


def exact(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return reference.experts(x.double(), weights.double(), ids, gate_up.double(), down.double())


# tokens, k, experts, inner, hidden: no multiple of a block, more experts than rows, one row, one expert in all
SHAPES = ((37, 2, 5, 20, 50), (3, 2, 9, 64, 33), (1, 1, 1, 16, 16), (30, 4, 8, 17, 40))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = case(*shape, dtype)
    got = small(*given)
    assert got.dtype is dtype
    assert norm_error(got, exact(*given)) < (1e-6 if dtype is torch.float32 else 2**-8)


@pytest.mark.parametrize("kind", ["plain", "fp8", "int4wo"])
def test_no_rows(kind: str) -> None:
    x, weights, ids, gate_up, down = case(4, 2, 3, 16, 32, torch.float32)
    stacks = (gate_up, down) if kind == "plain" else stacks_of(kind, gate_up, down)
    assert triton_experts.experts(x[:0], weights[:0], ids[:0], *stacks).shape == (0, 32)
    assert reference.experts(x[:0], weights[:0], ids[:0], gate_up, down).shape == (0, 32)


@pytest.mark.parametrize("expert", [0, 2, 4])
def test_all_rows_on_one_expert(expert: int) -> None:
    """Also twice the same expert in a row, which no router gives: both parts count."""
    x, weights, ids, *stacks = case(75, 2, 5, 20, 50, torch.float32)
    ids = torch.full_like(ids, expert)
    assert norm_error(triton_experts.experts(x, weights, ids, *stacks), exact(x, weights, ids, *stacks)) < 1e-6


@pytest.mark.parametrize(("kind", "bound"), [("fp8", 6e-3), ("int4wo", 2**-8)])
def test_all_rows_on_one_expert_in_fewer_bits(kind: str, bound: float) -> None:
    x, weights, ids, *plain = case(35, 2, 3, 32, 64, torch.bfloat16)
    ids = torch.full_like(ids, 1)
    stacks = stacks_of(kind, *plain)
    want = (fp8_exact if kind == "fp8" else exact)(x, weights, ids, dense(stacks[0]), dense(stacks[1]))
    assert norm_error(small(x, weights, ids, *stacks), want) < bound


def test_inputs_with_gaps() -> None:
    x, weights, ids, gate_up, down = case(33, 2, 4, 20, 50, torch.float32)
    spread = torch.full((33, 100), float("nan"), device=DEVICE)
    spread[:, ::2] = x
    turned = torch.empty(4, 50, 40, device=DEVICE).transpose(1, 2)
    turned.copy_(gate_up)
    given = (spread[:, ::2], weights.t().contiguous().t(), ids.t().contiguous().t(), turned, down)
    assert not any(tensor.is_contiguous() for tensor in given[:4])
    assert torch.equal(triton_experts.experts(*given), triton_experts.experts(x, weights, ids, gate_up, down))


def test_a_bad_row_stays_alone() -> None:
    """NaN in one row, and in an expert that only this row is sent to, reaches no other row."""
    x, weights, ids, gate_up, down = case(20, 2, 5, 20, 50, torch.float32)
    ids = ids.clamp(max=3)
    want = small(x, weights, ids, gate_up, down)
    x, ids, gate_up = x.clone(), ids.clone(), gate_up.clone()
    x[7], gate_up[4] = float("nan"), float("nan")
    ids[7] = 4
    got = small(x, weights, ids, gate_up, down)
    others = torch.arange(20, device=DEVICE) != 7
    assert bool(got[7].isnan().all()) and torch.equal(got[others], want[others])


@pytest.mark.parametrize("kind", ["plain", "fp8", "int4wo"])
def test_a_row_has_the_same_bits_in_every_batch(kind: str) -> None:
    """Also under blocks of another number of rows or outputs: only that of inputs is part of a sum's order."""
    x, weights, ids, gate_up, down = case(36, 2, 3, 32, 48, torch.bfloat16)
    stacks = (gate_up, down) if kind == "plain" else stacks_of(kind, gate_up, down)
    whole = small(x, weights, ids, *stacks)
    for part in (slice(0, 1), slice(3, 10), slice(12, 36)):
        assert torch.equal(small(x[part], weights[part], ids[part], *stacks), whole[part])
    wide = Blocks(rows=64, outputs=128, inputs=16)
    assert torch.equal(small(x, weights, ids, *stacks, blocks=wide), whole)


def test_the_list_of_rows() -> None:
    """More slots than a program reads at a time; experts without rows at both ends and in between."""
    ids = torch.randint(0, 5, (700, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2 + 1
    order, starts = (torch.empty(size, dtype=torch.int32, device=DEVICE) for size in (2800, 13))
    triton_experts._list_rows[(12,)](ids, order, starts, 2800, BLOCK=1024)
    assert torch.equal(order.long(), ids.flatten().argsort(stable=True))
    counts = torch.bincount(ids.flatten(), minlength=12)
    assert torch.equal(starts.long(), torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


# -- fewer bits -----------------------------------------------------------------------------


def stacks_of(name: str, gate_up: Tensor, down: Tensor, group: int | None = None) -> tuple[Any, Any]:
    """As a checkpoint has them: the parts of all experts behind one another, and a matrix each that views them."""
    kind, out = make_format(name, group), []
    for stack in (gate_up, down):
        pieces = [kind.quantize(weight) for weight in stack]
        stored = {part: torch.stack([piece[part] for piece in pieces]) for part in pieces[0]}
        out.append(stack_of(kind, stored, (stack.shape[0], stack.shape[1], stack.shape[2])))
    return out[0], out[1]


def dense(stack: Any) -> Tensor:
    return torch.stack([matrix.dense() for matrix in stack])


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("size", [(64, 128), (20, 50), (96, 160), (32, 352)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_the_product_with_the_dense_matrix(group: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Whole and odd numbers of groups, rows that end inside one, halves of a byte from different groups."""
    x, weights, ids, gate_up, down = case(21, 2, 4, *size, dtype)
    stacks = stacks_of("int4wo", gate_up, down, group)
    want = exact(x, weights, ids, dense(stacks[0]), dense(stacks[1]))
    assert norm_error(triton_experts.experts(x, weights, ids, *stacks), want) < (
        1e-6 if dtype is torch.float32 else 2**-8
    )


def test_int4_blocks_end_with_groups_and_halves() -> None:
    """The released model's shapes: bytes of a row and the block that each product takes."""
    kind = make_format("int4wo", 64)
    for columns, width, inputs in ((2816, 1408, 64), (704, 352, 32)):
        assert kind.layout((8, columns))["codes"].shape == (8, width)
        stored = {
            name: torch.zeros((1, *part.shape), dtype=part.dtype) for name, part in kind.layout((8, columns)).items()
        }
        stack = stack_of(kind, stored, (1, 8, columns))
        assert triton_experts.inputs_of(stack.stacked, Blocks(inputs=64)) == inputs  # type: ignore[attr-defined]


def rounded(x: Tensor) -> Tensor:
    codes, scale = scaled.round_rows(x)
    return codes.double() * scale.double()[:, None]


def fp8_exact(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows rounded to e4m3 before each product, the middle first to x's type; all else float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    given = rounded(x)
    for slot in range(ids.shape[1]):
        both = torch.einsum("th,tih->ti", given, gate_up.double()[ids[:, slot]])
        gate, up = both.chunk(2, dim=-1)
        middle = rounded((reference.gelu(gate) * up).to(x.dtype))
        part = torch.einsum("ti,thi->th", middle, down.double()[ids[:, slot]])
        out += part * weights[:, slot, None].double()
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rounds_rows_and_then_is_exact(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What is left is the order of sums, and the odd code that it tips over."""
    x, weights, ids, gate_up, down = case(*shape, dtype)
    stacks = stacks_of("fp8", gate_up, down)
    got = triton_experts.experts(x, weights, ids, *stacks)
    assert norm_error(got, fp8_exact(x, weights, ids, dense(stacks[0]), dense(stacks[1]))) < 6e-3
    assert norm_error(got, reference.experts(x, weights, ids, *stacks)) < 0.03
    assert norm_error(got, exact(x, weights, ids, gate_up, down)) < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_as_the_emulation_does(dtype: torch.dtype) -> None:
    x = (normal(9, 1500) * torch.logspace(-6, 6, 9, device=DEVICE)[:, None]).to(dtype)
    x[4] = 0
    x[5, :7] = torch.tensor([448, -448, 2**-9, 2**-10, 1.5 * 2**-9, 127, 0.0])
    (codes, scale), (want, steps) = triton_experts.round_rows(x), scaled.round_rows(x)
    assert torch.equal(scale, steps) and torch.equal(codes.float(), want.float())


def test_matrices_that_lie_apart_take_the_reference() -> None:
    x, weights, ids, gate_up, down = case(9, 2, 4, 16, 32, torch.float32)
    kind = make_format("int8wo")
    apart = [[kind.matrix(kind.quantize(w), (w.shape[0], w.shape[1])) for w in stack] for stack in (gate_up, down)]
    assert torch.equal(triton_experts.experts(x, weights, ids, *apart), reference.experts(x, weights, ids, *apart))


def test_gradients_take_the_reference() -> None:
    with torch.enable_grad():
        x, *rest = case(9, 2, 4, 16, 32, torch.float32)
        x.requires_grad_()
        triton_experts.experts(x, *rest).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
