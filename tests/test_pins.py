"""Pinned tokens and drafts in the engine: what is read, what is decided, what is committed."""

import pytest
import torch
from engine_kit import APART, CANVAS, NO_REUSE, VOCAB, config, prompt, request, run, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.config import GenerationConfig
from dgemma.control import NOISE, Control
from dgemma.diffusion.noise import first_canvas
from dgemma.engine import Engine, Request, validate
from dgemma.errors import RequestError
from dgemma.events import Committed, Draft, Event, Finished

MODEL = tiny_model()
STOPS = (1, 2)


def asked(control: Control, length: int = 9, **changes: object) -> Request:
    return Request(prompt=prompt(length), config=config(**changes), watch=True, control=control)


def answer(events: list[Event]) -> tuple[int, ...]:
    return tuple(token for event in events if isinstance(event, Committed) for token in event.tokens)


def drafts(events: list[Event]) -> list[Draft]:
    return [event for event in events if isinstance(event, Draft)]


pins = st.dictionaries(st.integers(0, 2 * CANVAS - 1), st.integers(0, VOCAB - 1), min_size=1)


@settings(max_examples=40, deadline=None)
@given(
    pins=pins,
    seed=st.integers(0, 99),
    sampler=st.sampled_from(["entropy_bound", "confidence", "ancestral"]),
    convention=st.sampled_from(["hf", "jax"]),
)
def test_pins_are_in_every_canvas_and_in_the_answer(
    pins: dict[int, int], seed: int, sampler: str, convention: str
) -> None:
    """Whatever the pins are, end tokens included, and whatever the sampler does."""
    item = asked(
        Control(pins=tuple(pins.items())), seed=seed, sampler=sampler, convention=convention,
        max_new_tokens=2 * CANVAS, stop_tokens=STOPS,
    )  # fmt: skip
    events = run(Engine(MODEL, NO_REUSE), [item])
    text = answer(events)
    assert len(text) > max(pins), "the answer reaches its last pin"
    assert all(text[place] == token for place, token in pins.items())
    for place in range(max(pins)):
        assert place in pins or text[place] not in STOPS
    for draft in drafts(events):
        for place, token in pins.items():
            if draft.canvas == place // CANVAS:
                inside = place % CANVAS
                assert draft.canvas_tokens[inside] == draft.tokens[inside] == token
                assert not draft.accepted[inside] and draft.entropy[inside] == 0


def test_the_network_reads_the_pins_in_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = Engine(MODEL, APART), []
    real = engine.runner.denoise

    def watched(jobs: list, softs: list, draws: object) -> object:
        seen.append((jobs[0][1].clone(), softs[0]))
        return real(jobs, softs, draws)

    monkeypatch.setattr(engine.runner, "denoise", watched)
    run(engine, [asked(Control(pins=((2, 77),)), max_new_tokens=CANVAS)])
    assert len(seen) > 1 and all(ids[2] == 77 for ids, _ in seen)
    noise = first_canvas(0, 0, 0, CANVAS, VOCAB)
    assert seen[0][0].tolist() == [*noise[:2].tolist(), 77, *noise[3:].tolist()]
    for _, soft in seen[1:]:
        assert torch.equal(soft[2], MODEL.embed.weight[77]), "a certain prediction of the pin"


def test_pins_are_outside_the_budget_and_the_mean_entropy() -> None:
    """With one free position that one is always accepted, however small the budget; a canvas of pins is at rest."""
    free = 5
    control = Control(pins=tuple((place, 40 + place) for place in range(CANVAS) if place != free))
    events = run(Engine(MODEL, NO_REUSE), [asked(control, max_new_tokens=CANVAS, entropy_bound=1e-9)])
    assert all(draft.accepted == tuple(place == free for place in range(CANVAS)) for draft in drafts(events))
    full = Control(pins=tuple((place, 40 + place) for place in range(CANVAS)))
    events = run(Engine(MODEL, NO_REUSE), [asked(full, max_new_tokens=CANVAS)])
    assert answer(events) == tuple(range(40, 40 + CANVAS)) and len(drafts(events)) == 2


def test_pins_condition_the_rest() -> None:
    """Other pins, another text around them: they are read, not pasted."""
    texts = {
        answer(run(Engine(MODEL, NO_REUSE), [asked(Control(pins=((3, pin),)), max_new_tokens=CANVAS)]))[4:]
        for pin in (40, 50, 60)
    }
    assert len(texts) == 3


def test_company_changes_nothing() -> None:
    items = [
        asked(Control(pins=((1, 44), (9, 45))), seed=4, max_new_tokens=2 * CANVAS),
        request(11, seed=5),
        asked(Control(pins=((0, 46),)), length=7, seed=6, top_p=0.8, stop_tokens=STOPS),
        request(5, seed=7, top_p=0.5),
    ]
    alone = [answer(run(Engine(MODEL, NO_REUSE), [item])) for item in items]
    together = run(Engine(MODEL, NO_REUSE), items)
    for number, expected in enumerate(alone, 1):
        assert answer([event for event in together if event.request == number]) == expected


def test_a_draft_is_what_the_first_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = Engine(MODEL, APART), []
    real = engine.runner.denoise
    monkeypatch.setattr(
        engine.runner,
        "denoise",
        lambda jobs, softs, draws: (seen.append(jobs[0][1].tolist()), real(jobs, softs, draws))[1],
    )
    run(engine, [asked(Control(draft=(7, NOISE, 9)), max_new_tokens=CANVAS)])
    assert seen[0] == [
        7,
        first_canvas(0, 0, 0, CANVAS, VOCAB)[1].item(),
        9,
        *first_canvas(0, 0, 0, CANVAS, VOCAB)[3:].tolist(),
    ]


@pytest.mark.parametrize(
    ("control", "changes", "words"),
    [
        (lambda: Control(pins=((1, 5), (1, 6))), {}, "place 1 of the answer is pinned twice"),
        (lambda: Control(pins=((-1, 5),)), {}, "count from 0"),
        (lambda: Control(pins=((0, VOCAB),)), {}, f"token {VOCAB} is not in the vocabulary"),
        (lambda: Control(pins=((20, 5),)), {}, "at least 21 are needed"),
        (lambda: Control(pins=((0, 5),)), {"mode": "ar"}, 'needs mode "diffusion"'),
        (lambda: Control(draft=(0, VOCAB)), {}, "not in the vocabulary"),
    ],
)
def test_what_cannot_be_is_refused(control: object, changes: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        validate(asked(control(), **changes), MODEL.config)  # type: ignore[operator]


def test_no_pins_no_change() -> None:
    """The golden numbers of other tests hold; here only that an empty control is the default."""
    assert Request(prompt=(3,), config=GenerationConfig()).control == Control()
    end = run(Engine(MODEL, NO_REUSE), [asked(Control())])[-1]
    assert isinstance(end, Finished) and end.reason == "length"
