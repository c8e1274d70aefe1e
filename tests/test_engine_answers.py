"""What one request gets: its events, its budget and end, and errors that say what is allowed."""

from __future__ import annotations

import pytest
from engine_kit import CANVAS, NO_REUSE, VOCAB, config, end, of, prompt, request, run, tiny_model, tokens

from dgemma.config import EngineConfig
from dgemma.engine import Engine, Request
from dgemma.errors import CapacityError, ConfigError, RequestError
from dgemma.events import Committed, Draft

MODEL = tiny_model()


def test_drafts_only_for_who_watches() -> None:
    watched, not_watched = (run(Engine(MODEL, NO_REUSE), [request(5, seed=1, watch=watch)]) for watch in (True, False))
    assert not any(isinstance(e, Draft) for e in not_watched)
    assert [e for e in watched if not isinstance(e, Draft)] == not_watched
    drafts = [e for e in watched if isinstance(e, Draft)]
    assert len(drafts) == sum(end(watched).steps)
    assert [d.step for d in drafts if d.canvas == 0] == list(range(1, end(watched).steps[0] + 1))


def test_a_draft_says_what_happened() -> None:
    events = run(Engine(MODEL, NO_REUSE), [request(5, seed=1, watch=True, canvas_length=7, confidence_threshold=None)])
    drafts = [e for e in events if isinstance(e, Draft)]
    for draft in drafts:
        assert len(draft.tokens) == len(draft.canvas_tokens) == len(draft.accepted) == len(draft.entropy) == 7
        assert any(draft.accepted) and min(draft.entropy) >= 0 and draft.max_steps == 10
        assert draft.temperature == pytest.approx(0.02 + 0.18 * (11 - draft.step) / 10)
    committed = [e for e in events if isinstance(e, Committed)]
    assert [d.tokens for d in drafts if d.step == 10] == [c.tokens for c in committed[:-1]] + [drafts[-1].tokens]


def test_the_conventions_commit_different_canvases() -> None:
    for convention in ("hf", "jax"):
        item = request(5, seed=1, watch=True, convention=convention, max_new_tokens=CANVAS, max_denoising_steps=3)
        events = run(Engine(MODEL, NO_REUSE), [item])
        last = [e for e in events if isinstance(e, Draft)][-1]
        assert tokens(events) == list(last.tokens if convention == "hf" else last.canvas_tokens)
        assert last.tokens != last.canvas_tokens


def test_answers_end_at_the_first_end_token_which_stays() -> None:
    free = tokens(run(Engine(MODEL, NO_REUSE), [request(5, seed=1, max_new_tokens=40)]))
    stop = free[13]
    events = run(Engine(MODEL, NO_REUSE), [request(5, seed=1, max_new_tokens=40, stop_tokens=(stop,))])
    assert tokens(events) == free[: free.index(stop) + 1]
    assert end(events).reason == "stop"


@pytest.mark.parametrize("budget", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_the_budget_is_exact(budget: int, mode: str) -> None:
    events = run(Engine(MODEL, NO_REUSE), [request(5, seed=1, max_new_tokens=budget, mode=mode)])
    assert len(tokens(events)) == end(events).completion_tokens == budget
    assert end(events).reason == "length"


def test_an_end_token_beyond_the_budget_does_not_count() -> None:
    free = tokens(run(Engine(MODEL, NO_REUSE), [request(5, seed=1, max_new_tokens=CANVAS)]))
    place = next(i for i in range(2, CANVAS) if free[i] not in free[:i])
    events = run(Engine(MODEL, NO_REUSE), [request(5, seed=1, max_new_tokens=place, stop_tokens=(free[place],))])
    assert tokens(events) == free[:place] and end(events).reason == "length"


def test_seed_and_choice_are_parts_of_the_key() -> None:
    base = Request(prompt=prompt(5), config=config(seed=1))
    answers = [
        tokens(run(Engine(MODEL, NO_REUSE), [Request(prompt=base.prompt, config=base.config.with_(**change))]))
        for mode in ("diffusion", "ar")
        for change in ({"mode": mode}, {"mode": mode, "seed": 2}, {"mode": mode, "choice": 1})
    ]
    assert len({tuple(answer) for answer in answers}) == 6


# -- limits and wrong requests -------------------------------------------------------


def test_a_full_engine_says_so() -> None:
    engine = Engine(MODEL, EngineConfig(max_requests=2))
    engine.add(request(4, seed=1))
    engine.add(request(4, seed=2))
    with pytest.raises(CapacityError, match="holds 2 requests and takes at most 2"):
        engine.add(request(4, seed=3))
    run(engine)
    engine.add(request(4, seed=3))


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        ((), {}, "prompt is empty"),
        ((3, VOCAB), {}, r"prompt token 1 is 128; .* ids 0\.\.127"),
        ((-1,), {}, r"prompt token 0 is -1"),
        ((3,) * 500, {"max_new_tokens": 16}, "need 516 positions; the model has 512"),
        ((3,) * 500, {"max_new_tokens": 9}, "need 516 positions"),
        ((3,) * 500, {"max_new_tokens": 13, "mode": "ar"}, "need 513 positions"),
        ((3,), {"canvas_length": 257}, "canvas_length must be at most 256 for this model, got 257"),
        ((3,), {"sampler": "gibbs"}, "unknown sampler 'gibbs'; known: entropy_bound"),
        ((3,), {"logit_bias": {VOCAB: 1.0}}, r"logit_bias names token 128; .* ids 0\.\.127"),
        ((3,), {"logit_bias": dict.fromkeys(range(VOCAB), -100)}, "logit_bias bans all 128 tokens"),
    ],
)
def test_wrong_requests_name_what_is_allowed(ids: tuple[int, ...], changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine(MODEL).add(Request(prompt=ids, config=config(**changes)))


def test_requests_at_the_limits_are_taken() -> None:
    events = run(Engine(MODEL), [Request(prompt=(3,) * 496, config=config(max_new_tokens=16, max_denoising_steps=1))])
    assert end(events).completion_tokens == 16
    events = run(Engine(MODEL), [request(3, canvas_length=256, max_new_tokens=256, max_denoising_steps=1)])
    assert end(events).completion_tokens == 256


def test_learned_canvas_positions_are_a_hard_limit() -> None:
    model = tiny_model(canvas_positions=12)
    with pytest.raises(RequestError, match="canvas_length must be at most 12"):
        Engine(model).add(request(3, canvas_length=13))
    items = [request(3, seed=s, canvas_length=c, watch=True) for s, c in enumerate([12, 5, 9])]
    events = run(Engine(model, NO_REUSE), items)
    for number, item in enumerate(items, start=1):
        assert of(events, number) == run(Engine(model, NO_REUSE), [item])


@pytest.mark.parametrize("field", ["max_batch_rows", "max_batch_tokens", "max_requests", "encode_chunk"])
def test_engine_limits_are_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a whole number of at least 1, got 0"):
        EngineConfig(**{field: 0})
