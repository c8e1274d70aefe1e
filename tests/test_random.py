"""Laws of the counter-based draws: known numbers, same key same bits, other keys independent, exact range."""

from __future__ import annotations

import pytest
import torch
from chance import SURE, independent, uniformly
from hypothesis import given
from hypothesis import strategies as st

from dgemma.kernels import random
from dgemma.kernels.random import Stream, hash_key, uniform, uniform_tokens

WORD = 1 << 64
COUNT = 1 << 16
INDEX = torch.arange(COUNT)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def splitmix(state: int) -> int:
    """One output of SplitMix64 in Python's integers."""
    x = (state + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


@pytest.mark.parametrize(("seed", "output"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)])
def test_known_numbers_of_splitmix(seed: int, output: int) -> None:
    assert splitmix(seed) == output
    assert int(hash_key(seed)) % WORD == output


@given(st.lists(INT64, min_size=1, max_size=7))
def test_a_key_is_chained_splitmix(words: list[int]) -> None:
    state = 0
    for word in words:
        state = splitmix(state ^ word % WORD)
    assert int(hash_key(*words)) % WORD == state
    assert int(hash_key(*(torch.tensor(word) for word in words))) % WORD == state


def test_words_broadcast_and_numbers_equal_tensors() -> None:
    rows, columns = torch.arange(5)[:, None], torch.arange(7)
    table = uniform(Stream.DRAW, 3, rows, columns)
    assert table.shape == (5, 7)
    for i in range(5):
        for j in range(7):
            assert float(table[i, j]) == float(uniform(Stream.DRAW, 3, i, j))


def test_same_key_same_draw_and_the_order_of_words_matters() -> None:
    assert torch.equal(uniform(1, 2, INDEX), uniform(1, 2, INDEX))
    assert not torch.equal(uniform(1, 2, INDEX), uniform(2, 1, INDEX))


def test_a_seed_is_taken_modulo_two_to_the_64() -> None:
    assert int(hash_key(-1)) == int(hash_key(WORD - 1)) == int(hash_key(torch.tensor(-1)))


def test_uniforms_fill_the_half_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0, 1 << 10, -1])
    monkeypatch.setattr(random, "hash_key", lambda *words: ends)
    assert uniform(0).tolist() == [0.0, 0.0, 1 - 2.0**-53]
    for vocab in (1, 2, 3, 997, 1 << 18, 262_145, (1 << 31) - 1):
        assert uniform_tokens(vocab, 0).tolist() == [0, 0, vocab - 1]


@pytest.mark.parametrize("vocab", [3, 997, 1000])
def test_tokens_are_uniform_over_a_vocabulary_that_is_no_power_of_two(vocab: int) -> None:
    tokens = uniform_tokens(vocab, Stream.FIRST, 7, torch.arange(300_000))
    assert tokens.dtype == torch.int64
    assert int(tokens.min()) == 0 and int(tokens.max()) == vocab - 1
    assert uniformly(tokens, vocab) > SURE


def key(place: str, value: int) -> torch.Tensor:
    """`COUNT` uniforms over positions, with one word of the key changed to `value`."""
    words = {"stream": 3, "seed": 0, "choice": 0, "canvas": 0, "step": 5, "block": 0} | {place: value}
    order = ("stream", "seed", "choice", "canvas", "step")
    return uniform(*(words[name] for name in order), INDEX, words["block"])


@pytest.mark.parametrize("place", ["stream", "seed", "choice", "canvas", "step", "block"])
def test_a_changed_word_gives_independent_draws(place: str) -> None:
    for left, right in ((1, 2), (2, 3), (0, 1 << 20)):
        a, b = key(place, left), key(place, right)
        assert independent(a, b) > SURE
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(float(correlation)) < 5 / COUNT**0.5


def test_neighbouring_positions_are_independent() -> None:
    draws = key("step", 5)
    for lag in (1, 2, 64, 256):
        assert independent(draws[:-lag], draws[lag:]) > SURE


def test_swapped_words_are_independent() -> None:
    """(step, position) and (position, step) must not meet."""
    a = uniform(Stream.DRAW, INDEX[:256, None], INDEX[:256])
    assert independent(a[~torch.eye(256, dtype=torch.bool)], a.t()[~torch.eye(256, dtype=torch.bool)], 8) > SURE


def test_every_bit_is_fair() -> None:
    bits = hash_key(Stream.DRAW, INDEX)
    for bit in range(64):
        ones = int(((bits >> bit) & 1).sum())
        assert abs(ones - COUNT / 2) < 5 * COUNT**0.5 / 2


def test_streams_have_different_numbers() -> None:
    assert len({int(stream) for stream in Stream}) == len(Stream) == 8
