"""Who gets into the engine and when: memory, order, fairness; and the numbers that an engine tells about itself."""

from __future__ import annotations

import threading
from dataclasses import fields, replace

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, WINDOW, config, end, of, prompt, request, run, tiny_config, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.cache import KVCache, kv_bytes
from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request
from dgemma.engine.load import Load, Totals
from dgemma.engine.runner import Counters
from dgemma.errors import ConfigError, RequestError
from dgemma.events import Committed, Finished

MODEL = tiny_model()
CPU = torch.device("cpu")
# Bytes per token of the tiny model in float32: two sliding layers of 2 x 8, two full ones of 1 x 12; keys and values.
SLIDING, FULL = 2 * 2 * (2 * 8) * 4, 2 * 2 * 12 * 4


def held(cache: KVCache) -> int:
    return sum(tensor.nbytes for layer in cache._layers for tensor in (layer._k, layer._v))


def fill(cache: KVCache, count: int) -> None:
    for index, layer in enumerate(tiny_config().layers):
        k = torch.zeros(count, layer.num_kv_heads, layer.head_dim)
        cache.append(index, k, k)
    cache.advance(count)


def test_the_estimate_by_hand() -> None:
    slack = 10
    assert kv_bytes(tiny_config(), torch.float32, slack, 7) == 7 * (SLIDING + FULL)
    ring = WINDOW - 1 + slack
    assert kv_bytes(tiny_config(), torch.float32, slack, 1000) == ring * SLIDING + 1000 * FULL
    assert kv_bytes(tiny_config(), torch.bfloat16, slack, 7) == 7 * (SLIDING + FULL) // 2


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=12), more=st.integers(0, 100), slack=st.integers(40, 90))
def test_a_cache_never_holds_more_than_its_estimate(parts: list[int], more: int, slack: int) -> None:
    most = sum(parts) + more
    cache = KVCache(tiny_config(), CPU, torch.float32, slack, most)
    for count in parts:
        fill(cache, count)
        assert held(cache) <= kv_bytes(tiny_config(), torch.float32, slack, most)
    if not more:
        assert held(cache) == kv_bytes(tiny_config(), torch.float32, slack, most)


def test_without_a_limit_the_buffers_double_beyond_it() -> None:
    cache = KVCache(tiny_config(), CPU, torch.float32, 512)
    fill(cache, 100)
    fill(cache, 50)
    assert held(cache) > kv_bytes(tiny_config(), torch.float32, 512, 150)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_running_request_stays_within_what_is_set_aside(mode: str) -> None:
    engine = Engine(MODEL, NO_REUSE)
    one = request(90, max_new_tokens=45, mode=mode)
    engine.add(one)
    seen = 0
    while engine.has_work:
        engine.tick()
        seen = max([seen, *(held(state.cache) for state in engine._running.values())])
        assert seen <= engine.kv_bytes(one)
    assert seen > engine.kv_bytes(one) / 2


def limited(amount: int, **changes: int) -> Engine:
    return Engine(MODEL, replace(NO_REUSE, kv_bytes=amount, **changes))


