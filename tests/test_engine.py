"""The engine as a whole: a batch equals its singles, forwards are shared, requests join, leave and abort freely."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, VOCAB, end, of, request, run, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request
from dgemma.events import Event, Finished

MODEL = tiny_model()

MIXED = [
    request(3, seed=1, watch=True),
    request(17, seed=2, watch=True, canvas_length=4, max_new_tokens=14),
    request(1, seed=3, watch=True, canvas_length=16, sampler="ancestral", max_denoising_steps=5),
    request(9, seed=4, watch=True, canvas_length=11, sampler="confidence", accept_confidence=0.4),
    request(6, seed=5, watch=True, convention="jax", t_max=0.5, entropy_bound=1.0),
    request(30, seed=6, watch=True, temperature=0.0, stop_tokens=tuple(range(0, VOCAB, 9))),
    request(5, seed=7, watch=True, top_k=3, temperature=1.7, confidence_threshold=None),
    request(12, seed=8, mode="ar", temperature=0.0),
    request(2, seed=9, mode="ar", top_k=5, stop_tokens=tuple(range(0, VOCAB, 9))),
    request(40, seed=10, mode="ar", top_p=0.7, temperature=1.5, max_new_tokens=9),
]


@functools.cache
def singles(settings: EngineConfig = NO_REUSE) -> list[list[Event]]:
    """What each request of MIXED gets alone."""
    return [run(Engine(MODEL, settings), [item]) for item in MIXED]


def assert_equal(events: list[Event], expected: list[list[Event]]) -> None:
    for number, own in enumerate(expected, start=1):
        assert of(events, number) == own, f"request {number}"


def test_a_batch_equals_its_singles_bit_for_bit() -> None:
    events = run(Engine(MODEL, NO_REUSE), MIXED)
    assert_equal(events, singles())


def test_joining_at_any_tick_changes_nothing() -> None:
    joins = {tick: MIXED[i] for i, tick in enumerate([0, 2, 3, 5, 8, 9, 13, 14, 20, 31])}
    events = run(Engine(MODEL, NO_REUSE), joins=joins)
    assert_equal(events, singles())


@pytest.mark.parametrize(
    "limits",
    [
        EngineConfig(prefix_cache_tokens=0, max_batch_rows=1),
        EngineConfig(prefix_cache_tokens=0, max_batch_rows=3),
        EngineConfig(prefix_cache_tokens=0, max_batch_tokens=1),
        EngineConfig(prefix_cache_tokens=0, max_batch_tokens=20),
    ],
)
def test_batch_limits_change_nothing(limits: EngineConfig) -> None:
    events = run(Engine(MODEL, limits), MIXED)
    assert_equal(events, singles())


def test_chunked_encoding_is_a_property_of_the_request() -> None:
    chunked = EngineConfig(prefix_cache_tokens=0, encode_chunk=5)
    events = run(Engine(MODEL, chunked), MIXED)
    assert_equal(events, singles(chunked))


def test_chunked_encoding_gives_the_same_tokens() -> None:
    model = tiny_model(torch.float64)
    whole = run(Engine(model, NO_REUSE), MIXED)
    chunked = run(Engine(model, EngineConfig(prefix_cache_tokens=0, encode_chunk=3)), MIXED)
    for number in range(1, len(MIXED) + 1):
        assert tokens(whole, number) == tokens(chunked, number)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_run(dtype: torch.dtype) -> None:
    events = run(Engine(tiny_model(dtype), NO_REUSE), MIXED)
    assert sum(isinstance(e, Finished) for e in events) == len(MIXED)


# -- forwards ------------------------------------------------------------------------


def fixed(length: int, seed: int, steps: int, canvases: int, **changes: object) -> Request:
    """Exactly `steps` steps for each of `canvases` canvases."""
    return request(
        length, seed=seed, max_denoising_steps=steps, confidence_threshold=None,
        max_new_tokens=canvases * CANVAS, **changes,
    )  # fmt: skip


def test_overlapping_requests_share_their_forwards() -> None:
    engine = Engine(MODEL, NO_REUSE)
    run(engine, [fixed(4, 1, steps=3, canvases=2), fixed(9, 2, steps=7, canvases=1), fixed(2, 3, steps=5, canvases=3)])
    # The longest needs 15 steps; the others ride along. Encodes: all prompts at once, then 1, and 2 of the third.
    assert engine.counters.denoise_passes == 15
    assert engine.counters.denoised_tokens == (6 + 7 + 15) * CANVAS
    assert engine.counters.encode_passes == 4
    assert engine.counters.encoded_tokens == 4 + 9 + 2 + (1 + 0 + 2) * CANVAS


def test_a_late_request_shares_what_overlaps() -> None:
    engine = Engine(MODEL, NO_REUSE)
    run(engine, joins={0: fixed(4, 1, steps=10, canvases=1), 6: fixed(4, 2, steps=10, canvases=1)})
    assert engine.counters.denoise_passes == 16


@pytest.mark.parametrize("canvases", [1, 2, 4])
def test_the_last_canvas_is_never_encoded(canvases: int) -> None:
    engine = Engine(MODEL, NO_REUSE)
    events = run(engine, [fixed(5, 1, steps=2, canvases=canvases)])
    assert engine.counters.encoded_tokens == 5 + (canvases - 1) * CANVAS
    assert end(events).encode_passes == canvases - 1
    assert end(events).steps == (2,) * canvases


def test_a_canvas_that_ends_the_answer_is_not_encoded() -> None:
    engine = Engine(MODEL, NO_REUSE)
    events = run(engine, [fixed(5, 1, steps=2, canvases=4, stop_tokens=tuple(range(VOCAB)))])
    assert engine.counters.encoded_tokens == 5 and engine.counters.denoise_passes == 2
    assert end(events).reason == "stop" and end(events).completion_tokens == 1


def test_ar_encodes_one_token_each_pass_and_shares_it() -> None:
    engine = Engine(MODEL, NO_REUSE)
    run(engine, [request(7, seed=s, mode="ar", max_new_tokens=10) for s in range(3)])
    assert engine.counters.encode_passes == 10 and engine.counters.denoise_passes == 0
    assert engine.counters.encoded_tokens == 3 * (7 + 9)


def test_ar_and_diffusion_share_encodes() -> None:
    engine = Engine(MODEL, NO_REUSE)
    run(engine, [request(7, seed=1, mode="ar", max_new_tokens=10), fixed(4, 2, steps=2, canvases=4)])
    assert engine.counters.encode_passes == 10 and engine.counters.denoise_passes == 8


def test_a_canvas_is_committed_in_the_tick_it_stops() -> None:
    engine = Engine(MODEL, NO_REUSE)
    engine.add(fixed(4, 1, steps=3, canvases=2))
    engine.add(fixed(4, 2, steps=9, canvases=1))
    kinds = [[type(e).__name__ for e in engine.tick()] for _ in range(6)]
    assert kinds == [[], [], ["Committed"], [], [], ["Committed", "Finished"]]


# -- aborting ------------------------------------------------------------------------


FEW = [0, 1, 4, 7]


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.integers(1, len(FEW)), st.integers(0, 30), max_size=3))
def test_aborting_at_any_step_leaves_the_others_unchanged(aborts: dict[int, int]) -> None:
    engine = Engine(MODEL, NO_REUSE)
    for index in FEW:
        engine.add(MIXED[index])
    events, tick, last = [], 0, {}
    while engine.has_work:
        for number, when in aborts.items():
            if when == tick:
                last[number] = engine.abort(number)
        events += engine.tick()
        tick += 1
    for number, index in enumerate(FEW, start=1):
        got, own = of(events, number), singles()[index]
        if last.get(number) is None:
            assert got == own
        else:
            assert last[number].reason == "abort" and got == own[: len(got)]
            assert last[number].completion_tokens == len(tokens(events, number))
    assert not engine._running and not engine._waiting


def test_aborting_what_waits_or_is_gone() -> None:
    engine = Engine(MODEL, EngineConfig(max_batch_rows=1))
    engine.add(request(4, seed=1))
    second = engine.add(request(4, seed=2))
    engine.tick()
    gone = engine.abort(second)
    assert gone is not None and gone.reason == "abort" and gone.completion_tokens == 0
    assert engine.abort(second) is None and engine.abort(99) is None
    events = run(engine)
    assert {e.request for e in events} == {1}
    assert engine.abort(1) is None


# -- memory --------------------------------------------------------------------------


def live_bytes() -> int:
    """Bytes of every storage that some tensor holds."""
    gc.collect()
    stores = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_mkldnn:  # packed weights have no storage to ask
            store = thing.untyped_storage()
            stores[store.data_ptr()] = store.nbytes()
    return sum(stores.values())


def test_memory_stays_flat_over_many_requests() -> None:
    engine = Engine(MODEL, EngineConfig(prefix_cache_tokens=100))
    sizes = []
    for round_ in range(10):
        items = [
            request(5 + i % 7, seed=20 * round_ + i, reuse=i % 2 == 0, mode="ar" if i % 5 == 0 else "diffusion",
                    max_new_tokens=6, max_denoising_steps=2)
            for i in range(20)
        ]  # fmt: skip
        run(engine, items)
        sizes.append(live_bytes())
        assert engine.prefixes.tokens <= 100
    assert max(sizes[3:]) <= sizes[2] + 20_000, sizes
    assert not engine._running and not engine._waiting
