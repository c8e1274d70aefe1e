"""Triton's attention against float64: prefixes around the window, rings, spans, key groups, odd head dims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_triton_generate import REAL, no_fall_back, twins
from torch import Tensor
from triton_kit import CLOSE, DEVICE, DTYPES, NAN, Random, error, poisoned, same_row

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.engine.attend import causal
from dgemma.engine.runner import Runner
from dgemma.kernels import reference, triton_attention
from dgemma.kernels.triton_attention import Blocks
from dgemma.kernels.vectors import round_vectors

WINDOW = 20
CANVAS = 13


@pytest.fixture(params=[16, 32, 1024])
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small blocks, so that tiny inputs have several; many shares of the keys, a few, or one."""
    small = Blocks(rows=16, keys=16, share=request.param)
    monkeypatch.setattr(triton_attention, "blocks_of", lambda dim, dtype: small)
    return request.param


def exact(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None = None) -> Tensor:
    """One query and head after the other."""
    q, k, v = (x.cpu().double() for x in (q, k, v))
    out = torch.zeros_like(q)
    for t in range(q.shape[0]):
        first, last = (0, k.shape[0]) if spans is None else spans[t].tolist()
        for head in range(q.shape[1]):
            own = head * k.shape[1] // q.shape[1]
            weights = (k[first:last, own] @ q[t, head]).softmax(0)
            out[t, head] = weights @ v[first:last, own]
    return out


