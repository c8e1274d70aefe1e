"""Ops on the CPU: a row's bits do not depend on its batch, results agree with the reference, gradients flow."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgemma import kernels
from dgemma.kernels import cpu, find, reference

ROWS = (1, 7, 16, 256, 2048)
DTYPES = (torch.float32, torch.bfloat16)
# Widths that are whole vectors, and widths that are not.
WIDTHS = ((64, 96), (72, 41), (320, 256))
EPS = 1e-6
Op = Callable[..., Any]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return list(value if isinstance(value, tuple) else vars(value).values())


def invariant(op: Op, *rows: Tensor, counts: tuple[int, ...] = ROWS) -> None:
    """Any number of rows from anywhere gives the bits that all rows together give."""
    whole = tensors(op(*rows))
    for count in counts:
        for start in {3, len(rows[0]) - count}:
            part = tensors(op(*(x[start : start + count].clone() for x in rows)))
            for one, all_rows in zip(part, whole, strict=True):
                assert torch.equal(one, all_rows[start : start + count]), (count, start)


TOTAL = max(ROWS) + 11


# -- a row's bits --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, out", [*WIDTHS, (8, 8), (2816, 4)])
@torch.no_grad()
def test_linear_rows(threads: int, dtype: torch.dtype, width: int, out: int) -> None:
    x = normal(TOTAL, width, dtype=dtype)
    invariant(lambda x: kernels.linear(x, normal(out, width, dtype=dtype)), x)
    # The soft embedding multiplies with the embedding the other way round.
    invariant(lambda x: kernels.linear(x, normal(width, out, dtype=dtype).t()), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 72, 41])
@torch.no_grad()
def test_norm_and_gelu_rows(threads: int, dtype: torch.dtype, width: int) -> None:
    x = normal(TOTAL, width, dtype=dtype)
    invariant(lambda x: kernels.rms_norm(x, normal(width, dtype=dtype), EPS), x)
    invariant(lambda x: kernels.rms_norm(x, None, EPS), x)
    invariant(kernels.gelu, x)
    invariant(lambda x: kernels.gelu(x.chunk(2, dim=-1)[0]), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 72])
@torch.no_grad()
def test_expert_rows(threads: int, dtype: torch.dtype, width: int) -> None:
    experts, inner, top_k = 8, 20, 3
    x = normal(TOTAL, width, dtype=dtype)
    proj, scale = normal(experts, width, dtype=dtype, scale=0.3), normal(width, dtype=dtype)
    own = normal(experts, dtype=dtype).abs()
    gate_up = normal(experts, 2 * inner, width, dtype=dtype, scale=width**-0.5)
    down = normal(experts, width, inner, dtype=dtype, scale=inner**-0.5)

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.route(x, proj, scale, own, top_k, EPS)

    invariant(route, x)
    invariant(lambda x: kernels.experts(x, *route(x), gate_up, down), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, width", [(1500, 64), (1023, 41), (40_003, 8)])
@torch.no_grad()
def test_vocab_rows(dtype: torch.dtype, vocab: int, width: int, threads: int) -> None:
    """Products, entropy, draws and the soft embedding. The large vocabulary splits a lone sum among threads."""
    counts = (1, 7, 16) if vocab > 2000 else (1, 7, 16, 256)
    total = max(counts) + 11
    hidden, embed = normal(total, width, dtype=dtype), normal(vocab, width, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(total, -(-vocab // kernels.DRAW_BLOCK), dtype=torch.float64, generator=generator)
    temperature = 0.3 + torch.rand(total, generator=generator)
    draw_temperature, top_k = (torch.arange(total) % 3) * 0.7, torch.arange(total) % 2 * 5

    def plain(hidden: Tensor, temperature: Tensor, uniforms: Tensor) -> Any:
        return kernels.vocab(hidden, embed, 30.0, temperature, uniforms)

    def shaped(hidden: Tensor, temperature: Tensor, uniforms: Tensor, draw: Tensor, top_k: Tensor) -> Any:
        return kernels.vocab(hidden, embed, 30.0, temperature, uniforms, draw, top_k)

    invariant(plain, hidden, temperature, uniforms, counts=counts)
    invariant(shaped, hidden, temperature, uniforms, draw_temperature, top_k, counts=counts)


def test_vocab_rows_at_2048() -> None:
    hidden, embed = normal(TOTAL, 16), normal(70, 16)
    uniforms = torch.rand(TOTAL, 1, dtype=torch.float64)
    with torch.no_grad():
        invariant(lambda h, u: kernels.vocab(h, embed, 30.0, torch.ones(len(h)), u), hidden, uniforms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv, dim, keys", [(4, 1, 16, 300), (4, 2, 64, 300), (6, 6, 20, 131)])
@torch.no_grad()
def test_attention_rows(threads: int, dtype: torch.dtype, heads: int, kv: int, dim: int, keys: int) -> None:
    """A query does not depend on the other queries, nor on masked keys behind it: one token at a time, a canvas
    at once, and anything between agree bit for bit."""
    queries = 70
    q = normal(queries, heads, dim, dtype=dtype, scale=0.4)
    k, v = normal(keys, kv, dim, dtype=dtype), normal(keys, kv, dim, dtype=dtype, seed=1)
    place = torch.arange(keys - queries, keys)[:, None]
    mask = torch.arange(keys)[None] <= place
    whole = kernels.attention(q, k, v, mask)
    for count in (1, 2, 7, 16, 70):
        for start in {0, queries - count}:
            rows = slice(start, start + count)
            assert torch.equal(kernels.attention(q[rows], k, v, mask[rows]), whole[rows])
            seen = keys - queries + start + count
            short = kernels.attention(q[rows], k[:seen], v[:seen], mask[rows, :seen])
            assert torch.equal(short, whole[rows])
    one = keys - queries + 1
    assert torch.equal(kernels.attention(q[:1], k[:one], v[:one]), whole[:1]), "no mask where nothing is hidden"


def test_gelu_at_the_sizes_where_threads_begin_to_share(threads: int) -> None:
    """Against the same numbers in one thread and whole vectors."""
    x = normal(131_072 + 64)
    torch.set_num_threads(1)
    wanted = reference.gelu(x)
    torch.set_num_threads(threads)
    with torch.no_grad():
        for size in (1, 31, 33, 16_384, 20_001, 32_768, 32_800, 65_536, 65_888, 98_305, 131_072):
            assert torch.equal(cpu.gelu(x[:size]), wanted[:size]), size


# -- values --------------------------------------------------------------------------


def ops() -> dict[str, tuple[Op, tuple[Any, ...]]]:
    """Name -> how to call it with float tensors (which the tests cast)."""
    mask = torch.arange(30)[None] <= torch.arange(21, 30)[:, None]
    ids = torch.tensor([[0, 1], [1, 3], [0, 3], [2, 3], [1, 2]])
    return {
        "rms_norm": (lambda f, x, w: f(x, w, EPS), (normal(5, 24), normal(24))),
        "linear": (lambda f, x, w: f(x, w), (normal(5, 24), normal(7, 24))),
        "gelu": (lambda f, x: f(x), (normal(5, 24),)),
        "attention": (
            lambda f, q, k, v: f(q, k, v, mask),
            (normal(9, 4, 8), normal(30, 2, 8), normal(30, 2, 8, seed=1)),
        ),
        "route": (lambda f, *args: f(*args, 2, EPS), (normal(5, 24), normal(4, 24), normal(24), normal(4))),
        "experts": (
            lambda f, x, w, gate_up, down: f(x, w, ids, gate_up, down),
            (normal(5, 24), normal(5, 2), normal(4, 12, 24, scale=0.2), normal(4, 24, 6, scale=0.4)),
        ),
        "softcap": (lambda f, x: f(x, 30.0), (normal(5, 24, scale=20.0),)),
        "vocab": (
            lambda f, h, e: f(h, e, 30.0, torch.full((5,), 0.7), torch.full((5, 1), 0.4, dtype=torch.float64)),
            (normal(5, 24, scale=0.3), normal(50, 24)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", ops())
@torch.no_grad()
def test_cpu_agrees_with_the_reference_in_float64(op: str) -> None:
    """Float32 on the CPU against the reference on the same numbers in float64; never worse than the reference's."""
    call, args = ops()[op]
    exact = tensors(call(getattr(reference, op), *(x.double() for x in args)))
    plain = tensors(call(getattr(reference, op), *args))
    fast = tensors(call(find(op, "cpu"), *args))
    for wanted, slow, got in zip(exact, plain, fast, strict=True):
        assert got.dtype is slow.dtype and got.shape == slow.shape
        error = (got.double() - wanted.double()).abs().max().item()
        assert error < 5e-6 * max(1.0, wanted.double().abs().max().item())


