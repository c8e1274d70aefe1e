"""Constraints in the engine: every answer fits, whatever the model thinks, across canvases and at the budget's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import CANVAS, VOCAB, config, end, of, prompt, run, tiny_model, tokens

from dgemma.control import Control
from dgemma.control.language.automaton import compile_tokens
from dgemma.control.language.machine import Machine
from dgemma.control.language.regex import compile_regex
from dgemma.control.language.vocabulary import Vocabulary
from dgemma.engine import Engine, Request
from dgemma.errors import RequestError
from dgemma.events import Committed, Draft

STOP, PAD = (1, 2), 0
PIECES: list[bytes | None] = [
    None,
    None,
    None,
    *(bytes([65 + i]) for i in range(26)),
    *(bytes([48 + i]) for i in range(10)),
]
PIECES += [left + right for left in (b"A", b"B", b"7") for right in (b"A", b"B", b"0")]
WORDS = Vocabulary.of(PIECES, VOCAB)


def machine(pattern: str, banned: Sequence[int] = (), stop: Sequence[int] = STOP) -> Machine:
    return Machine.of(compile_tokens(compile_regex(pattern), WORDS), stop, PAD, banned)


def ask(pattern: str, length: int = 5, seed: int = 0, watch: bool = False, **changes: Any) -> Request:
    own = config(seed=seed, stop_tokens=STOP, pad_token=PAD, **changes)
    control = Control(constraint=machine(pattern, sorted(own.banned)))
    return Request(prompt=prompt(length, seed), config=own, control=control, watch=watch)


def spelled(ids: Sequence[int]) -> str:
    assert ids[-1] in STOP and not set(ids[:-1]) & {*STOP, PAD}
    return b"".join(PIECES[token] or b"?" for token in ids[:-1]).decode()


@pytest.mark.parametrize("pattern", ["[AB]{3,30}", "(AB|BA)*7", "A{19}", "[A-Z]+[0-9]{2,4}", "7?", "(CAT|DOG|A{17})"])
@pytest.mark.parametrize("sampler", ["entropy_bound", "confidence", "ancestral"])
def test_every_answer_fits_across_canvases(pattern: str, sampler: str) -> None:
    text = compile_regex(pattern)
    engine = Engine(tiny_model())
    requests = [ask(pattern, seed=seed, sampler=sampler, max_new_tokens=20) for seed in range(4)]
    events = run(engine, requests)
    for number in range(1, 5):
        got = tokens(events, number)
        assert text.matches(spelled(got).encode())
        assert end(events, number).reason == "stop" and len(got) <= 20


def test_the_least_budget_is_enough_and_one_less_is_refused() -> None:
    engine = Engine(tiny_model())
    needed = machine("C{9}D{8}").least
    assert needed == 18
    events = run(engine, [ask("C{9}D{8}", max_new_tokens=needed)])
    assert spelled(tokens(events)) == "C" * 9 + "D" * 8 and end(events).reason == "stop"
    with pytest.raises(RequestError, match=r"has 18 tokens.*max_new_tokens is 17"):
        engine.add(ask("C{9}D{8}", max_new_tokens=17))


def test_a_batch_equals_its_singles() -> None:
    requests = [
        ask("[AB]{3,30}", seed=1, watch=True),
        ask("(CAT|DOG)+", seed=2, watch=True),
        ask("[0-9]{9}", seed=3, watch=True),
    ]
    plain = Request(prompt=prompt(6), config=config(seed=4), watch=True)
    together = run(Engine(tiny_model()), [*requests, plain])
    for number, request in enumerate([*requests, plain], 1):
        assert of(together, number) == of(run(Engine(tiny_model()), [request]), 1)


def test_a_constraint_that_allows_everything_changes_no_token() -> None:
    """All tokens with bytes, any order: the only difference to a run with the same tokens banned is the end."""
    stop = (1,)
    free = config(seed=3, stop_tokens=stop, pad_token=PAD, max_new_tokens=64, temperature=0.0)
    events = run(
        Engine(tiny_model()),
        [replace(ask("[^!]*", seed=3, watch=True, max_new_tokens=64), config=replace(free, stop_tokens=STOP))],
    )
    first = next(event for event in events if isinstance(event, Draft))
    banned = tuple((token, -100.0) for token in range(VOCAB) if token >= len(PIECES))
    unbound = run(
        Engine(tiny_model()),
        [Request(prompt=prompt(5, 3), config=replace(free, stop_tokens=(), logit_bias=banned), watch=True)],
    )
    other = next(event for event in unbound if isinstance(event, Draft))
    inside = [i for i, token in enumerate(first.tokens) if token > 2]
    assert inside and [first.tokens[i] for i in inside] == [other.tokens[i] for i in inside]


def test_each_step_follows_a_path_of_states() -> None:
    pattern = "(CAT|DOG){4}7"
    events = run(Engine(tiny_model()), [ask(pattern, seed=5, watch=True)])
    made = machine(pattern)
    drafts = [event for event in events if isinstance(event, Draft)]
    answer: list[int] = []
    for event in events:
        if isinstance(event, Committed):
            answer += event.tokens
        if isinstance(event, Draft):
            assert len(event.states) == CANVAS + 1
            state = made.advance(0, answer)
            assert event.states[0] == state
            for token, after in zip(event.tokens, event.states[1:], strict=True):
                state = made.advance(state, [token])
                assert state == after
    assert len(drafts) > 2


def test_accepted_draws_come_from_one_allowed_path() -> None:
    """With a budget that accepts all, what the next step reads is itself an answer: draws are joint, not one by one."""
    text = compile_regex("(AB|CD|EF|7A)*")
    for seed in range(6):
        events = run(
            Engine(tiny_model()), [ask("(AB|CD|EF|7A)*", seed=seed, watch=True, entropy_bound=1e9, max_new_tokens=8)]
        )
        draft = next(event for event in events if isinstance(event, Draft))
        assert all(draft.accepted)
        ids = list(draft.canvas_tokens)
        ids = ids[: 1 + min(ids.index(s) for s in STOP if s in ids)]
        assert text.matches(spelled(ids).encode())


def test_bans_and_settings_that_leave_no_answer_are_refused() -> None:
    a, aa = 3, next(i for i, piece in enumerate(PIECES) if piece == b"AA")
    with pytest.raises(RequestError, match="the 2 tokens that logit_bias bans leave it none"):
        machine("A+", [a, aa])
    assert machine("AA", [a]).least == 2 and machine("AA", [aa]).least == 3
    with pytest.raises(RequestError, match="bans all end tokens"):
        machine("A", STOP)
    with pytest.raises(RequestError, match="needs an end token"):
        machine("A", stop=())
    with pytest.raises(RequestError, match="no answer that this vocabulary can spell"):
        machine("a")
    engine = Engine(tiny_model())
    good = ask("A+")
    for changes, message in (
        ({"mode": "ar"}, 'needs mode "diffusion", got mode "ar"'),
        ({"convention": "jax"}, 'needs convention "hf"'),
        ({"top_k": 3}, "top_k cannot be combined with a constraint"),
        ({"top_p": 0.9}, "top_p cannot be combined with a constraint"),
        ({"logit_bias": ((3, -100.0),)}, "made for other banned tokens"),
        ({"stop_tokens": (1,)}, "made for other end tokens"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.add(replace(good, config=replace(good.config, **changes)))
    for control in ({"pins": ((0, 5),)}, {"draft": (5,)}):
        with pytest.raises(RequestError, match="a constraint cannot be combined"):
            engine.add(replace(good, control=replace(good.control, **control)))


def test_banned_tokens_are_in_no_constrained_answer() -> None:
    banned = {token: -100.0 for token in range(3, 16)}
    for seed in range(3):
        events = run(Engine(tiny_model()), [ask("[A-Z]{4,9}", seed=seed, logit_bias=tuple(banned.items()))])
        assert not set(tokens(events)) & set(banned)


FLAT: dict[str, Any] = {"t_min": 3.0, "t_max": 8.0}  # of thirty equal tokens none stands out


def test_a_model_that_knows_nothing_still_gives_an_answer_that_fits() -> None:
    text = compile_regex("(AB|CD|EF|7A)*G")
    requests = [ask("(AB|CD|EF|7A)*G", seed=seed, **FLAT) for seed in range(6)]
    events = run(Engine(tiny_model()), requests)
    answers = [spelled(tokens(events, number)) for number in range(1, 7)]
    assert all(text.matches(answer.encode()) for answer in answers)
    assert {event.stop for event in events if isinstance(event, Committed)} == {"cap"}


def first_draft(engine: Engine, request: Request) -> Draft:
    return next(event for event in run(engine, [request]) if isinstance(event, Draft))


@pytest.mark.parametrize("heat", [0.0, 1e-3, 1.0, 5.0])
def test_the_temperature_scales_the_joint_draw(heat: float) -> None:
    """At 0 it is the most likely path, close to 0 nearly always; the prediction itself stays as it is."""
    alike, engine = 0, Engine(tiny_model())
    short: dict[str, Any] = {"max_denoising_steps": 1, "max_new_tokens": CANVAS}
    for seed in range(6):
        made = ask("(AB|CD|EF|7A)*G", seed=seed, watch=True, temperature=heat, entropy_bound=1e9, **FLAT, **short)
        draft = first_draft(engine, made)
        plain = replace(made, config=replace(made.config, temperature=1.0))
        usual = first_draft(engine, plain)
        assert draft.tokens == usual.tokens and draft.entropy == usual.entropy
        alike += draft.tokens == draft.canvas_tokens
    assert alike == 6 if heat < 0.1 else alike < 3


def test_a_canvas_wider_than_the_budget_is_filled_up_behind_the_end() -> None:
    events = run(Engine(tiny_model()), [ask("A{2}", seed=1, watch=True, max_new_tokens=3)])
    last = [event for event in events if isinstance(event, Draft)][-1]
    assert len(last.tokens) == CANVAS and set(last.tokens[3:]) <= {*STOP, PAD}


def test_the_raw_signal_is_another_signal() -> None:
    made = ask("[A-Z]{4,9}", seed=2, watch=True)
    assert made.control.constraint is not None
    raw = replace(made, control=Control(constraint=replace(made.control.constraint, raw_signal=True)))  # type: ignore[type-var]
    with_raw, without = run(Engine(tiny_model()), [raw]), run(Engine(tiny_model()), [made])
    assert with_raw[0] == without[0] and with_raw[1] != without[1]


def test_the_constraint_works_in_bfloat16() -> None:
    events = run(Engine(tiny_model(torch.bfloat16)), [ask("(CAT|DOG)+7", seed=1)])
    assert compile_regex("(CAT|DOG)+7").matches(spelled(tokens(events)).encode())
