"""A request's cache against naive lists: what is seen at every length, roll-back, copies, parts of a pass, chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from engine_kit import WINDOW, prompt, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import NaiveCache
from naive import denoise as naive_denoise
from naive import encode as naive_encode
from torch import Tensor

from dgemma.cache import KVCache
from dgemma.config import ModelConfig
from dgemma.engine.attend import DenoiseAttend, EncodeAttend
from dgemma.model import DiffusionGemma

CPU = torch.device("cpu")
LENGTHS = (1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)


@dataclass
class Lists:
    """The same cache as plain lists of marks per layer: append, forget, look at the last so many."""

    config: ModelConfig
    slack: int
    marks: list[int] = field(default_factory=list)
    counter: int = 0

    def fresh(self, count: int) -> list[int]:
        self.counter += count
        return list(range(self.counter - count, self.counter))

    def seen(self, layer: int, marks: list[int], extra: int = 0) -> list[int]:
        if self.config.layers[layer].kind == "full":
            return marks
        return marks[-(self.config.sliding_window - 1 + extra) :] if self.config.sliding_window > 1 or extra else []


def keys(config: ModelConfig, layer: int, marks: list[int]) -> tuple[Tensor, Tensor]:
    """K and V whose every entry is the mark (V: its negative)."""
    shape = config.layers[layer]
    k = torch.tensor(marks, dtype=torch.float32)[:, None, None].expand(-1, shape.num_kv_heads, shape.head_dim)
    return k, -k


def read(pair: tuple[Tensor, Tensor]) -> list[int]:
    k, v = pair
    assert torch.equal(k, -v) and bool((k == k[:, :1, :1]).all())
    return [int(mark) for mark in k[:, 0, 0].tolist()]


def append(cache: KVCache, lists: Lists, count: int, commit: bool = True) -> None:
    new = lists.fresh(count)
    for layer in range(lists.config.num_layers):
        cache.append(layer, *keys(lists.config, layer, new))
        assert read(cache.prefix(layer, count)) == lists.seen(layer, lists.marks + new, count)
    if commit:
        cache.advance(count)
        lists.marks += new


def check(cache: KVCache, lists: Lists) -> None:
    assert cache.length == len(lists.marks)
    for layer in range(lists.config.num_layers):
        assert read(cache.prefix(layer)) == lists.seen(layer, lists.marks)


def together(cache: KVCache, lists: Lists, counts: list[int]) -> None:
    """Several parts in one pass: every layer appends them all before the next one begins."""
    news = [lists.fresh(count) for count in counts]
    views = cache.segments(counts)
    for layer in range(lists.config.num_layers):
        seen = list(lists.marks)
        for view, new in zip(views, news, strict=True):
            assert view.length == len(seen)
            seen += new
            view.append(layer, *keys(lists.config, layer, new))
            assert read(view.prefix(layer, len(new))) == lists.seen(layer, seen, len(new))
    check(cache, lists)
    cache.advance(sum(counts))
    lists.marks += [mark for new in news for mark in new]


def copied(cache: KVCache, lists: Lists, size: int, reach: int) -> KVCache:
    """Copies cut at `size` and loaded again; where a ring has lost the beginning, what is left is copied right."""
    length = len(lists.marks)
    for start in range(max(0, length - min(reach, cache.slack)), length):
        block = cache.copy(start, length)
        assert block is not None
        layers = [read(pair) for pair in cache._pieces(block)]
        assert layers == [lists.marks[start:]] * lists.config.num_layers
    blocks = [cache.copy(start, min(start + size, length)) for start in range(0, length, size)]
    lost = [number for number, block in enumerate(blocks) if block is None]
    assert lost == list(range(len(lost)))  # the oldest first
    twin, other = fresh(lists.config.sliding_window, lists.slack)
    if lost:
        append_all(twin, other, lists.marks)
    else:
        twin.load([block for block in blocks if block is not None])
    return twin


def append_all(cache: KVCache, lists: Lists, marks: list[int]) -> None:
    for mark in marks:
        for layer in range(lists.config.num_layers):
            cache.append(layer, *keys(lists.config, layer, [mark]))
        cache.advance(1)


def fresh(window: int, slack: int) -> tuple[KVCache, Lists]:
    config = tiny_config(sliding_window=window)
    return KVCache(config, CPU, torch.float32, slack), Lists(config, slack)


steps = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 200)),
    st.tuples(st.just("interrupted"), st.integers(1, 200)),
    st.tuples(st.just("truncate"), st.integers(0, 60)),
    st.tuples(st.just("copied"), st.integers(1, 7)),
    st.tuples(st.just("parts"), st.integers(2, 5)),
)


@settings(max_examples=150, deadline=None)
@given(window=st.integers(1, 9), slack=st.integers(1, 70), script=st.lists(steps, max_size=12))
def test_any_history_equals_lists(window: int, slack: int, script: list[tuple[str, int]]) -> None:
    cache, lists = fresh(window, slack)
    reach = 0  # tokens that may be rolled back for certain
    for action, amount in script:
        if action in ("append", "interrupted"):
            count = min(amount, slack)
            append(cache, lists, count, commit=action == "append")
            reach = min(slack, reach + count) if action == "append" else reach - count
        elif action == "truncate":
            length = max(0, len(lists.marks) - amount)
            assert cache.can_truncate(length) or amount > reach
            if cache.can_truncate(length):
                cache.truncate(length)
                lists.marks = lists.marks[:length]
                reach -= amount
        elif action == "parts":
            counts = [1 + (number * amount) % 3 for number in range(amount)]
            if sum(counts) <= slack:
                together(cache, lists, counts)
                reach = min(slack, reach + sum(counts))
        elif lists.marks:
            cache, reach = copied(cache, lists, amount, reach), min(slack, len(lists.marks))
        check(cache, lists)


def test_roll_back_reaches_exactly_the_slack() -> None:
    cache, lists = fresh(window=5, slack=7)
    for _ in range(9):
        append(cache, lists, 7)
    assert [n for n in range(64) if cache.can_truncate(n)] == list(range(63 - 7, 64))
    cache.truncate(56)
    assert not cache.can_truncate(55)
    with pytest.raises(AssertionError):
        cache.truncate(55)
    lists.marks = lists.marks[:56]
    append(cache, lists, 1)
    assert cache.can_truncate(56) and not cache.can_truncate(55)  # what was overwritten does not come back


def test_a_short_cache_rolls_back_to_nothing() -> None:
    cache, lists = fresh(window=5, slack=7)
    append(cache, lists, 6)
    cache.truncate(0)
    lists.marks.clear()
    check(cache, lists)


def test_an_append_longer_than_the_slack_is_refused() -> None:
    cache, lists = fresh(window=5, slack=7)
    with pytest.raises(AssertionError):
        append(cache, lists, 8)


def test_sliding_layers_do_not_grow_with_the_context() -> None:
    cache, lists = fresh(window=5, slack=8)
    sizes = []
    for _ in range(60):
        append(cache, lists, 8)
        sizes.append([layer._k.shape[0] for layer in cache._layers])
    assert sizes[-1][0] == sizes[5][0] == 5 - 1 + 8
    assert 480 <= sizes[-1][1] <= 960


# -- against the network -------------------------------------------------------------


def encode(model: DiffusionGemma, cache: KVCache, ids: list[int]) -> Tensor:
    positions = torch.arange(len(ids)) + cache.length
    hidden = model.encode(torch.tensor(ids), positions, EncodeAttend(model.config, [cache], [len(ids)]))
    cache.advance(len(ids))
    return hidden


def denoise(model: DiffusionGemma, cache: KVCache, canvas: Tensor) -> Tensor:
    places = torch.arange(len(canvas))
    return model.denoise(canvas, places + cache.length, DenoiseAttend([cache], [len(canvas)]))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_and_windows_equal_the_naive_cache(length: int, chunk: int) -> None:
    model = tiny_model(torch.float64)
    ids, canvas = list(prompt(length)), torch.tensor(prompt(9, seed=5))
    cache, naive = KVCache(model.config, CPU, torch.float64, 64), NaiveCache(model.config)
    expected = naive_encode(model, naive, torch.tensor(ids))
    parts = [encode(model, cache, ids[i : i + chunk]) for i in range(0, length, chunk)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoise(model, cache, canvas), naive_denoise(model, naive, canvas), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("back", [1, 4, 8])
def test_rolled_back_equals_never_written(back: int) -> None:
    model = tiny_model(torch.float64)
    ids, canvas = list(prompt(3 * WINDOW)), torch.tensor(prompt(9, seed=5))
    cache = KVCache(model.config, CPU, torch.float64, 8)
    for start in range(0, len(ids), 6):
        encode(model, cache, ids[start : start + 6])
    before = denoise(model, cache, canvas)
    cache.truncate(len(ids) - back)
    encode(model, cache, list(prompt(back, seed=9)))  # another ending
    assert not torch.allclose(denoise(model, cache, canvas), before)
    cache.truncate(len(ids) - back)
    encode(model, cache, ids[-back:])
    torch.testing.assert_close(denoise(model, cache, canvas), before, rtol=1e-9, atol=1e-9)


def test_denoising_writes_nothing() -> None:
    model = tiny_model()
    cache = KVCache(model.config, CPU, torch.float32, 16)
    encode(model, cache, list(prompt(11)))
    kept = [(layer._k.clone(), layer._v.clone()) for layer in cache._layers]
    first = denoise(model, cache, torch.tensor(prompt(9)))
    assert torch.equal(first, denoise(model, cache, torch.tensor(prompt(9))))
    for layer, (k, v) in zip(cache._layers, kept, strict=True):
        used = slice(0, 11)
        assert torch.equal(layer._k[used], k[used]) and torch.equal(layer._v[used], v[used])
