"""Passes, chunks and reuse change no bit: any way to encode a prompt gives the same keys, and so the same answer."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from engine_kit import CANVAS, WINDOW, config, end, of, prompt, run, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgemma.cache import PrefixStore
from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request
from dgemma.engine.request import State
from dgemma.errors import ConfigError
from dgemma.events import Event, Finished

MODEL = tiny_model()
BLOCK = 4
COLD = EngineConfig(prefix_block=BLOCK, prefix_cache_tokens=0)
WARM = EngineConfig(prefix_block=BLOCK)
LENGTHS = (1, WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW - 1, 3 * WINDOW, 3 * WINDOW + 1, 41)


def ask(ids: tuple[int, ...], mode: str = "diffusion", seed: int = 0, reuse: bool = True, canvases: int = 2) -> Request:
    settings = config(mode=mode, seed=seed, max_new_tokens=canvases * CANVAS, max_denoising_steps=4)
    return Request(prompt=ids, config=settings, watch=True, reuse=reuse)


def unhurried(events: list[Event]) -> list[Event]:
    """Without what chunks and reuse may change: how many passes, how many tokens came from elsewhere."""
    return [replace(e, cached_tokens=0, encode_passes=0) if isinstance(e, Finished) else e for e in events]


@functools.cache
def cold(item: Request) -> list[Event]:
    return unhurried(run(Engine(MODEL, COLD), [item]))


def keys(state: State) -> list[Tensor]:
    """What a canvas sees: keys and values of every layer."""
    return [x.clone() for layer in range(MODEL.config.num_layers) for x in state.cache.prefix(layer)]


# -- chunks --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 5, 7, 11, 13, 40])
def test_chunked_encoding_equals_unchunked_bit_for_bit(chunk: int) -> None:
    for length in LENGTHS:
        for mode in ("diffusion", "ar"):
            item = ask(prompt(length), mode)
            engine = Engine(MODEL, replace(COLD, encode_chunk=chunk))
            assert unhurried(run(engine, [item])) == cold(item), (length, mode)
            if chunk < 8 and mode == "diffusion":  # a pass takes one block; the first canvas is half a pass too long
                assert engine.counters.encode_passes == -(-length // BLOCK) + 2


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_leave_the_same_keys(length: int) -> None:
    found = []
    for chunk in (4, 6, 12, 512):
        engine = Engine(MODEL, replace(COLD, encode_chunk=chunk))
        number = engine.add(ask(prompt(length)))
        while engine._running.get(number) is None or engine._running[number].pending:
            engine.tick()
        found.append(keys(engine._running[number]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_pass_that_failed_can_be_repeated() -> None:
    item, engine = ask(prompt(3 * WINDOW + 1)), Engine(MODEL, replace(COLD, encode_chunk=8))
    real, calls = engine.runner.encode, []

    def failing(jobs: object) -> list[Tensor]:
        calls.append(jobs)
        out = real(jobs)  # type: ignore[arg-type]
        if len(calls) == 2:
            raise MemoryError
        return out

    engine.runner.encode = failing  # type: ignore[method-assign, assignment]
    engine.add(item)
    engine.tick()
    with pytest.raises(MemoryError):
        engine.tick()
    assert unhurried(run(engine)) == cold(item)


# -- reuse ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("shared", [1, 3, 4, 5, *range(WINDOW - 2, WINDOW + 2), 3 * WINDOW - 1, 3 * WINDOW, 40])
def test_a_shared_beginning_is_encoded_once(shared: int, mode: str) -> None:
    engine = Engine(MODEL, replace(WARM, encode_chunk=7))
    first, second = ask(prompt(shared) + prompt(9, 1), mode), ask(prompt(shared) + prompt(5, 2), mode, seed=1)
    run(engine, [first])
    before = engine.counters.encoded_tokens
    events = run(engine, [second])
    assert unhurried(of(events, 2)) == cold(second)
    cached = end(events, 2).cached_tokens
    assert cached == shared // BLOCK * BLOCK
    fresh = Engine(MODEL, COLD)
    run(fresh, [second])
    assert engine.counters.encoded_tokens - before == fresh.counters.encoded_tokens - cached
    assert engine.prefix_counters.hits == (cached > 0) and engine.prefix_counters.reused_tokens == cached


@pytest.mark.parametrize("modes", [("diffusion",) * 4, ("ar",) * 4, ("ar", "diffusion", "ar", "diffusion")])
def test_turns_of_a_conversation_equal_fresh_runs(modes: tuple[str, ...]) -> None:
    engine, ids, previous = Engine(MODEL, WARM), prompt(9), tuple[int, ...]()
    for name, mode in enumerate(modes, start=1):
        item = ask(ids, mode, seed=name, canvases=3)
        events = run(engine, [item])
        assert unhurried(of(events, name)) == cold(item)
        # The last answer was written canvas by canvas, so it is not of whole blocks; all before it is.
        assert end(events, name).cached_tokens == len(previous) // BLOCK * BLOCK
        previous, ids = ids, ids + tuple(tokens(events, name)) + prompt(5, seed=name)


@pytest.mark.parametrize(("mode", "cached"), [("diffusion", 12), ("ar", 8)])
def test_the_same_prompt_again_leaves_ar_its_last_token_to_encode(mode: str, cached: int) -> None:
    engine, item = Engine(MODEL, WARM), ask(prompt(12), mode)
    first, again = run(engine, [item]), run(engine, [item])
    assert end(first, 1).cached_tokens == 0 and end(again, 2).cached_tokens == cached
    assert unhurried(of(again, 2)) == unhurried(first) == cold(item)


def test_canvases_after_whole_blocks_are_whole_blocks() -> None:
    item = ask(prompt(2 * BLOCK), canvases=3)
    engine = Engine(MODEL, WARM)
    answer = tokens(run(engine, [item]))
    after = ask(item.prompt + tuple(answer) + (5, 6))
    events = run(engine, [after])
    assert end(events, 2).cached_tokens == 2 * BLOCK + 2 * CANVAS  # the last canvas was never encoded
    assert unhurried(of(events, 2)) == cold(after)


def test_requests_that_opt_out_neither_take_nor_leave() -> None:
    engine, ids = Engine(MODEL, WARM), prompt(9)
    run(engine, [ask(ids, reuse=False)])
    assert engine.prefixes.tokens == 0
    run(engine, [ask(ids)])
    assert end(run(engine, [ask(ids, reuse=False)]), 3).cached_tokens == 0
    assert engine.prefix_counters.misses == 1 and engine.prefix_counters.hits == 0


def test_an_engine_without_a_store_keeps_nothing() -> None:
    engine = Engine(MODEL, COLD)
    run(engine, [ask(prompt(20)), ask(prompt(20))])
    assert engine.prefixes.tokens == 0 and engine.prefix_counters.misses == 0


def test_an_aborted_prompt_leaves_what_it_encoded() -> None:
    engine, ids = Engine(MODEL, replace(WARM, encode_chunk=8)), prompt(30)
    number = engine.add(ask(ids))
    engine.tick()
    engine.tick()
    assert engine.abort(number) is not None
    item = ask((*ids, 5, 6))
    events = run(engine, [item])
    assert end(events, 2).cached_tokens == 16
    assert unhurried(of(events, 2)) == cold(item)


def test_what_was_evicted_is_encoded_again() -> None:
    engine = Engine(MODEL, replace(WARM, prefix_cache_tokens=5 * BLOCK))
    items = [ask(prompt(2 * BLOCK + 1, seed=seed)) for seed in range(3)]
    cached = []
    for name, item in enumerate([*items, items[0], items[2]], start=1):
        events = run(engine, [item])
        assert unhurried(of(events, name)) == cold(item)
        cached.append(end(events, name).cached_tokens)
        assert engine.prefixes.tokens <= 5 * BLOCK
    assert cached == [0, 0, 0, BLOCK, 2 * BLOCK]  # the third took the place of the first one's end
    assert engine.prefix_counters.evicted_tokens == BLOCK + BLOCK


family = st.tuples(
    st.integers(0, 3), st.integers(1, 3 * WINDOW + 2), st.integers(0, 5), st.sampled_from(["diffusion", "ar"])
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(family, min_size=1, max_size=6), st.sampled_from([4, 5, 9, 512]), st.sampled_from([8, 20, 1000]),
    st.lists(st.integers(0, 12), max_size=6), st.dictionaries(st.integers(1, 6), st.integers(0, 8), max_size=2),
)  # fmt: skip
def test_any_company_at_any_time_changes_nothing(
    talks: list[tuple[int, int, int, str]], chunk: int, room: int, starts: list[int], aborts: dict[int, int]
) -> None:
    """Prompts that share beginnings, joining and leaving whenever, with little room and odd chunks."""
    engine = Engine(MODEL, replace(WARM, encode_chunk=chunk, prefix_cache_tokens=room))
    items = [ask(prompt(length) + prompt(rest, 1 + text), mode) for text, length, rest, mode in talks]
    waiting = sorted(zip([*starts, *[0] * len(items)], items, strict=False), key=lambda pair: pair[0])
    order, events, tick = [item for _, item in waiting], list[Event](), 0
    while engine.has_work or waiting:
        while waiting and waiting[0][0] <= tick:
            engine.add(waiting.pop(0)[1])
        for number, when in aborts.items():
            if when == tick:
                engine.abort(number)
        events += engine.tick()
        assert engine.prefixes.tokens <= room
        tick += 1
    for number, item in enumerate(order, start=1):
        got = unhurried(of(events, number))
        assert got == cold(item)[: len(got)]
        assert len(got) == len(cold(item)) or number in aborts


# -- shared stores -------------------------------------------------------------------


def test_engines_share_a_store_only_if_they_are_the_same() -> None:
    store, ids = PrefixStore(1000, BLOCK), prompt(12)
    other = tiny_model(seed=1)

    def cached(engine: Engine) -> int:
        item = ask(ids)
        fresh = unhurried(run(Engine(engine.runner.model, COLD), [item]))
        events = run(engine, [item])
        assert unhurried(events) == fresh
        return end(events).cached_tokens

    assert cached(Engine(MODEL, WARM, prefixes=store, identity="a")) == 0
    assert cached(Engine(MODEL, WARM, prefixes=store, identity="a")) == 12
    assert cached(Engine(other, WARM, prefixes=store, identity="a + adapter")) == 0
    assert cached(Engine(tiny_model(torch.float64), WARM, prefixes=store, identity="a")) == 0
    assert cached(Engine(MODEL, WARM, prefixes=store)) == 0
    assert cached(Engine(other, WARM, prefixes=store)) == 0
    assert cached(Engine(MODEL, WARM, prefixes=store, identity="a")) == 12


def test_unusable_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="prefix_block must be a whole number of at least 1, got 0"):
        EngineConfig(prefix_block=0)
    assert EngineConfig(prefix_block=99, encode_chunk=7).block == 7
    with pytest.raises(ConfigError, match="blocks of 4, got 5"):
        Engine(MODEL, WARM, prefixes=PrefixStore(1000, 5))


def test_the_second_of_two_alike_reaches_its_first_step_sooner(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(MODEL, replace(WARM, encode_chunk=16))
    passes = []
    for seed in range(2):
        engine.add(ask((*prompt(200), seed), seed=seed))
        before, ticks = engine.counters.denoise_passes, 0
        while engine.counters.denoise_passes == before:
            engine.tick()
            ticks += 1
        passes.append(ticks)
        run(engine)
    counters = engine.prefix_counters
    with capsys.disabled():
        print(f"\nhit rate {counters.reused_tokens / 201:.2f}, ticks to the first step {passes[1] / passes[0]:.2f}")
    assert passes == [13, 1] and counters.reused_tokens == 200
