"""Hooks: what they see is a copy, what they demand holds from then on, and their faults are their own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from engine_kit import APART, CANVAS, NO_REUSE, VOCAB, config, of, prompt, request, run, tiny_model, tokens

from dgemma.api import LLM
from dgemma.control import Control, StepView
from dgemma.control.hooks import StepTensors
from dgemma.engine import Engine, Request
from dgemma.errors import RequestError
from dgemma.events import Committed, Draft, Event, Finished

MODEL = tiny_model()
SAMPLERS = ["entropy_bound", "confidence", "ancestral"]


def asked(hook: Callable[[StepView], object] | None, length: int = 9, **changes: object) -> Request:
    pins = changes.pop("pins", ())
    bans = changes.pop("bans", ())
    control = Control(hook=hook, pins=pins, bans=bans)  # type: ignore[arg-type]
    return Request(prompt=prompt(length), config=config(**changes), watch=True, control=control)


def events_of(item: Request) -> list[Event]:
    return run(Engine(MODEL, NO_REUSE), [item])


def drafts(events: list[Event]) -> list[Draft]:
    return [event for event in events if isinstance(event, Draft)]


def at(step: int, canvas: int = 0) -> Callable[[StepView], bool]:
    return lambda view: (view.step, view.canvas) == (step, canvas)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("convention", ["hf", "jax"])
def test_a_hook_that_only_looks_changes_no_bit(sampler: str, convention: str) -> None:
    changes = {"sampler": sampler, "convention": convention, "stop_tokens": (1, 2), "seed": 3}
    plain = events_of(asked(None, **changes))
    seen: list[StepView] = []
    assert events_of(asked(lambda view: seen.append(view), **changes)) == plain
    for view, draft in zip(seen, drafts(plain), strict=True):
        assert (view.canvas, view.step, view.max_steps) == (draft.canvas, draft.step, draft.max_steps)
        assert (view.argmax, view.entropy, view.accepted) == (draft.tokens, draft.entropy, draft.accepted)
        assert view.mean_entropy == pytest.approx(sum(draft.entropy) / CANVAS)
        assert view.places == range(CANVAS * draft.canvas, CANVAS * draft.canvas + len(draft.tokens))
        held = zip(draft.accepted, draft.canvas_tokens, view.draw, strict=True)
        assert all(token == drawn for yes, token, drawn in held if yes)
    for view, draft in zip(seen[1:], drafts(plain), strict=False):
        if view.canvas == draft.canvas:
            assert view.ids == draft.canvas_tokens, "a step reads what the step before left"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pin_holds_from_then_on(sampler: str) -> None:
    def hook(view: StepView) -> None:
        if at(2)(view):
            view.pin(3, 77)
            view.pin(CANVAS + 1, 78)

    events = events_of(asked(hook, sampler=sampler, stop_tokens=(1,), max_new_tokens=2 * CANVAS))
    answer = tokens(events)
    assert answer[3] == 77 and answer[CANVAS + 1] == 78
    for draft in drafts(events):
        if draft.canvas == 0 and draft.step >= 2:
            assert draft.canvas_tokens[3] == 77 and not draft.accepted[3]
        if draft.canvas == 0 and draft.step >= 3:
            assert draft.tokens[3] == 77 and draft.entropy[3] == 0
        if draft.canvas == 1:
            assert draft.canvas_tokens[1] == draft.tokens[1] == 78


def test_a_pin_of_a_later_canvas_equals_one_in_the_request() -> None:
    """Nothing of the first canvas knows of it (there are no end tokens to ban), so both must agree in every bit."""
    place, changes = CANVAS + 2, {"max_new_tokens": 3 * CANVAS, "seed": 5}
    later = events_of(asked(lambda view: view.pin(place, 66) if at(1)(view) else None, **changes))
    before = events_of(asked(None, pins=((place, 66),), **changes))
    assert later == before != events_of(asked(None, **changes))


def test_a_pinned_position_signals_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = Engine(MODEL, APART), []
    real = engine.runner.denoise

    def watched(jobs: list, softs: list, draws: object) -> object:
        seen.append((jobs[0][1].clone(), None if softs[0] is None else softs[0].clone()))
        return real(jobs, softs, draws)

    monkeypatch.setattr(engine.runner, "denoise", watched)
    run(engine, [asked(lambda view: view.pin(2, 77) if at(1)(view) else None, max_new_tokens=CANVAS)])
    assert len(seen) > 2
    for ids, soft in seen[1:]:
        assert ids[2] == 77 and torch.equal(soft[2], MODEL.embed.weight[77])


def first_tokens(changes: dict, count: int = 6) -> list[int]:
    return tokens(events_of(asked(None, **changes)))[:count]


@pytest.mark.parametrize("convention", ["hf", "jax"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_ban_holds_at_all_later_steps(convention: str, everywhere: bool) -> None:
    changes = {"max_new_tokens": 2 * CANVAS, "seed": 2, "convention": convention}
    unwanted = first_tokens(changes)

    def hook(view: StepView) -> None:
        if at(1)(view):
            for place, token in enumerate(unwanted):
                view.ban(token, None if everywhere else place)

    seen: list[StepView] = []
    events = events_of(asked(lambda view: (hook(view), seen.append(view)), **changes))
    later = [view for view in seen if (view.canvas, view.step) > (0, 1)]
    assert len(later) > 2
    for view in later:
        for row in (view.argmax, view.draw):
            if everywhere:
                assert not set(row) & set(unwanted)
            elif view.canvas == 0:
                assert all(row[place] != token for place, token in enumerate(unwanted))
    answer = tokens(events)
    assert answer[: len(unwanted)] != unwanted
    assert not (everywhere and set(answer) & set(unwanted))


@pytest.mark.parametrize("act", ["ban", "ban at its place", "pin"])
@pytest.mark.parametrize("how", ["cap", "stop"])
def test_demands_of_the_deciding_step_are_in_the_answer(act: str, how: str) -> None:
    """No step is left to read them: a ban falls back to the next likeliest token, a pin is put in."""
    cap = 4
    banned: dict[int, int] = {}

    def hook(view: StepView) -> None:
        if view.step != cap:
            return
        for place, token in zip(view.places, view.argmax, strict=True):
            banned[place] = token
            if act == "pin":
                view.pin(place, (token + 1) % VOCAB)
            else:
                view.ban(token, place if "place" in act else None)
        if how == "stop":
            view.stop()

    steps = cap if how == "cap" else 10
    changes = {"max_new_tokens": CANVAS, "max_denoising_steps": steps, "stability_threshold": None}
    events = events_of(asked(hook, **changes))
    answer = tokens(events)
    assert len(answer) == CANVAS
    for place, token in banned.items():
        assert answer[place] != token
        if act == "pin":
            assert answer[place] == (token + 1) % VOCAB
        if act == "ban":
            assert answer[place] not in banned.values()
    (committed,) = [event for event in events if isinstance(event, Committed)]
    assert committed.stop == ("hook" if how == "stop" else "cap") and committed.steps == cap


def test_the_fall_back_of_a_ban_is_the_next_likeliest() -> None:
    """The same step with the ban in the request from the start of that step on: compare with a ban one step earlier
    in a canvas of one step."""
    one = {"max_new_tokens": CANVAS, "max_denoising_steps": 1, "stability_threshold": None}
    token = first_tokens(one, 1)[0]
    late = events_of(asked(lambda view: view.ban(token), **one))
    early = events_of(asked(None, bans=((token, None),), **one))
    assert tokens(late) == tokens(early) and token not in tokens(early)


def test_a_step_with_a_new_pin_is_no_rest() -> None:
    """It may not end the canvas: the rest of it shall read the pin. The same pin again does not keep it going."""
    changes = {"max_new_tokens": CANVAS, "seed": 1}
    plain = events_of(asked(None, **changes))
    (committed,) = [event for event in plain if isinstance(event, Committed)]
    assert committed.stop == "stable"
    last = committed.steps
    events = events_of(asked(lambda view: view.pin(0, 99) if view.step >= last else None, **changes))
    (longer,) = [event for event in events if isinstance(event, Committed)]
    assert longer.steps > last and longer.tokens[0] == 99 and longer.stop == "stable"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_accepted_tokens_are_read_in_the_next_step_and_only_there(sampler: str) -> None:
    reads: dict[int, tuple[int, ...]] = {}
    draws: dict[int, tuple[int, ...]] = {}

    def hook(view: StepView) -> None:
        reads[view.step], draws[view.step] = view.ids, view.draw
        if view.step in (2, 3):
            view.accept(1, 55)
            view.accept(4)

    changes = {"sampler": sampler, "max_new_tokens": CANVAS, "max_denoising_steps": 6, "stability_threshold": None}
    events = events_of(asked(hook, **changes))
    for step in (2, 3):
        assert reads[step + 1][1] == 55 and reads[step + 1][4] == draws[step][4]
        draft = drafts(events)[step - 1]
        assert draft.accepted[1] and draft.accepted[4] and draft.canvas_tokens[1] == 55
    plain = drafts(events_of(asked(None, **changes)))
    assert drafts(events)[:1] == plain[:1] and drafts(events)[2:] != plain[2:], "what was accepted was read"


def test_stop_ends_the_canvas_with_this_step() -> None:
    seen: list[StepView] = []

    def hook(view: StepView) -> None:
        seen.append(view)
        if view.canvas == 0 and view.step == 2:
            view.stop()

    events = events_of(asked(hook, max_new_tokens=2 * CANVAS))
    first, second = [event for event in events if isinstance(event, Committed)]
    assert (first.steps, first.stop) == (2, "hook") and first.tokens == seen[1].argmax
    assert second.stop != "hook" and second.steps > 2


def test_company_of_a_hooked_request_keeps_its_bits() -> None:
    def meddle(view: StepView) -> None:
        view.ban(view.argmax[0])
        view.accept(view.places[1], 44)
        if view.step == 2:
            view.pin(view.places[2], 45)

    items = [request(11, seed=5, watch=True), asked(meddle), request(5, seed=7, top_p=0.5, watch=True)]
    alone = [of(run(Engine(MODEL, NO_REUSE), [item]), 1) for item in items]
    together = run(Engine(MODEL, NO_REUSE), items)
    for number, expected in enumerate(alone, 1):
        assert of(together, number) == expected


def test_a_hook_cannot_corrupt_the_engine() -> None:
    """What it holds are tuples, and what it does to them or to the view's own fields reaches nobody."""

    def hook(view: StepView) -> None:
        view.pins[0] = 5
        view.step, view.canvas = 99, 7  # its own copy
        for name in ("ids", "argmax", "entropy", "top_logprob", "draw", "accepted"):
            assert isinstance(getattr(view, name), tuple) and len(getattr(view, name)) == len(view.places)

    assert events_of(asked(hook)) == events_of(asked(None))