def store(random: Random, slots: int, heads: int, dim: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """A ring full of NaN but for `count` tokens from slot `start` on; and those tokens in order."""
    ring = torch.full((slots, heads, dim), NAN, dtype=random(1).dtype, device=DEVICE)
    tokens = random(count, heads, dim)
    for number in range(count):
        ring[(start + number) % slots] = tokens[number]
    return ring, tokens


def canvas(random: Random, heads: int, keys: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries whose scores are neither flat nor a single peak."""
    q = random(CANVAS, heads, dim) * dim**-0.5 * 2
    return q, random(CANVAS, keys, dim), random(CANVAS, keys, dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 1, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_canvas_sees_its_prefix_and_itself(prefix: int, dtype: torch.dtype, share: int) -> None:
    random = Random(prefix, dtype)
    q, k, v = canvas(random, 4, 2, 12)
    old_k, before_k = store(random, prefix + 3, 2, 12, 2, prefix)
    old_v, before_v = store(random, prefix + 3, 2, 12, 2, prefix)
    with poisoned():
        got = triton_attention.canvas_attention(q, k, v, old_k, old_v, 2, prefix)
    assert got.dtype is dtype
    assert error(got, exact(q, torch.cat([before_k, k]), torch.cat([before_v, v]))) < CLOSE[dtype]


@pytest.mark.parametrize("start", [0, 5, 17, 28, 29])
def test_a_ring_is_read_where_it_lies(start: int, share: int) -> None:
    random = Random(start)
    q, k, v = canvas(random, 4, 2, 12)
    (old_k, before_k), (old_v, before_v) = (store(random, 30, 2, 12, start, WINDOW - 1) for _ in range(2))
    got = triton_attention.canvas_attention(q, k, v, old_k, old_v, start, WINDOW - 1)
    assert error(got, exact(q, torch.cat([before_k, k]), torch.cat([before_v, v]))) < 1e-5
    assert error(reference.canvas_attention(q, k, v, old_k, old_v, start, WINDOW - 1), got.cpu().double()) < 1e-5


def codes(random: Random, slots: int, heads: int, dim: int, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`store` as e4m3 codes and scales, NaN in both where no token is; and in float64 the tokens they stand for."""
    ring, tokens = store(random, slots, heads, dim, start, count)
    (held, _), (told, scale) = round_vectors(ring), round_vectors(tokens)
    scales = torch.full(ring.shape[:2], NAN, device=DEVICE)
    scales[[(start + number) % slots for number in range(count)]] = scale
    return held, scales, told.double() * scale.double()[..., None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("prefix", [0, 1, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_a_store_of_codes(prefix: int, dim: int, dtype: torch.dtype, share: int) -> None:
    """Against float64 on the numbers that the codes stand for."""
    random = Random(prefix + dim, dtype)
    q, k, v = canvas(random, 4, 2, dim)
    old_k, k_scale, before_k = codes(random, prefix + 3, 2, dim, 2, prefix)
    old_v, v_scale, before_v = codes(random, prefix + 3, 2, dim, 2, prefix)
    with poisoned():
        got = triton_attention.canvas_attention(q, k, v, old_k, old_v, 2, prefix, (k_scale, v_scale))
    expected = exact(q, torch.cat([before_k, k.double()]), torch.cat([before_v, v.double()]))
    assert got.dtype is dtype and error(got, expected) < CLOSE[dtype]
    plain = reference.canvas_attention(q, k, v, old_k, old_v, 2, prefix, (k_scale, v_scale))
    # In bfloat16 the reference's products and weights are rounded once more.
    assert error(plain, got.cpu().double()) < 2 * CLOSE[dtype]


def test_a_ring_of_codes_is_read_where_it_lies() -> None:
    random = Random(9)
    q, k, v = canvas(random, 4, 2, 12)
    for start in (0, 17, 29):
        (old_k, k_scale, before_k), (old_v, v_scale, before_v) = (
            codes(random, 30, 2, 12, start, WINDOW - 1) for _ in range(2)
        )
        # Scales may lie anyhow.
        scales = k_scale.t().contiguous().t(), v_scale
        got = triton_attention.canvas_attention(q, k, v, old_k, old_v, start, WINDOW - 1, scales)
        expected = exact(q, torch.cat([before_k, k.double()]), torch.cat([before_v, v.double()]))
        assert error(got, expected) < 1e-5


def test_a_model_reads_the_codes_it_has_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canvas behind a cache in FP8: all layers through the row, against the reference's ops on the same codes."""
    ours, theirs = twins()
    cache = KVCache(ours.config, DEVICE, torch.float32, 16, fp8=True)
    ids = torch.randint(3, 100, (9,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with kernels.use(REAL):
        runner = Runner(theirs)
        runner.encode([(cache, list(range(3, 14)))])
        (expected,) = runner.look([(cache, ids)])
    calls: list[bool] = []
    real = triton_attention._run

    def watched(*args: Any) -> Tensor:
        calls.append(args[5] is not None)
        return real(*args)

    monkeypatch.setattr(triton_attention, "_run", watched)
    with no_fall_back():
        (got,) = Runner(ours).look([(cache, ids)])
    assert error(got, expected.cpu().double()) < 1e-4
    assert calls == [True] * ours.config.num_layers


@pytest.mark.parametrize("window", [None, 6, WINDOW])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (2, 2), (17, 17), (33, 50), (40, 40)])
def test_encoding_is_causal_and_slides(queries: int, keys: int, window: int | None, share: int) -> None:
    random = Random(queries + keys)
    q, k, v = random(queries, 4, 8), random(keys, 2, 8), random(keys, 2, 8)
    last = torch.arange(keys - queries, keys) + 1
    first = torch.zeros_like(last) if window is None else (last - window).clamp(min=0)
    spans = torch.stack([first, last], dim=1)
    with poisoned():
        got = triton_attention.attention(q, k, v, None, spans.to(DEVICE))
    assert error(got, exact(q, k, v, spans)) < 1e-5
    assert error(reference.attention(q, k, v, None, spans.to(DEVICE)), exact(q, k, v, spans)) < 1e-5


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("start", [0, 17])
def test_encoding_reads_a_store_where_it_lies(start: int, window: int | None, fp8: bool, share: int) -> None:
    """A ring or not, in codes or not; told where, or asking the device, for which any number of shares is the same."""
    random, count = Random(start), 29
    q = random(CANVAS, 4, 12)
    k, k_scale, before_k = codes(random, 30, 2, 12, start, count)
    v, v_scale, before_v = codes(random, 30, 2, 12, start, count)
    scales = (k_scale, v_scale) if fp8 else None
    if not fp8:
        (k, before_k), (v, before_v) = (store(random, 30, 2, 12, start, count) for _ in range(2))
    spans = causal(torch.arange(count - CANVAS, count, device=DEVICE), window)
    with poisoned():
        told = triton_attention.stored_attention(q, k, v, start, count, spans, scales)
    where = torch.tensor([start, count], device=DEVICE)
    for most in (count, 100):
        assert torch.equal(triton_attention.stored_attention(q, k, v, 0, most, spans, scales, where), told)
    expected = exact(q, before_k, before_v, spans)
    assert error(told, expected) < 1e-5
    assert error(reference.stored_attention(q, k, v, start, count, spans, scales), expected) < 1e-5
    assert error(reference.stored_attention(q, k, v, 0, 100, spans, scales, where), expected) < 1e-5
    if not fp8:
        assert torch.equal(triton_attention.attention(q, before_k, before_v, None, spans), told)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (6, 2), (16, 2), (3, 1)])
@pytest.mark.parametrize("dim", [8, 12, 64, 72])
def test_head_dims_and_groups(dim: int, heads: int, keys: int, dtype: torch.dtype) -> None:
    """With the block sizes that are used."""
    random = Random(dim * heads, dtype)
    q, k, v = canvas(random, heads, keys, dim)
    old = random(70, keys, dim), random(70, keys, dim)
    got = triton_attention.canvas_attention(q, k, v, *old, 0, 70)
    assert error(got, exact(q, torch.cat([old[0], k]), torch.cat([old[1], v]))) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [256, 512])
def test_the_released_head_dims(dim: int, dtype: torch.dtype) -> None:
    random = Random(dim, dtype)
    q, k, v = canvas(random, 2, 1, dim)
    assert error(triton_attention.attention(q, k, v), exact(q, k, v)) < CLOSE[dtype]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "dim apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "among others": lambda x: torch.cat([x, x * NAN, x], dim=1)[:, : x.shape[1]],
    "every other": lambda x: torch.stack([x, x * NAN], dim=1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str) -> None:
    random = Random(7)
    q, k, v = canvas(random, 4, 2, 12)
    old = random(9, 2, 12), random(9, 2, 12)
    plain = triton_attention.canvas_attention(q, k, v, *old, 3, 6)
    odd = [LAYOUTS[layout](x) for x in (q, k, v, *old)]
    assert torch.equal(triton_attention.canvas_attention(*odd, 3, 6), plain)


def test_no_queries_no_output() -> None:
    q, k = torch.ones(0, 4, 8, device=DEVICE), torch.ones(5, 2, 8, device=DEVICE)
    assert triton_attention.attention(q, k, k).shape == (0, 4, 8)
    assert triton_attention.canvas_attention(q, q[:, :2], q[:, :2], k, k, 0, 5).shape == (0, 4, 8)
    assert triton_attention.stored_attention(q, k, k, 0, 5).shape == (0, 4, 8)


def test_high_scores_do_not_overflow(share: int) -> None:
    """A maximum that rises late, and one that is far above the rest."""
    q = torch.ones(2, 1, 8, device=DEVICE) * 10
    k = torch.linspace(-50, 50, 60, device=DEVICE)[:, None, None].expand(60, 1, 8)
    for keys in (k, k.flip(0)):
        got = triton_attention.attention(q, keys, keys)
        assert error(got, exact(q, keys, keys)) < 1e-5


def test_a_row_does_not_depend_on_the_others() -> None:
    random = Random(1)
    q, k, v = random(40, 4, 12), random(90, 2, 12), random(90, 2, 12)
    whole = triton_attention.attention(q, k, v)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40)):
        assert same_row(triton_attention.attention(q[rows], k, v), whole[rows])


def test_what_spans_do_not_describe_takes_the_reference() -> None:
    random = Random(2)
    q, k, v = random(3, 2, 8), random(3, 2, 8), random(3, 2, 8)
    mask = torch.tensor([[True, False, True]] * 3, device=DEVICE)
    assert torch.equal(triton_attention.attention(q, k, v, mask), reference.attention(q, k, v, mask))
    batch = [x.expand(2, *x.shape) for x in (q, k, v)]
    assert torch.equal(triton_attention.attention(*batch), reference.attention(*batch))
