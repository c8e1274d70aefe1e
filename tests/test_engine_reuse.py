"""Turns of a conversation: the same tokens as a fresh run, with fewer encoded ones."""

from __future__ import annotations

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, config, end, prompt, run, tiny_model, tokens

from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request

EXACT = tiny_model(torch.float64)


def turn(ids: list[int], mode: str, seed: int = 0, reuse: bool = True, canvases: int = 3) -> Request:
    return Request(
        prompt=tuple(ids), reuse=reuse, config=config(mode=mode, seed=seed, max_new_tokens=canvases * CANVAS)
    )


@pytest.mark.parametrize("modes", [("diffusion",) * 3, ("ar",) * 3, ("ar", "diffusion", "ar")])
def test_later_turns_equal_fresh_runs_and_encode_less(modes: tuple[str, ...]) -> None:
    engine, ids, previous = Engine(EXACT), list(prompt(9)), []
    for number, mode in enumerate(modes):
        before = engine.counters.encoded_tokens
        events = run(engine, [turn(ids, mode, seed=number)])
        encoded = engine.counters.encoded_tokens - before
        fresh_engine = Engine(EXACT, NO_REUSE)
        fresh = run(fresh_engine, [turn(ids, mode, seed=number)])
        name = number + 1
        assert tokens(events, name) == tokens(fresh)
        cached = end(events, name).cached_tokens
        assert fresh_engine.counters.encoded_tokens == encoded + cached
        assert (cached == 0) == (number == 0)
        assert cached >= len(previous)  # at least the whole of the previous prompt
        previous = ids
        ids = ids + tokens(events, name) + list(prompt(4, seed=number + 1))


def test_an_answer_tokenised_otherwise_still_reuses_the_prompt() -> None:
    engine, first = Engine(EXACT), list(prompt(9))
    answer = tokens(run(engine, [turn(first, "diffusion")]))
    other = [*first, *answer[:5], 3, *answer[5:]]
    events = run(engine, [turn(other, "diffusion")])
    assert end(events, 2).cached_tokens == len(first) + 5
    assert tokens(events, 2) == tokens(run(Engine(EXACT, NO_REUSE), [turn(other, "diffusion")]))


@pytest.mark.parametrize(("mode", "cached"), [("diffusion", 9), ("ar", 8)])
def test_the_same_prompt_again_leaves_ar_one_token_to_encode(mode: str, cached: int) -> None:
    engine, ids = Engine(EXACT), list(prompt(9))
    first = run(engine, [turn(ids, mode)])
    again = run(engine, [turn(ids, mode)])
    assert end(again, 2).cached_tokens == cached
    assert tokens(again, 2) == tokens(first)


def test_requests_that_do_not_ask_neither_take_nor_leave() -> None:
    engine, ids = Engine(EXACT), list(prompt(9))
    run(engine, [turn(ids, "diffusion", reuse=False)])
    assert engine.prefixes.tokens == 0
    run(engine, [turn(ids, "diffusion")])
    events = run(engine, [turn(ids, "diffusion", reuse=False)])
    assert end(events, 3).cached_tokens == 0


def test_an_aborted_turn_keeps_what_it_encoded() -> None:
    engine, ids = Engine(EXACT), list(prompt(30))
    number = engine.add(turn(ids, "diffusion"))
    engine.tick()
    assert engine.abort(number) is not None
    events = run(engine, [turn([*ids, 5, 6], "diffusion")])
    assert end(events, 2).cached_tokens == 30


def test_conversations_side_by_side_do_not_mix() -> None:
    engine = Engine(EXACT, EngineConfig(prefix_cache_tokens=200))
    talks = [list(prompt(7 + i, seed=i)) for i in range(3)]
    name = 0
    for number in range(3):
        events = run(engine, [turn(ids, "diffusion", seed=number, canvases=2) for ids in talks])
        for i, ids in enumerate(talks):
            name += 1
            fresh = run(Engine(EXACT, NO_REUSE), [turn(ids, "diffusion", seed=number, canvases=2)])
            assert tokens(events, name) == tokens(fresh)
            talks[i] = ids + tokens(events, name) + [3 + number]
        assert engine.prefixes.tokens <= 200