def test_memory_bounds_how_many_run_together() -> None:
    requests = [request(30, seed, max_new_tokens=20) for seed in range(5)]
    size = Engine(MODEL, NO_REUSE).kv_bytes(requests[0])
    engine = limited(2 * size + size // 2)
    for one in requests:
        engine.add(one)
    most, events = 0, []
    while engine.has_work:
        events += engine.tick()
        load = engine.load
        assert load.kv_reserved == load.running * size <= load.kv_limit
        most = max(most, load.running)
    assert most == 2
    assert sum(isinstance(event, Finished) for event in events) == 5
    assert engine.load.kv_reserved == 0


def test_a_limit_changes_no_answer() -> None:
    requests = [request(10 + 7 * seed, seed, max_new_tokens=20) for seed in range(4)]
    size = max(Engine(MODEL, NO_REUSE).kv_bytes(one) for one in requests)
    free, tight = run(Engine(MODEL, NO_REUSE), requests), run(limited(size), requests)
    assert [of(free, n) for n in (1, 2, 3, 4)] == [of(tight, n) for n in (1, 2, 3, 4)]


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    one = request(30, max_new_tokens=20)
    size = Engine(MODEL, NO_REUSE).kv_bytes(one)
    with pytest.raises(RequestError, match=rf"30 tokens.*max_new_tokens 20.* {size} bytes.* {size - 1} \(kv_bytes\)"):
        limited(size - 1).add(one)
    engine = limited(size)
    assert end(run(engine, [one])).completion_tokens > 0
    assert not engine.has_work


def test_a_large_request_does_not_starve_behind_small_ones() -> None:
    small, large = request(8, max_new_tokens=CANVAS), request(200, max_new_tokens=100)
    engine = limited(Engine(MODEL, NO_REUSE).kv_bytes(large))
    for _ in range(3):
        engine.add(small)
    big = engine.add(large)
    begun: list[int] = []
    late = 0
    while engine.has_work:
        if late < 20:
            engine.add(replace(small, config=config(max_new_tokens=CANVAS, seed=late)))
            late += 1
        engine.tick()
        # First come, first served: it waits for the three before it, and nobody passes it.
        begun += [one for one in engine._running if one not in begun]
        assert len(begun) <= 3 or begun[3] == big
    assert begun == list(range(1, 25))


def test_what_is_set_aside_comes_back_when_a_request_is_dropped() -> None:
    one = request(30, max_new_tokens=200)
    engine = limited(Engine(MODEL, NO_REUSE).kv_bytes(one))
    first, second = engine.add(one), engine.add(one)
    engine.tick()
    assert (engine.load.running, engine.load.waiting) == (1, 1)
    engine.abort(first)
    assert (engine.load.running, engine.load.kv_reserved) == (0, 0)
    engine.tick()
    assert list(engine._running) == [second]


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_kv_bytes_is_a_whole_number(value: object) -> None:
    with pytest.raises(ConfigError, match="kv_bytes must be a whole number of at least 0"):
        EngineConfig(kv_bytes=value)  # type: ignore[arg-type]


def ticks_to_finish(engine: Engine, number: int) -> int:
    """Ticks from now until this request is over."""
    for tick in range(1, 5000):
        if any(isinstance(event, Finished) and event.request == number for event in engine.tick()):
            return tick
    raise AssertionError("never")


def test_long_requests_do_not_hold_a_short_one_up() -> None:
    short = request(12, 7, max_new_tokens=CANVAS)
    alone = Engine(MODEL, NO_REUSE)
    expected = ticks_to_finish(alone, alone.add(short))
    # Chunks and passes so small that the long prompts alone need many ticks and several passes compete.
    engine = Engine(MODEL, replace(NO_REUSE, encode_chunk=16, max_batch_tokens=64))
    for seed in range(3):
        engine.add(request(300, seed, max_new_tokens=150))
    engine.tick()
    before = engine.counters.encoded_tokens
    taken = ticks_to_finish(engine, engine.add(short))
    assert taken == expected
    assert engine.counters.encoded_tokens - before <= taken * 64
    assert engine.load.running == 3


def test_short_requests_do_not_hold_a_long_one_up() -> None:
    long = request(300, 1, max_new_tokens=40)
    small = replace(NO_REUSE, encode_chunk=32, max_batch_tokens=64)
    alone = Engine(MODEL, small)
    expected = ticks_to_finish(alone, alone.add(long))
    engine = Engine(MODEL, small)
    number, events, tick = engine.add(long), [], 0
    while not any(isinstance(event, Finished) and event.request == number for event in events):
        # Four canvases' worth of newcomers each tick: a pass takes eight, so at most half wait their turn.
        for seed in range(2):
            engine.add(request(5, 1000 * tick + seed, max_new_tokens=CANVAS, max_denoising_steps=4))
        events, tick = engine.tick(), tick + 1
        assert tick < 50 * expected
    assert tick <= 3 * expected
    assert engine.load.denoise_rows / engine.load.denoise_passes > 4


def test_the_load_counts_what_happened() -> None:
    engine = Engine(MODEL)
    shared = prompt(70)
    diffusion = [Request(prompt=shared, config=config(seed=seed, max_new_tokens=20)) for seed in range(2)]
    ar = Request(prompt=prompt(9), config=config(mode="ar", max_new_tokens=5, temperature=0.0))
    engine.add(diffusion[0])
    assert engine.load == Load(waiting=1)
    events = run(engine)
    for one in (diffusion[1], ar):
        engine.add(one)
    events += run(engine)
    load = engine.load
    committed = [event for event in events if isinstance(event, Committed)]
    canvases = [event for event in committed if event.stop != "ar"]
    assert (load.waiting, load.running, load.kv_reserved, load.kv_limit) == (0, 0, 0, 0)
    assert (load.admitted, load.prompt_tokens) == (3, 149)
    assert load.committed_tokens == sum(len(tokens(events, number)) for number in (1, 2, 3))
    assert load.canvases == len(canvases) > 0
    assert load.canvas_steps == sum(event.steps for event in canvases) == load.denoise_rows
    # A prompt of three chunks shares nothing here: each request was in one pass with its prompt and one per commit.
    assert load.encode_rows == sum(1 + end(events, number).encode_passes for number in (1, 2, 3))
    assert (load.prefix_hits, load.prefix_misses, load.prefix_reused_tokens) == (1, 2, 64)
    assert load.prefix_tokens == engine.prefixes.tokens >= 64
    assert load.denoised_tokens == engine.counters.denoised_tokens


def test_rows_per_pass_is_the_batch() -> None:
    engine = Engine(MODEL, NO_REUSE)
    same = [request(12, 3, max_new_tokens=CANVAS) for _ in range(5)]
    run(engine, same)
    load = engine.load
    assert load.denoise_rows == 5 * load.denoise_passes
    assert (load.encode_rows, load.encode_passes) == (5, 1)


def test_every_count_of_the_parts_is_in_the_load() -> None:
    names = {field.name for field in fields(Load)}
    assert {field.name for field in (*fields(Totals), *fields(Counters))} <= names


def test_the_load_may_be_read_while_the_engine_ticks() -> None:
    engine = Engine(MODEL, NO_REUSE)
    for seed in range(12):
        engine.add(request(10, seed, max_new_tokens=24))
    seen: list[Load] = []
    faults: list[BaseException] = []
    over = threading.Event()

    def read() -> None:
        try:
            while not over.is_set():
                seen.append(engine.load)
        except BaseException as error:
            faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    run(engine)
    over.set()
    reader.join()
    assert not faults
    steps = [load.denoise_rows for load in seen]
    assert steps == sorted(steps)
    # Of one moment: a committed canvas took its steps before.
    assert all(load.canvas_steps <= load.denoise_rows and load.running <= 12 for load in seen)