@pytest.mark.parametrize("op", ops())
@torch.no_grad()
def test_cpu_in_bfloat16_is_the_reference(op: str) -> None:
    """The same bits, or where sums take another order now and then the next number of the type."""
    call, args = ops()[op]
    half = [x.bfloat16() for x in args]
    for one, two in zip(
        tensors(call(find(op, "cpu"), *half)), tensors(call(getattr(reference, op), *half)), strict=True
    ):
        if op in ("attention", "vocab"):
            assert one.dtype is two.dtype
            apart = (one.double() - two.double()).abs()
            assert (apart <= 2.0**-7 * two.double().abs().max()).all()
            assert (apart <= 1e-5).float().mean() > 0.5
        else:
            assert torch.equal(one, two)


def test_float64_stays_float64() -> None:
    """Parity in float64 must not pass through a float32 product."""
    for op in ("linear", "attention", "gelu"):
        call, args = ops()[op]
        wide = [x.double() for x in args]
        with torch.no_grad():
            result = call(getattr(kernels, op), *wide)
        assert result.dtype is torch.float64
        assert torch.equal(result, call(getattr(reference, op), *wide))


@torch.no_grad()
def test_weights_with_gaps_between_their_rows_are_not_slow() -> None:
    """oneDNN alone takes ten seconds for this product instead of two milliseconds."""
    x, wide = normal(256, 320), normal(1280, 640)
    start = time.perf_counter()
    out = kernels.linear(x, wide[:, :320])
    assert time.perf_counter() - start < 2
    assert torch.equal(out, kernels.linear(x, wide[:, :320].contiguous()))


