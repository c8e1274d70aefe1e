"""Narrow canvases: which width a canvas has, what never changes with it, and which canvases are never encoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import text_kit
from engine_kit import CANVAS, NO_REUSE, VOCAB, config, end, of, prompt, run, tiny_config, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DiffusionGemmaConfig

from dgemma.config import GenerationConfig, ModelConfig
from dgemma.engine import Engine, Request, validate
from dgemma.engine.request import canvas_width, is_approximate
from dgemma.errors import ConfigError, RequestError
from dgemma.events import Draft, Event

WIDTHS = (2, 4, 8, 16)
MIXED = tiny_model(canvas_widths=WIDTHS, canvas_length=16)
PLAIN = tiny_model(canvas_length=64)


def widths(events: list[Event], number: int = 1) -> list[int]:
    """Of every canvas, in order; needs `watch`."""
    seen = {e.canvas: len(e.tokens) for e in events if isinstance(e, Draft) and e.request == number}
    return [seen[canvas] for canvas in range(len(seen))]


def ask(length: int = 5, seed: int = 0, **changes: Any) -> Request:
    return Request(prompt=prompt(length), config=config(seed=seed, **{"max_denoising_steps": 3} | changes), watch=True)


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        (MIXED, {"max_new_tokens": 1}, [2]),
        (MIXED, {"max_new_tokens": 3}, [4]),
        (MIXED, {"max_new_tokens": 9}, [16]),
        (MIXED, {"max_new_tokens": 37}, [16, 16, 8]),
        (MIXED, {"max_new_tokens": 3, "narrow": "never"}, [16]),
        (MIXED, {"max_new_tokens": 3, "canvas_length": 16}, [16]),
        (MIXED, {"max_new_tokens": 3, "canvas_length": 8, "narrow": "short"}, [4]),
        (MIXED, {"max_new_tokens": 40, "narrow": "adaptive"}, [2, 4, 8, 16, 16]),
        (MIXED, {"max_new_tokens": 31, "narrow": "adaptive"}, [2, 4, 8, 16, 2]),
        (MIXED, {"max_new_tokens": 20, "canvas_length": 6, "narrow": "adaptive"}, [2, 4, 6, 6, 2]),
        (PLAIN, {"max_new_tokens": 3}, [64]),
        (PLAIN, {"max_new_tokens": 3, "narrow": "short"}, [16]),
        (PLAIN, {"max_new_tokens": 130, "narrow": "adaptive"}, [16, 32, 64, 32]),
    ],
)
def test_widths_of_the_canvases(model: Any, changes: dict[str, Any], expected: list[int]) -> None:
    events = run(Engine(model, NO_REUSE), [ask(**changes)])
    assert widths(events) == expected
    assert len(tokens(events)) == changes["max_new_tokens"] == end(events).completion_tokens


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 400), st.integers(1, 40), st.sampled_from(["auto", "never", "short", "adaptive"]),
    st.sampled_from([None, 1, 5, 16, 40]), st.sampled_from([(), WIDTHS, (16,)]),
)  # fmt: skip
def test_positions_are_counted_as_they_are_used(
    budget: int, length: int, narrow: Any, width: int | None, named: tuple[int, ...]
) -> None:
    """A prompt is refused exactly if its canvases, one after the other, do not fit."""
    model = tiny_config(canvas_widths=named, canvas_length=16, max_positions=120)
    chosen = GenerationConfig(max_new_tokens=budget, narrow=narrow, canvas_length=width)
    room, index, used = budget, 0, length
    while room > 0:
        size = canvas_width(chosen, model, index, room)
        assert size == (width or 16) or (size < (width or 16) and (size >= room or narrow == "adaptive"))
        used, room, index = used + size, room - size, index + 1
    item = Request(prompt=prompt(length), config=chosen)
    if used <= 120:
        validate(item, model)
    else:
        with pytest.raises(RequestError, match=f"need {used} positions"):
            validate(item, model)


def test_untrained_widths_are_called_approximate() -> None:
    named, plain = tiny_config(canvas_widths=(4, 8), canvas_length=8), tiny_config(canvas_length=64)
    for exact in ({}, {"narrow": "adaptive"}, {"canvas_length": 4}, {"canvas_length": 5, "mode": "ar"}):
        assert not is_approximate(config(**exact), named), exact
    assert is_approximate(config(canvas_length=5), named)
    assert not is_approximate(config(), plain) and not is_approximate(config(canvas_length=64), plain)
    for rough in ({"narrow": "short"}, {"narrow": "adaptive"}, {"canvas_length": 32}):
        assert is_approximate(config(**rough), plain), rough


def test_a_batch_of_mixed_widths_equals_its_singles() -> None:
    items = [
        ask(3, 1, narrow="adaptive", max_new_tokens=45),
        ask(9, 2, max_new_tokens=5),
        ask(1, 3, narrow="adaptive", max_new_tokens=23, sampler="ancestral"),
        ask(14, 4, narrow="never", max_new_tokens=20),
        ask(6, 5, narrow="adaptive", canvas_length=5, max_new_tokens=12, convention="jax"),
        ask(8, 6, mode="ar", max_new_tokens=9),
        ask(20, 7, narrow="adaptive", max_new_tokens=40, stop_tokens=tuple(range(0, VOCAB, 9))),
    ]
    alone = [run(Engine(MIXED, NO_REUSE), [item]) for item in items]
    together = run(Engine(MIXED, NO_REUSE), items)
    joined = run(Engine(MIXED, NO_REUSE), joins={3 * place: item for place, item in enumerate(items)})
    for number, own in enumerate(alone, start=1):
        assert of(together, number) == own and of(joined, number) == own, f"request {number}"


def test_a_narrow_canvas_begins_as_the_wide_one_does() -> None:
    """The noise of a position knows no width, so a seed means the same whatever the widths are."""
    model = Engine(MIXED, NO_REUSE)
    first = []
    for narrow in ("never", "adaptive"):
        number = model.add(ask(max_denoising_steps=9, confidence_threshold=None, narrow=narrow, max_new_tokens=16))
        model._admit()
        first.append(model._running[number].start_canvas(MIXED.config, model.runner.device).ids.tolist())
        model.abort(number)
    assert len(first[1]) == 2 and first[0][:2] == first[1]


def test_text_comes_after_fewer_positions() -> None:
    """The same steps a canvas: what the first text costs is the first canvas."""
    cost = {}
    for narrow in ("never", "adaptive"):
        engine = Engine(MIXED, NO_REUSE)
        engine.add(ask(narrow=narrow, max_new_tokens=40, confidence_threshold=None))
        while not any(not isinstance(event, Draft) for event in engine.tick()):
            pass
        cost[narrow] = engine.counters.denoised_tokens
    assert cost == {"never": 3 * 16, "adaptive": 3 * 2}


# -- the last canvas -----------------------------------------------------------------


@pytest.mark.parametrize("narrow", ["never", "short", "adaptive"])
@pytest.mark.parametrize("budget", [1, 2, 7, 16, 17, 32, 39])
def test_a_canvas_that_ends_the_budget_is_never_encoded(narrow: str, budget: int) -> None:
    engine = Engine(MIXED, NO_REUSE)
    events = run(engine, [ask(narrow=narrow, max_new_tokens=budget)])
    sizes = widths(events)
    assert engine.counters.encoded_tokens == 5 + sum(sizes[:-1])
    assert end(events).encode_passes == len(sizes) - 1 and end(events).reason == "length"


@pytest.mark.parametrize("narrow", ["never", "adaptive"])
def test_a_canvas_with_an_end_token_is_never_encoded(narrow: str) -> None:
    free = run(Engine(MIXED, NO_REUSE), [ask(narrow=narrow, max_new_tokens=48)])
    answer = tokens(free)
    for place in range(0, 48, 5):
        if answer[place] in answer[:place]:
            continue
        engine = Engine(MIXED, NO_REUSE)
        events = run(engine, [ask(narrow=narrow, max_new_tokens=48, stop_tokens=(answer[place],))])
        assert end(events).reason == "stop" and tokens(events) == answer[: place + 1]
        assert engine.counters.encoded_tokens == 5 + sum(widths(events)[:-1])
        assert end(events).encode_passes == len(widths(events)) - 1


# -- what a checkpoint says ----------------------------------------------------------


def test_transformers_loads_a_checkpoint_that_names_its_widths(tmp_path: Path) -> None:
    ours = tiny_config(canvas_widths=WIDTHS, canvas_length=CANVAS)
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    theirs = DiffusionGemmaConfig.from_pretrained(tmp_path)
    assert theirs.canvas_length == CANVAS
    assert ModelConfig.from_hf(json.loads(theirs.to_json_string())).canvas_widths == WIDTHS
    assert "dgemma_canvas_widths" not in replace(ours, canvas_widths=()).to_hf()


@pytest.mark.parametrize("bad", [(0, 4), (8, 4), (4, 4)])
def test_unusable_widths_are_refused(bad: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"canvas_widths must be ascending .*\[{bad[0]}, 4\]"):
        tiny_config(canvas_widths=bad)


def test_the_shipped_model_names_the_widths_of_its_training() -> None:
    folder = text_kit.REPO / "dgemma/models/default"
    model = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert model.canvas_widths == (16, 32, 64, 128, 256) and model.canvas_length in model.canvas_widths
