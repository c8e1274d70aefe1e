"""The store of shared beginnings: against a naive model, with colliding hashes, several roots, little room."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from mmap import mmap
from pathlib import Path

import pytest
import torch
from engine_kit import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgemma.cache import KVCache, PrefixStore, prefix
from dgemma.config import LayerConfig

CONFIG = tiny_config(sliding_window=4)
BLOCK = 3
ROOT = b"model"


def empty() -> KVCache:
    return KVCache(CONFIG, torch.device("cpu"), torch.float32, slack=BLOCK)


def marks(ids: Sequence[int]) -> list[int]:
    """A number per token that tells it and all before it, as keys and values do."""
    return list(accumulate((token + 1 for token in ids), lambda before, token: (before * 31 + token) % 65_521))


def filled(ids: Sequence[int], offset: float = 0.0) -> KVCache:
    """A cache whose entries are the marks (K plus `offset`, V the negative)."""
    cache = empty()
    for mark in marks(ids):
        for layer, shape in enumerate(CONFIG.layers):
            k = torch.full((1, shape.num_kv_heads, shape.head_dim), mark + offset)
            cache.append(layer, k, -k)
        cache.advance(1)
    return cache


def put(store: PrefixStore, ids: Sequence[int], root: bytes = ROOT, offset: float = 0.0) -> None:
    """As an engine does: after every few tokens, so that no ring has moved on."""
    for stop in range(BLOCK, len(ids) + 1, BLOCK):
        store.put(root, ids[:stop], filled(ids[:stop], offset))


def take(store: PrefixStore, ids: Sequence[int], root: bytes = ROOT, offset: float = 0.0) -> list[int]:
    """The ids of a hit; checked in every layer: all of their marks (full), the last W - 1 (sliding)."""
    cache = empty()
    count = store.take(root, ids, cache)
    assert count == cache.length and count % BLOCK == 0
    expected = [mark + offset for mark in marks(ids[:count])]
    for layer, shape in enumerate(CONFIG.layers):
        k, v = cache.prefix(layer)
        assert torch.equal(k, -v) and bool((k == k[:, :1, :1]).all())
        assert k[:, 0, 0].tolist() == expected[max(0, count - 3) if shape.kind == "sliding" else 0 :]
    return list(ids[:count])


def test_a_hit_is_the_longest_beginning_in_whole_blocks() -> None:
    store = PrefixStore(99, BLOCK)
    put(store, range(10))
    assert store.tokens == 9
    assert take(store, range(20)) == list(range(9))
    assert take(store, [0, 1, 2, 3, 4, 5, 6, 7, 77]) == list(range(6))
    assert take(store, [0, 1]) == [] and take(store, [5, 1, 2]) == []
    counters = store.counters
    assert (counters.hits, counters.misses, counters.reused_tokens) == (2, 2, 15)
    assert (counters.kept_tokens, counters.evicted_tokens) == (9, 0)


def test_beginnings_are_held_once() -> None:
    store = PrefixStore(99, BLOCK)
    put(store, [*range(12), 50, 51, 52])
    put(store, [*range(12), 60, 61, 62])
    assert store.tokens == 12 + 3 + 3
    assert take(store, [*range(12), 60, 61, 62]) == [*range(12), 60, 61, 62]


def test_what_is_taken_is_a_copy() -> None:
    store = PrefixStore(99, BLOCK)
    put(store, range(6))
    cache = empty()
    store.take(ROOT, range(6), cache)
    for layer in range(CONFIG.num_layers):
        k, v = cache.prefix(layer)
        k.zero_()
        v.zero_()
    assert take(store, range(6)) == list(range(6))


def test_what_a_ring_has_lost_is_not_kept() -> None:
    store = PrefixStore(99, BLOCK)
    store.put(ROOT, range(30), filled(range(30)))  # all at once: the rings hold the last six
    assert store.tokens == 0


def test_roots_do_not_mix() -> None:
    store = PrefixStore(99, BLOCK)
    put(store, range(6), b"one")
    assert take(store, range(6), b"two") == []
    put(store, range(6), b"two", offset=0.5)
    assert take(store, range(6), b"one") == list(range(6))
    assert take(store, range(6), b"two", offset=0.5) == list(range(6))


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    store = PrefixStore(4 * BLOCK, BLOCK)
    put(store, range(9))
    put(store, [20, 21, 22])
    assert take(store, [0, 1, 2]) == [0, 1, 2]  # used again, but what follows it was not
    put(store, [30, 31, 32])
    assert take(store, range(9)) == list(range(6))
    put(store, [40, 41, 42])
    assert take(store, [20, 21, 22]) == []
    assert store.tokens == 4 * BLOCK and store.counters.evicted_tokens == 2 * BLOCK


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (2, 0), (3, 3), (8, 6)])
def test_little_room_keeps_the_beginning(room: int, kept: int) -> None:
    store = PrefixStore(room, BLOCK)
    put(store, range(12))
    assert take(store, range(12)) == list(range(kept))
    assert store.tokens == kept and store.counters.evicted_tokens == 0


DIGESTS = [lambda *_: b"same", lambda _root, _parent, ids: bytes(ids[:1]), lambda _root, _parent, ids: bytes(ids)]


@pytest.mark.parametrize("digest", DIGESTS)
def test_colliding_hashes_never_give_a_wrong_cache(digest: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_key", digest)
    store = PrefixStore(99, BLOCK)
    texts = [[1, 2, 3, 1, 2, 3, 4, 5, 6], [1, 2, 4, 4, 5, 6], [4, 5, 6], [1, 2, 3, 4, 5, 6], [4, 5, 6, 1, 2, 3]]
    for number, ids in enumerate(texts):
        put(store, ids, b"%d" % (number % 2))
    for number, ids in enumerate(texts):
        take(store, ids, b"%d" % (number % 2))
    assert take(store, texts[0], b"0") == [1, 2, 3] and take(store, texts[0], b"1") == []


class Naive:
    """The same as a list of (root, beginning), latest used last; a beginning is worth one block."""

    def __init__(self, room: int) -> None:
        self.room, self.kept = room // BLOCK, list[tuple[bytes, tuple[int, ...]]]()

    def find(self, root: bytes, ids: tuple[int, ...]) -> int:
        count = 0
        while count + BLOCK <= len(ids) and (root, ids[: count + BLOCK]) in self.kept:
            count += BLOCK
        return count

    def use(self, root: bytes, ids: tuple[int, ...], count: int) -> None:
        for stop in range(count, 0, -BLOCK):
            self.kept.remove((root, ids[:stop]))
            self.kept.append((root, ids[:stop]))

    def put(self, root: bytes, ids: tuple[int, ...]) -> None:
        count = self.find(root, ids)
        while count + BLOCK <= len(ids) and count < self.room * BLOCK:
            count += BLOCK
            self.kept.append((root, ids[:count]))
        self.use(root, ids, count)
        self.kept = self.kept[-self.room :] if self.room else []


texts = st.lists(st.integers(0, 1), max_size=13).map(tuple)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 20), st.lists(st.tuples(st.booleans(), st.sampled_from([b"a", b"b"]), texts), max_size=14))
def test_any_history_equals_the_naive_store(room: int, script: list[tuple[bool, bytes, tuple[int, ...]]]) -> None:
    store, naive = PrefixStore(room, BLOCK), Naive(room)
    for is_put, root, ids in script:
        if is_put:
            put(store, ids, root)
            for stop in range(BLOCK, len(ids) + 1, BLOCK):
                naive.put(root, ids[:stop])
        else:
            count = naive.find(root, ids)
            assert take(store, ids, root) == list(ids[:count])
            naive.use(root, ids, count)
        assert store.tokens == len(naive.kept) * BLOCK <= room
    counters = store.counters
    assert counters.kept_tokens - counters.evicted_tokens == store.tokens


def test_a_block_is_a_copy_and_no_larger_than_it_must_be() -> None:
    cache = filled(range(6))
    block = cache.copy(3, 6)
    assert block is not None and isinstance(block.memory, mmap)
    assert len(block.memory) == sum(2 * 3 * layer.num_kv_heads * layer.head_dim * 4 for layer in CONFIG.layers)
    for layer, shape in enumerate(CONFIG.layers):
        cache.truncate(5)
        cache.append(layer, *[torch.zeros(1, shape.num_kv_heads, shape.head_dim)] * 2)
    twin = empty()
    twin.load([block])
    assert twin.prefix(1)[0][:, 0, 0].tolist() == marks(range(6))[3:]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_what_is_evicted_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    wide = tiny_config(num_heads=8, layers=(LayerConfig(kind="full", num_kv_heads=8, head_dim=64),))
    cache = KVCache(wide, torch.device("cpu"), torch.float32, 32)
    cache.append(0, *[torch.ones(32, 8, 64)] * 2)
    cache.advance(32)
    store = PrefixStore(320 * 32, 32)
    # Small things that stay, made between the blocks: in a common heap they would hold the memory of all of them.
    others, before = list[Tensor](), resident()
    for number in range(320):
        store.put(ROOT, [number] * 32, cache)
        others.append(torch.ones(100))
    held = 320 * 32 * 2 * 8 * 64 * 4
    assert resident() - before > 0.9 * held
    del store
    assert resident() - before < 0.1 * held
