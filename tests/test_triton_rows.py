"""Triton's row ops (norms, rotation, activation, router) against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_kit import CLOSE, DEVICE, DTYPES, NAN, Random, error, poisoned, wide

from dgemma.kernels import reference, triton_norms, triton_rope, triton_route

EPS = 1e-6
ROWS = [0, 1, 3, 17]
SIZES = [8, 12, 100, 256]


def check(op: Any, exact: Any, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """`op` in poisoned memory against the reference in float64, all outputs."""
    with poisoned():
        got = op(*args)
    expected = exact(*(wide(x) if isinstance(x, Tensor) else x for x in args))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for number, (ours, theirs) in enumerate(pairs):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype is dtype, number
            assert error(ours, theirs) < CLOSE[dtype], number


def norm64(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The norm without the reference's float32 inside."""
    out = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return out if weight is None else out * weight


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's formulas over float64 numbers stay float64."""
    real = reference.rms_norm
    monkeypatch.setattr(
        reference, "rms_norm", lambda x, w, eps: (norm64 if x.dtype is torch.float64 else real)(x, w, eps)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    random = Random(rows * size, dtype)
    for x in (random(rows, size), random.gaps(rows, size), random(size, rows).t(), random(2, rows, size)):
        for weight in (None, random(size), random(size, 2)[:, 0]):
            check(triton_norms.rms_norm, norm64, (x, weight, EPS), dtype)
    check(triton_norms.rms_norm, norm64, (random(3, size) * 1e-4, None, EPS), dtype)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_middle_and_close(rows: int, dtype: torch.dtype, moe: bool) -> None:
    size, random = 100, Random(rows, dtype)
    x, attended, dense, mixed = (random.gaps(rows, size) for _ in range(4))
    weights = [random(size) for _ in range(4)]
    more = (random(size), random(size)) if moe else ()
    check(triton_norms.middle, reference.middle, (x, attended, weights[0], weights[1], EPS, *more), dtype)

    def close(module: Any) -> Any:
        """Its weights are a tuple; `check` converts tensors."""
        return lambda x, dense, mixed, a, b, c, *rest: module.close(x, dense, mixed, (a, b, c), *rest)

    own = (weights[0], weights[1]) if moe else (None, None)
    args = (x, dense, mixed if moe else None, *own, weights[2], random(1), weights[3], EPS)
    check(close(triton_norms), close(reference), args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype: torch.dtype) -> None:
    random = Random(1, dtype)
    for shape in ((0, 6), (1, 2), (5, 2050), (2, 3, 48)):
        x = random(*shape, scale=3.0)
        check(triton_norms.gelu, reference.gelu, (x,), dtype)
        check(triton_norms.geglu, reference.geglu, (x,), dtype)
    gaps = random.gaps(7, 40)
    check(triton_norms.gelu, reference.gelu, (gaps,), dtype)
    check(triton_norms.geglu, reference.geglu, (gaps,), dtype)
    far = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0]], device=DEVICE)
    assert triton_norms.gelu(far).tolist() == [[0.0, 0.0, 0.0, 30.0, 200.0]]


def tables(rows: int, dim: int, dtype: torch.dtype, partial: float) -> tuple[Tensor, Tensor]:
    frequencies = reference.rope_frequencies(dim, 1e4, partial, 1.0)
    cos, sin = reference.rope_tables(torch.arange(5, rows + 5), frequencies, dtype)
    return cos.to(DEVICE), sin.to(DEVICE)


@pytest.mark.parametrize("partial", [1.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 12, 72, 512])
@pytest.mark.parametrize("rows", ROWS)
def test_heads(rows: int, dim: int, dtype: torch.dtype, partial: float) -> None:
    """Norm and rotation of 4 query and 2 key heads; values of their own, or the raw keys."""
    random, (cos, sin) = Random(rows + dim, dtype), tables(rows, dim, dtype, partial)
    for has_v in (True, False):
        packed = random.gaps(rows, (8 if has_v else 6) * dim)
        args = (packed, random(dim), random(dim), cos, sin, EPS, (4, 2), has_v)
        check(triton_rope.heads, reference.heads, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 12, 512])
def test_rope(dim: int, dtype: torch.dtype) -> None:
    random = Random(dim, dtype)
    for rows in ROWS:
        cos, sin = tables(rows, dim, dtype, 1.0)
        check(triton_rope.rope, reference.rope, (random(rows, 3, dim), cos, sin), dtype)
    cos, sin = tables(4, dim, dtype, 1.0)
    check(triton_rope.rope, reference.rope, (random(3, 4, dim).transpose(0, 1), cos, sin), dtype)
    check(triton_rope.rope, reference.rope, (random(2, 4, 3, dim), cos, sin), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "top_k"), [(4, 2), (128, 8), (5, 5), (1, 1), (100, 3)])
def test_choose(count: int, top_k: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        random = Random(rows + count, dtype)
        scores, scale = random.gaps(rows, count), random(count)
        scores += torch.linspace(0, 0.5, count, device=DEVICE).to(dtype)  # fewer ties
        with poisoned():
            weights, ids = triton_route.choose(scores, scale, top_k)
        probs = wide(scores).softmax(-1)
        assert bool((ids[:, 1:] > ids[:, :-1]).all()) and weights.dtype is torch.float32
        picked = probs.gather(1, ids.cpu())
        if rows:
            best = probs.topk(top_k).values
            assert torch.equal(picked.sort(descending=True).values, best)
        exact = picked / picked.sum(-1, keepdim=True) * wide(scale)[ids.cpu()]
        assert error(weights, exact) < 1e-5


def test_numbers_of_a_row_that_lie_apart() -> None:
    """What no product gives: the last axis is not the one without gaps."""
    random, (cos, sin) = Random(5), tables(3, 8, torch.float32, 1.0)
    packed, scores, both = random(48, 3).t(), random(9, 3).t(), random(10, 3).t()
    norms = random(8), random(8)
    for got, want in zip(
        triton_rope.heads(packed, *norms, cos, sin, EPS, (4, 1), True),
        triton_rope.heads(packed.contiguous(), *norms, cos, sin, EPS, (4, 1), True), strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)
    scale = random(9)
    chosen, wanted = (triton_route.choose(x, scale, 2) for x in (scores, scores.contiguous()))
    assert torch.equal(chosen[0], wanted[0]) and torch.equal(chosen[1], wanted[1])
    assert torch.equal(triton_norms.geglu(both), triton_norms.geglu(both.contiguous()))


def test_of_experts_alike_the_lowest_ids_are_chosen() -> None:
    weights, ids = triton_route.choose(torch.zeros(2, 9, device=DEVICE), torch.ones(9, device=DEVICE), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2 and torch.allclose(weights, torch.full_like(weights, 1 / 3))
    spoiled = torch.full((1, 9), NAN, device=DEVICE)
    assert triton_route.choose(spoiled, torch.ones(9, device=DEVICE), 3)[1].tolist() == [[0, 1, 2]]


def test_route_is_norm_product_and_choice() -> None:
    random = Random(3)
    x, proj, scale, expert_scale = random(9, 24), random(6, 24), random(24), random(6)
    weights, ids = triton_route.route(x, proj, scale, expert_scale, 2, EPS)
    exact, expected = reference.route(*(wide(t) for t in (x, proj, scale, expert_scale)), 2, EPS)
    assert torch.equal(ids.cpu(), expected) and error(weights, exact.double()) < 1e-5


def test_gradients_take_the_reference() -> None:
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    triton_norms.rms_norm(x, None, EPS).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    with torch.no_grad():
        assert triton_norms.rms_norm(x, None, EPS).grad_fn is None
