"""Places in a batch: first come first served, within limits, nobody starved."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from engine_kit import CANVAS, request, run, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.cache import KVCache
from dgemma.config import EngineConfig
from dgemma.engine import Engine
from dgemma.engine.request import State
from dgemma.engine.scheduler import chunk, plan_denoise, plan_encode
from dgemma.events import Finished

MODEL = tiny_model()


def state(number: int, width: int, prompt: int, done: bool) -> State:
    """A request with all of its prompt encoded, or none of it."""
    cache = KVCache(tiny_config(), torch.device("cpu"), torch.float32, 64)
    cache.advance(prompt if done else 0)
    item = request(prompt, seed=number, canvas_length=width)
    return State(number, item, cache, list(item.prompt), turn=number)


requests_in_play = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=9)


@settings(max_examples=50, deadline=None)
@given(requests_in_play, st.integers(1, 90))
def test_everyone_is_served_in_turn_within_the_limit(sizes: list[tuple[int, int]], limit: int) -> None:
    config, model = EngineConfig(max_batch_tokens=limit, encode_chunk=30), tiny_config()
    for kind in ("encode", "denoise"):
        states = [state(i, width, prompt, kind == "denoise") for i, (width, prompt) in enumerate(sizes)]
        counts = [0] * len(states)
        turn = count(len(sizes))
        for _ in range(40):
            if kind == "encode":
                chosen, size = plan_encode(states, config), lambda s: chunk(s, config)
            else:
                chosen, size = plan_denoise(states, model, config), lambda s: s.config.canvas_length
            assert chosen and len({s.id for s in chosen}) == len(chosen)
            assert len(chosen) == 1 or sum(map(size, chosen)) <= limit
            for item in chosen:
                item.turn = next(turn)
                counts[item.id] += 1
            assert max(counts) - min(counts) <= 1


def test_plans_take_only_who_is_ready() -> None:
    ready, pending = state(0, 8, 5, True), state(1, 8, 5, False)
    ar = State(2, request(5, mode="ar"), pending.cache, list(request(5).prompt), turn=2)
    config = EngineConfig()
    assert plan_encode([ready, pending, ar], config) == [pending, ar]
    assert plan_denoise([ready, pending, ar], tiny_config(), config) == [ready]


def test_long_prompts_are_encoded_beside_running_canvases() -> None:
    engine = Engine(MODEL, EngineConfig(encode_chunk=10))
    engine.add(request(3, seed=1, max_denoising_steps=6, confidence_threshold=None, max_new_tokens=CANVAS))
    engine.add(request(95, seed=2, max_denoising_steps=1, max_new_tokens=CANVAS))
    ends = {e.request: tick for tick in range(12) for e in engine.tick() if isinstance(e, Finished)}
    assert ends == {1: 5, 2: 9}
    assert engine.counters.encode_passes == 10


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_no_more_rows_run_than_allowed_and_in_order(rows: int) -> None:
    engine = Engine(MODEL, EngineConfig(max_batch_rows=rows))
    for seed in range(6):
        engine.add(request(3, seed=seed, max_denoising_steps=2, max_new_tokens=CANVAS, confidence_threshold=None))
    events, most = [], 0
    while engine.has_work:
        events += engine.tick()
        most = max(most, len(engine._running))
    assert most <= rows
    assert [e.request for e in events if isinstance(e, Finished)] == [1, 2, 3, 4, 5, 6]


def test_an_idle_engine_does_nothing() -> None:
    engine = Engine(MODEL)
    assert engine.tick() == [] and not engine.has_work
    run(engine, [request(3)])
    passes = engine.counters
    assert engine.tick() == [] and engine.counters == passes
