"""Keys and values in FP8: what rounding may cost, that storing adds nothing to it, and that an engine with the option
still gives every request the same bits in any company, in any number of passes, with and without reuse.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engine_kit import CANVAS, WINDOW, config, end, of, prompt, run, tiny_config, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgemma.cache import KVCache, PrefixStore, kv_bytes
from dgemma.cli import serve
from dgemma.cli.arguments import settings_of
from dgemma.cli.running import load
from dgemma.config import EngineConfig, LayerConfig, ModelConfig
from dgemma.engine import Engine, Request, token_logprobs
from dgemma.errors import ConfigError
from dgemma.events import Event, Finished
from dgemma.kernels import cpu, reference
from dgemma.kernels.scaled import E4M3
from dgemma.kernels.vectors import restore, round_vectors
from dgemma.server.config import ServerConfig
from dgemma.settings import Settings, resolve

CPU = torch.device("cpu")
BLOCK = 4


# -- rounding ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_code_is_nearer_than_the_one_taken(dtype: torch.dtype) -> None:
    x = (torch.randn(200, 3, 16) * torch.logspace(-9, 4, 200)[:, None, None]).to(dtype)
    codes, scale = round_vectors(x)
    assert codes.dtype is E4M3 and scale.dtype is torch.float32 and scale.shape == (200, 3)
    assert torch.equal(codes.float().abs().amax(-1), torch.full((200, 3), 448.0))
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
    every = every[every.isfinite()]
    least = (x.double()[..., None] - every * scale.double()[..., None, None]).abs().amin(-1)
    off = (codes.double() * scale.double()[..., None] - x.double()).abs()
    assert bool((off <= least + 1e-6 * x.double().abs()).all())  # of two as near, either
    # So at most half of the last of three bits, which 1 1/16 has; or half a step of the smallest codes.
    bound = torch.maximum(x.double().abs() / 17, scale.double()[..., None] / 1024) * (1 + 1e-6)
    assert bool((off <= bound).all()) and float((off / bound).max()) > 0.99


def test_edges_of_rounding() -> None:
    x = torch.tensor([[0.0, 0.0], [-0.0, 1e-45], [3e38, -3e38], [float("nan"), 1.0]])
    codes, scale = round_vectors(x)
    assert scale[:2].tolist() == [1, 1] and codes[:2].float().tolist() == [[0, 0], [0, 0]]
    assert torch.allclose(restore(codes, scale, torch.float32)[2], x[2], rtol=1e-6)
    assert restore(codes, scale, torch.float32)[3, 0].isnan(), "a fault stays seen"
    assert round_vectors(torch.zeros(0, 2, 8))[0].shape == (0, 2, 8)


def test_a_vector_is_rounded_by_itself() -> None:
    x = torch.randn(9, 2, 12)
    codes, scale = round_vectors(x)
    for row in range(9):
        alone = round_vectors(x[row : row + 1, 1:])
        assert torch.equal(alone[0].float(), codes[row : row + 1, 1:].float())
        assert torch.equal(alone[1], scale[row : row + 1, 1:])


# -- the cache -----------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    return restore(*round_vectors(x), x.dtype)


class Pair:
    """A cache with the option, and a plain one that is given rounded vectors: they must hold the same."""

    def __init__(self, config: ModelConfig, slack: int, seed: int = 0) -> None:
        self.config, self.slack = config, slack
        self.random = torch.Generator().manual_seed(seed)
        self.codes, self.plain = (KVCache(config, CPU, torch.float32, slack, fp8=fp8) for fp8 in (True, False))

    def fresh(self, layer: LayerConfig, count: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.randn(count, layer.num_kv_heads, layer.head_dim, generator=self.random) for _ in range(2))
        return k, v

    def append(self, counts: Sequence[int]) -> None:
        """Several parts in one pass."""
        views = zip(self.codes.segments(counts), self.plain.segments(counts), counts, strict=True)
        views = list(views)
        for layer, shape in enumerate(self.config.layers):
            for codes, plain, count in views:
                k, v = self.fresh(shape, count)
                codes.append(layer, k, v)
                plain.append(layer, rounded(k), rounded(v))
                same(codes.prefix(layer, count), plain.prefix(layer, count))
        for cache in (self.codes, self.plain):
            cache.advance(sum(counts))

    def check(self) -> None:
        assert self.codes.length == self.plain.length
        for layer, shape in enumerate(self.config.layers):
            same(self.codes.prefix(layer), self.plain.prefix(layer))
            k, v = self.fresh(shape, 3)
            q = torch.randn(3, 4, shape.head_dim, generator=self.random)
            for op in (reference.canvas_attention, cpu.canvas_attention):
                got, expected = (op(q, k, v, *cache.stored(layer)) for cache in (self.codes, self.plain))
                assert torch.equal(got, expected)

    def copied(self, size: int) -> None:
        """Out in blocks and in again, where the rings still hold all."""
        for name, fp8 in (("codes", True), ("plain", False)):
            cache = getattr(self, name)
            blocks = [cache.copy(i, min(i + size, cache.length)) for i in range(0, cache.length, size)]
            if None in blocks:
                return
            twin = KVCache(self.config, CPU, torch.float32, self.slack, fp8=fp8)
            twin.load(blocks)
            setattr(self, name, twin)


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)


# A token's codes are no multiple of what scales must be aligned to.
ODD = (LayerConfig(kind="sliding", num_kv_heads=1, head_dim=6), LayerConfig(kind="full", num_kv_heads=1, head_dim=10))
steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("truncate"), st.integers(0, 30)),
    st.tuples(st.just("copied"), st.integers(1, 7)),
    st.tuples(st.just("parts"), st.integers(2, 4)),
    st.tuples(st.just("deep"), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(window=st.integers(1, 9), slack=st.integers(1, 40), script=st.lists(steps, max_size=10))
def test_any_history_equals_a_plain_cache_of_rounded_vectors(
    window: int, slack: int, script: list[tuple[str, int]]
) -> None:
    pair = Pair(tiny_config(sliding_window=window, layers=ODD), slack)
    for action, amount in script:
        if action == "append":
            pair.append([min(amount, slack)])
        elif action == "parts" and amount * 3 <= slack:
            pair.append([1 + number % 3 for number in range(amount)])
        elif action == "truncate":
            length = max(0, pair.plain.length - amount)
            assert pair.codes.can_truncate(length) == pair.plain.can_truncate(length)
            if pair.plain.can_truncate(length):
                pair.codes.truncate(length)
                pair.plain.truncate(length)
        elif action == "copied" and pair.plain.length:
            pair.copied(amount)
        elif action == "deep":
            pair.codes = copy.deepcopy(pair.codes)
        pair.check()


def test_a_ring_wraps_and_a_block_keeps_the_very_codes() -> None:
    pair = Pair(tiny_config(sliding_window=5, layers=ODD), slack=6)
    for _ in range(7):
        pair.append([5])
        pair.check()
    cache = pair.codes
    block = cache.copy(30, 35)
    assert block is not None and len(block.memory) == sum(  # codes and scales, up to 8 bytes
        2 * (-(-5 * layer.num_kv_heads * layer.head_dim // 8) * 8 + -(-5 * layer.num_kv_heads * 4 // 8) * 8)
        for layer in ODD
    )
    twin = KVCache(pair.config, CPU, torch.float32, 6, fp8=True)
    twin.load([block])
    for layer in range(2):
        for buffer, other in zip(twin.slots(layer)[:2], cache.slots(layer)[:2], strict=True):
            place = 30 % len(other) if layer == 0 else 30
            order = [(place + i) % len(other) for i in range(5)]
            assert torch.equal(buffer[:5].view(torch.uint8), other.view(torch.uint8)[order])


@pytest.mark.parametrize("dim", [64, 256])
def test_what_it_needs_by_hand_and_in_buffers(dim: int) -> None:
    config = tiny_config(
        num_heads=8,
        layers=(
            LayerConfig(kind="sliding", num_kv_heads=8, head_dim=dim),
            LayerConfig(kind="full", num_kv_heads=2, head_dim=2 * dim),
        ),
    )
    slack, count = 20, 70
    ring = WINDOW - 1 + slack
    by_hand = 2 * ring * 8 * (dim + 4) + 2 * count * 2 * (2 * dim + 4)
    assert kv_bytes(config, torch.bfloat16, slack, count, fp8=True) == by_hand
    cache = KVCache(config, CPU, torch.bfloat16, slack, count, fp8=True)
    for _ in range(7):
        for layer, shape in enumerate(config.layers):
            k = torch.ones(10, shape.num_kv_heads, shape.head_dim, dtype=torch.bfloat16)
            cache.append(layer, k, k)
            assert cache.prefix(layer, 10)[0].dtype is torch.bfloat16
        cache.advance(10)
    held = sum(x.nbytes for layer in range(2) for x in (*cache.slots(layer)[:2], *(cache.slots(layer)[2] or ())))
    assert held == by_hand
    share = by_hand / kv_bytes(config, torch.bfloat16, slack, count)
    assert share == pytest.approx({64: 0.522, 256: 0.506}[dim], abs=0.001)


# -- the engine ----------------------------------------------------------------------

MODEL = tiny_model()
COLD = EngineConfig(prefix_block=BLOCK, prefix_cache_tokens=0, kv_cache_dtype="fp8")
WARM = replace(COLD, prefix_cache_tokens=1000)
LENGTHS = (1, WINDOW - 1, WINDOW, 3 * WINDOW + 1, 41)


def ask(ids: tuple[int, ...], mode: str = "diffusion", seed: int = 0, **changes: object) -> Request:
    usual = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 4}
    return Request(prompt=ids, config=config(mode=mode, seed=seed, **(usual | changes)), watch=True)


def unhurried(events: list[Event]) -> list[Event]:
    """Without what chunks and reuse may change: how many passes, how many tokens came from elsewhere."""
    return [replace(e, cached_tokens=0, encode_passes=0) if isinstance(e, Finished) else e for e in events]


@functools.cache
def cold(item: Request) -> list[Event]:
    return unhurried(run(Engine(MODEL, COLD), [item]))


def test_the_option_reaches_caches_and_answers() -> None:
    item = ask(prompt(20))
    engine, plain = Engine(MODEL, COLD), Engine(MODEL, replace(COLD, kv_cache_dtype="auto"))
    assert engine.new_cache().slots(0)[0].dtype is E4M3 and plain.new_cache().slots(0)[2] is None
    assert engine.kv_bytes(item) < 0.5 * plain.kv_bytes(item)  # heads of 8 and 12 in float32
    assert unhurried(run(plain, [item])) != cold(item)
    exact, got = (token_logprobs(one, prompt(20), 1) for one in (plain, engine))
    change = max(abs(a - b) for a, b in zip(exact, got, strict=True))
    assert 0 < change < 0.2


@pytest.mark.parametrize("chunk", [4, 7, 13])
def test_chunked_equals_unchunked_bit_for_bit(chunk: int) -> None:
    for length in LENGTHS:
        for mode in ("diffusion", "ar"):
            item = ask(prompt(length), mode)
            assert unhurried(run(Engine(MODEL, replace(COLD, encode_chunk=chunk)), [item])) == cold(item), length


@pytest.mark.parametrize("shared", [3, WINDOW - 1, WINDOW, 3 * WINDOW, 40])
def test_reuse_changes_no_bit(shared: int) -> None:
    engine = Engine(MODEL, replace(WARM, encode_chunk=7))
    for number, mode in enumerate(("diffusion", "ar", "diffusion"), start=1):
        item = ask(prompt(shared) + prompt(9, number), mode, seed=number)
        events = run(engine, [item])
        assert unhurried(of(events, number)) == cold(item)
        assert end(events, number).cached_tokens == (shared // BLOCK * BLOCK if number > 1 else 0)


def test_a_batch_equals_its_singles() -> None:
    items = [ask(prompt(length), mode) for length in LENGTHS for mode in ("diffusion", "ar")]
    events = run(Engine(MODEL, WARM), items)
    for number, item in enumerate(items, start=1):
        assert unhurried(of(events, number)) == cold(item)


def test_one_pass_for_both_changes_no_bit() -> None:
    """A canvas that sees what the same pass has just stored, sees it as stored."""
    item = ask(prompt(3 * WINDOW), max_new_tokens=3 * CANVAS)
    fused, apart = Engine(MODEL, COLD), Engine(MODEL, replace(COLD, fuse=False))
    assert run(fused, [item]) == run(apart, [item])
    assert fused.counters.shared_passes > apart.counters.shared_passes == 0


@pytest.mark.parametrize("length", [1, WINDOW, 3 * WINDOW + 1])
def test_verified_is_still_autoregression(length: int) -> None:
    settings = {"temperature": 0.0, "max_new_tokens": 24}
    ar = run(Engine(MODEL, COLD), [ask(prompt(length), "ar", **settings)])
    drafted = run(Engine(MODEL, COLD), [ask(prompt(length), "verified", verify_pace="fixed", **settings)])
    assert tokens(drafted) == tokens(ar) and len(tokens(ar)) > 0
    assert end(drafted).accepted


def test_a_shared_store_keeps_the_two_apart() -> None:
    store, item = PrefixStore(1000, BLOCK), ask(prompt(12))
    cached = []
    for kind in ("auto", "fp8", "fp8", "auto"):
        engine = Engine(MODEL, replace(WARM, kv_cache_dtype=kind), prefixes=store, identity="a")
        events = run(engine, [item])
        cached.append(end(events).cached_tokens)
        assert unhurried(events) == unhurried(run(Engine(MODEL, replace(COLD, kv_cache_dtype=kind)), [item]))
    assert cached == [0, 0, 12, 12]


def test_every_command_takes_the_flag() -> None:
    """And the environment, and the server's own engine keeps what else it has."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    for flags, kind in ((["--kv-cache-dtype", "fp8"], "fp8"), ([], "auto")):
        arguments = parser.parse_args([*flags, "--max-rows", "3"])
        engine = settings_of(arguments).engine(serve._engine(arguments, ServerConfig()))
        assert (engine.kv_cache_dtype, engine.max_batch_rows) == (kind, 3)
    assert resolve({}, {"DGEMMA_KV_CACHE_DTYPE": "fp8"}).engine().kv_cache_dtype == "fp8"
    llm = load(Settings(threads=1, kv_cache_dtype="fp8"))
    assert llm.engine.config.kv_cache_dtype == "fp8"


@pytest.mark.parametrize("value", ["fp4", "", None, 8])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, fp8, got"):
        EngineConfig(kv_cache_dtype=value)  # type: ignore[arg-type]
