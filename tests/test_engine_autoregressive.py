"""Mode "ar" against the slow obvious loop, and its draws against the law they promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from chance import SURE, fits
from engine_kit import NO_REUSE, VOCAB, config, prompt, request, run, tiny_model, tokens
from naive import NaiveCache, encode

from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request, token_logprobs
from dgemma.engine.autoregressive import next_tokens

EXACT = tiny_model(torch.float64)


def naive_logits(ids: list[int]) -> torch.Tensor:
    """Logits `[T, V]` of a whole sequence in one pass, without the engine."""
    return EXACT.logits(encode(EXACT, NaiveCache(EXACT.config), torch.tensor(ids)))


@pytest.mark.parametrize("length", [1, 5, 6, 7, 20])
def test_greedy_equals_the_argmax_of_full_passes(length: int) -> None:
    ids = list(prompt(length))
    for _ in range(12):
        ids.append(int(naive_logits(ids)[-1].argmax()))
    answer = tokens(run(Engine(EXACT, NO_REUSE), [request(length, mode="ar", temperature=0.0, max_new_tokens=12)]))
    assert answer == ids[length:]


def test_greedy_ignores_the_seed_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [90, 17, 40]] = 2.0
    greedy = [config(temperature=0.0, seed=seed) for seed in (1, 2)]
    assert next_tokens(logits, greedy, [3, 4]) == [17, 0]
    mixed = [config(temperature=0.0), config(temperature=1.0)]
    assert next_tokens(logits.flip(0), mixed, [3, 4])[0] == 0


@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 20, "top_p": 0.8}]
)
def test_draws_follow_the_shaped_distribution(shape: dict[str, float]) -> None:
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    chosen = config(seed=5, **shape)
    counts = torch.zeros(VOCAB)
    for start in range(0, 20_000, 1000):
        positions = list(range(start, start + 1000))
        drawn = next_tokens(logits.expand(1000, -1), [chosen] * 1000, positions)
        counts += torch.bincount(torch.tensor(drawn), minlength=VOCAB)
    assert fits(counts, expected_law(logits, chosen.temperature, chosen.top_k, chosen.top_p)) > SURE
    assert fits(counts, torch.softmax(logits / 1.3, dim=-1)) < SURE


def expected_law(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """By plain lists: keep the top_k, then the fewest that reach top_p, then renormalise."""
    probs = torch.softmax(logits.double() / temperature, dim=-1).tolist()
    ranked = sorted(range(VOCAB), key=lambda token: -probs[token])[: top_k or VOCAB]
    total, kept, reached = math.fsum(probs[t] for t in ranked), [], 0.0
    for token in ranked:
        if reached < top_p:
            kept.append(token)
        reached += probs[token] / total
    return torch.tensor([probs[t] if t in kept else 0.0 for t in range(VOCAB)])


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    logits = torch.zeros(3, VOCAB)
    configs = [config(seed=1), config(seed=2), config(seed=1, choice=1)]
    together = next_tokens(logits, configs, [4, 4, 4])
    assert together == [next_tokens(logits[:1], [c], [4])[0] for c in configs]
    assert len(set(together)) > 1
    assert next_tokens(logits[:1], configs[:1], [5]) != together[:1]


def test_an_answer_goes_on_the_same_from_any_of_its_tokens() -> None:
    settings = config(mode="ar", max_new_tokens=12, seed=4)
    whole = tokens(run(Engine(EXACT, NO_REUSE), [Request(prompt=prompt(5), config=settings)]))
    for cut in (1, 7):
        later = Request(prompt=(*prompt(5), *whole[:cut]), config=settings.with_(max_new_tokens=12 - cut))
        assert tokens(run(Engine(EXACT, NO_REUSE), [later])) == whole[cut:]


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("given", [1, 6, 29])
def test_log_probabilities_equal_a_full_pass(chunk: int, given: int) -> None:
    ids = list(prompt(30))
    expected = torch.log_softmax(naive_logits(ids[:-1]), dim=-1)
    engine = Engine(EXACT, EngineConfig(encode_chunk=chunk))
    got = token_logprobs(engine, ids, given)
    assert got == pytest.approx([float(expected[i - 1, ids[i]]) for i in range(given, 30)], abs=1e-5)
    assert engine.counters.encoded_tokens == 29


@pytest.mark.parametrize(("chunk", "length"), [(512, 100), (72, 100), (64, 64), (20, 50)])
def test_log_probabilities_are_of_the_states_that_the_engine_has(
    chunk: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same cuts, the same bits: in float32, where a pass of another length may round otherwise."""
    engine = Engine(tiny_model(), EngineConfig(prefix_cache_tokens=0, encode_chunk=chunk))
    encode, passes = engine.runner.encode, []

    def seen(jobs: list[tuple[Any, Sequence[int]]]) -> list[torch.Tensor]:
        starts = [cache.length for cache, _ in jobs]
        hidden = encode(jobs)
        passes.append((starts, hidden))
        return hidden

    monkeypatch.setattr(engine.runner, "encode", seen)
    ids = [*prompt(length), 7]
    run(engine, [Request(prompt=tuple(ids[:-1]), config=config(mode="ar", max_new_tokens=1))])
    own, passes = passes, []
    token_logprobs(engine, ids, 1)
    assert [starts for starts, _ in passes] == [starts for starts, _ in own]
    assert sum(len(starts) for starts, _ in own) > 1
    for (_, mine), (_, wanted) in zip(passes, own, strict=True):
        assert all(map(torch.equal, mine, wanted))