@torch.no_grad()
def test_leading_axes() -> None:
    x, weight = normal(2, 3, 5, 24), normal(7, 24)
    assert torch.equal(kernels.linear(x, weight), kernels.linear(x.reshape(30, 24), weight).view(2, 3, 5, 7))
    assert kernels.linear(x[:, :0], weight).shape == (2, 0, 5, 7)
    assert kernels.gelu(x).shape == x.shape and kernels.gelu(x[:0]).shape == (0, 3, 5, 24)
    q, k = normal(2, 9, 4, 8), normal(2, 9, 2, 8)
    both = kernels.attention(q, k, k)
    for row in range(2):
        assert torch.allclose(both[row], kernels.attention(q[row], k[row], k[row]), atol=1e-5)


# -- training ------------------------------------------------------------------------


DIFFERENTIABLE = [op for op in ops() if op != "vocab"]


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_flow_and_agree_with_the_reference(op: str) -> None:
    call, args = ops()[op]

    def gradients(function: Op, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).detach().requires_grad_() for x in args]
        out = tensors(call(function, *inputs))[0]
        (out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in inputs)
        return [x.grad for x in inputs if x.grad is not None]

    exact = gradients(getattr(reference, op), torch.float64)
    ours = gradients(getattr(kernels, op), torch.float32)
    for wanted, got in zip(exact, ours, strict=True):
        assert (wanted - got).abs().max() < 1e-4 * max(1.0, wanted.abs().max().item())


def test_a_frozen_weight_and_a_tracked_input_still_pass_gradients() -> None:
    x, weight = normal(3, 24).requires_grad_(), normal(7, 24)
    kernels.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(3, -1), atol=1e-6)
    k = normal(6, 2, 8).requires_grad_()
    kernels.attention(normal(3, 4, 8), k, normal(6, 2, 8)).sum().backward()
    assert k.grad.abs().sum() > 0
    tuned = normal(7, 24).requires_grad_()
    with torch.no_grad():
        assert not kernels.linear(normal(3, 24), tuned).requires_grad