def test_a_fault_aborts_its_request_only() -> None:
    def broken(view: StepView) -> None:
        if view.step == 2:
            raise ValueError("planted")

    engine = Engine(MODEL, NO_REUSE)
    good = request(11, seed=5)
    events = run(engine, [asked(broken), good])
    assert of(events, 2) == run(Engine(MODEL, NO_REUSE), [good])
    (end,) = [event for event in events if isinstance(event, Finished) and event.request == 1]
    assert end.reason == "abort" and tokens(events) == []
    fault = engine.faults.pop(1)
    assert str(fault) == "the hook failed at step 2 of canvas 0: ValueError: planted"
    assert isinstance(fault.__cause__, ValueError)
    assert engine.load.kv_reserved == 0 and not engine.faults


MISTAKES: dict[str, tuple[Callable[[StepView], object], str]] = {
    "a place that is committed": (lambda view: view.canvas and view.pin(0, 5), r"place 0 is not one that can change"),
    "a place beyond the answer": (lambda view: view.pin(20, 5), r"they are 0\.\.19 here"),
    "a place of another canvas": (lambda view: view.accept(CANVAS), rf"they are 0\.\.{CANVAS - 1} here"),
    "a token that is none": (lambda view: view.pin(0, VOCAB), f"token {VOCAB} is not in the vocabulary"),
    "a text for a token": (lambda view: view.ban("a"), "token 'a' is not in the vocabulary"),  # type: ignore[arg-type]
    "accepting a pin": (lambda view: (view.pin(0, 5), view.accept(0)), "place 0 is pinned"),
    "all tokens banned": (lambda view: [view.ban(token) for token in range(VOCAB)], f"none of the {VOCAB} tokens"),
    "all tokens of a place": (lambda view: [view.ban(t, 19) for t in range(VOCAB)], "at place 19"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_demanded_is_told(case: str) -> None:
    hook, told = MISTAKES[case]
    engine = Engine(MODEL, NO_REUSE)
    run(engine, [asked(hook)])
    with pytest.raises(RequestError, match=told):
        raise engine.faults[1]


def test_a_view_that_was_kept_demands_nothing() -> None:
    kept: list[StepView] = []
    events_of(asked(kept.append))
    for demand in (lambda: kept[0].pin(0, 5), lambda: kept[0].ban(5), lambda: kept[0].accept(0), kept[0].stop):
        with pytest.raises(RequestError, match="this step is over"):
            demand()


@pytest.mark.parametrize(
    ("control", "told"),
    [
        (Control(hook=print), 'a hook acts on a canvas and needs mode "diffusion", got mode "ar"'),
        (Control(bans=((5, 3),)), "bans of places acts? on a canvas"),
    ],
)
def test_mode_ar_has_no_steps(control: Control, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Engine(MODEL).add(Request(prompt=prompt(5), config=config(mode="ar"), control=control))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("default")


def test_through_the_api(llm: LLM) -> None:
    threads: set[str] = set()
    steps: list[int] = []

    def hook(view: StepView) -> None:
        threads.add(threading.current_thread().name)
        steps.append(view.step)
        view.pin(2, token)

    (token,) = llm.tokenizer.encode(" fox")
    settings = {"max_new_tokens": 16, "seed": 3}
    answer = llm.generate("Once upon a time", on_step=hook, **settings)
    assert answer.token_ids[2] == token and sum(answer.steps) == len(steps) and threads == {"dgemma-engine"}
    streamed = [event for event in llm.stream("Once upon a time", on_step=hook, **settings)]
    assert tuple(t for e in streamed if isinstance(e, Committed) for t in e.tokens) == answer.token_ids
    with pytest.raises(RequestError, match="on_step must be callable"):
        llm.generate("Once upon a time", on_step=5, **settings)


def test_a_fault_reaches_the_caller_and_the_model_goes_on(llm: LLM) -> None:
    def broken(view: StepView) -> None:
        raise KeyError("planted")

    with pytest.raises(RequestError, match="step 1 of canvas 0: KeyError: 'planted'") as caught:
        llm.generate("Once upon a time", max_new_tokens=16, on_step=broken)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RequestError, match="planted"):
        list(llm.stream("Once upon a time", max_new_tokens=16, on_step=broken))
    with pytest.raises(RequestError, match="cannot wait for an answer of the same engine"):
        llm.generate("Once", max_new_tokens=16, on_step=lambda view: llm.generate("Once", max_new_tokens=16))
    assert llm.generate("Once upon a time", max_new_tokens=16).text


def test_beside_a_constraint_a_hook_accepts_and_stops_only() -> None:
    row = torch.zeros(4, dtype=torch.int64)
    tensors = StepTensors(ids=row, argmax=row, entropy=row, top_logprob=row, draw=row, accepted=row)
    numbers = {"request": 1, "canvas": 0, "step": 1, "max_steps": 9, "start": 0, "limit": 4, "vocab": 9}
    view = StepView(tensors, pins={}, bound=True, **numbers)
    for demand in (lambda: view.pin(0, 5), lambda: view.ban(5)):
        with pytest.raises(RequestError, match="where the request has a constraint"):
            demand()
    view.accept(0, 5)
    view.stop()
    assert view.demands.accepts == {0: 5} and view.demands.stop
