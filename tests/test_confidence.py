"""What is told of each committed token is what the steps did, everywhere the same, and for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_kit import CANVAS, NO_REUSE, config, of, prompt, request, run, tiny_model
from server_kit import Running, chat_body, running

from dgemma.api import LLM
from dgemma.engine import Engine, Request
from dgemma.errors import DataError
from dgemma.events import Committed, Draft, Event
from dgemma.text.confidence import token_confidence
from dgemma.trace import CONFIDENCE, Header, Moment, TraceEncoder, TraceReader, as_text

MODEL = tiny_model()
SETTINGS: dict[str, Any] = {"seed": 3, "max_new_tokens": 40}
PROMPT = "Once upon a time"


def told_of(committed: Committed) -> list[tuple[Any, ...]]:
    return list(zip(committed.entropy, committed.revisions, committed.last_change, strict=True))


def counted(drafts: Sequence[Draft], count: int) -> list[tuple[Any, ...]]:
    """The same from the predictions of every step, counted the slow way."""
    found = []
    for place in range(count):
        row = [draft.tokens[place] for draft in drafts]
        changes = [step for step in range(1, len(row)) if row[step] != row[step - 1]]
        found.append((drafts[-1].entropy[place], len(changes), 1 + max(changes, default=0)))
    return found


@pytest.mark.parametrize("sampler", ["entropy_bound", "confidence", "ancestral"])
def test_the_numbers_are_those_of_the_steps(sampler: str) -> None:
    item = request(9, seed=4, watch=True, sampler=sampler, max_new_tokens=3 * CANVAS - 2, stop_tokens=(1, 2, 3))
    events = run(Engine(MODEL, NO_REUSE), [item])
    all_revisions: list[int] = []
    for committed in [event for event in events if isinstance(event, Committed)]:
        drafts = [event for event in events if isinstance(event, Draft) and event.canvas == committed.canvas]
        assert told_of(committed) == counted(drafts, len(committed.tokens))
        assert len(committed.top_logprob) == len(committed.tokens) and all(p <= 0 for p in committed.top_logprob)
        # Of V tokens with log-probability at most p, the entropy is at least -p.
        assert all(h >= -p - 1e-4 for h, p in zip(committed.entropy, committed.top_logprob, strict=True))
        all_revisions += committed.revisions
    assert max(all_revisions) > 0, "nothing to count"


def test_company_and_unlike_widths_change_no_number() -> None:
    items = [request(9, seed=4), request(5, seed=5, canvas_length=4), request(7, seed=6, top_p=0.7)]
    together = run(Engine(MODEL, NO_REUSE), items)
    for number, item in enumerate(items, 1):
        assert of(together, number) == run(Engine(MODEL, NO_REUSE), [item])


def test_mode_ar_has_no_steps_to_tell_of() -> None:
    events = run(Engine(MODEL, NO_REUSE), [request(9, mode="ar")])
    assert all(event.entropy == event.revisions == () for event in events if isinstance(event, Committed))


def test_nobody_has_to_watch() -> None:
    """The same numbers without a draft event, as always collected."""
    plain, watched = (
        [e for e in run(Engine(MODEL, NO_REUSE), [request(9, watch=watch)]) if isinstance(e, Committed)]
        for watch in (False, True)
    )
    assert plain == watched and plain[0].entropy


# -- through the library ------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("default")


def events_of(llm: LLM, **changes: Any) -> list[Event]:
    return list(llm.stream(PROMPT, **(SETTINGS | changes)))


def test_of_an_answer(llm: LLM) -> None:
    answer = llm.generate(PROMPT, **SETTINGS)
    assert tuple(one.token for one in answer.confidence) == answer.token_ids
    assert "".join(one.text for one in answer.confidence) == answer.text
    committed = [event for event in events_of(llm) if isinstance(event, Committed)]
    assert [one.entropy for one in answer.confidence] == [value for event in committed for value in event.entropy]
    for one in answer.confidence:
        assert 1 <= one.last_change <= one.steps == answer.steps[one.canvas]
        assert (one.revisions == 0) == (one.last_change == 1)
    assert llm.generate(PROMPT, mode="ar", max_new_tokens=4).confidence == ()


def test_texts_of_split_characters_and_end_tokens_join(llm: LLM) -> None:
    (end,) = {*llm.generation.stop_tokens[:1]}
    ids = [*llm.tokenizer.encode("Zoë – “née” 🦊"), end]
    numbers = (0.5,) * len(ids)
    events = [
        Committed(1, 0, tuple(ids[:5]), 3, "stable", numbers[:5], numbers[:5], (0,) * 5, (1,) * 5),
        Committed(1, 1, tuple(ids[5:]), 2, "cap", numbers[5:], numbers[5:], (1,) * len(ids[5:]), (2,) * len(ids[5:])),
    ]
    told = token_confidence(events, llm.tokenizer, (end,))
    assert "".join(one.text for one in told) == llm.tokenizer.decode(ids[:-1]) and told[-1].text == ""
    assert [one.canvas for one in told] == [0] * 5 + [1] * len(ids[5:])
    broken = llm.tokenizer.encode("🦊")[:-1]
    if broken:
        cut = Committed(1, 0, tuple(broken), 1, "cap", *((0.0,) * len(broken),) * 2, *((0,) * len(broken),) * 2)
        assert token_confidence([cut], llm.tokenizer, ())[-1].text.endswith("\ufffd")


# -- through the trace ---------------------------------------------------------------------


def lines_of(llm: LLM) -> list[str]:
    config = llm.generation.with_(**SETTINGS)
    encoder = TraceEncoder(Header.of("default", config, PROMPT, ()), llm.tokenizer.piece)
    return [as_text(encoder.header), *(as_text(encoder.line(Moment(0.0, event))) for event in events_of(llm))]


def test_a_trace_gives_the_numbers_back(llm: LLM) -> None:
    want = [event for event in events_of(llm) if isinstance(event, Committed)]
    got = [moment.event for moment in TraceReader(lines_of(llm)) if isinstance(moment.event, Committed)]
    for one, other in zip(got, want, strict=True):
        assert (one.tokens, one.revisions, one.last_change) == (other.tokens, other.revisions, other.last_change)
        assert one.entropy == pytest.approx(other.entropy, abs=6e-5)
        assert one.top_logprob == pytest.approx(other.top_logprob, abs=6e-5)


def changed(llm: LLM, **changes: Any) -> list[str]:
    """The trace with fields of its committed lines changed; None takes one away."""
    lines = [json.loads(line) for line in lines_of(llm)]
    lines = [line | changes if line.get("type") == "committed" else line for line in lines]
    return [json.dumps({name: value for name, value in line.items() if value is not None}) for line in lines]


def test_a_trace_without_them_is_read_as_before(llm: LLM) -> None:
    old = changed(llm, **dict.fromkeys(CONFIDENCE))
    events = [replace(moment.event, request=1) for moment in TraceReader(old)]
    assert [e for e in events if isinstance(e, Committed)] == [
        Committed(1, e.canvas, e.tokens, e.steps, e.stop) for e in events_of(llm) if isinstance(e, Committed)
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"entropy": [0.5]}, "entropy has 1 entries for"),
        ({"revisions": None}, "'revisions' is missing"),
        ({"last_change": [-1]}, "whole number"),
        ({"top_logprob": ["x"]}, "could not convert"),
    ],
)
def test_half_of_them_is_a_fault(llm: LLM, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        list(TraceReader(changed(llm, **changes)))


# -- through the command line and the server -------------------------------------------------


def test_json_of_the_command_line(llm: LLM, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dgemma", "generate", PROMPT, "--json", "--seed", "3", "--max-new-tokens", "40"]
    got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    want = llm.generate(PROMPT, **SETTINGS).confidence
    assert [one["text"] for one in got["confidence"]] == [one.text for one in want]
    for one, other in zip(got["confidence"], want, strict=True):
        assert one["revisions"] == other.revisions and one["last_change"] == other.last_change
        assert one["entropy"] == pytest.approx(other.entropy, abs=6e-5)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


OWN = {"dgemma": {"confidence": True}}


def entries(choices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for choice in choices for entry in choice.get("dgemma", {}).get("confidence", [])]


def alike(entry: dict[str, Any], one: Any) -> bool:
    return all(entry[name] == getattr(one, name) for name in ("token", "canvas", "steps", "entropy", *CONFIDENCE))


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_the_server_tells_who_asks(server: Running, llm: LLM, route: str) -> None:
    if route == "chat":
        path, body = "/v1/chat/completions", chat_body(llm, PROMPT, max_tokens=40)
        answer = llm.chat([{"role": "user", "content": PROMPT}], seed=1, max_new_tokens=40)
    else:
        path, body = "/v1/completions", {"model": llm.name, "prompt": PROMPT, "seed": 1, "max_tokens": 40}
        answer = llm.generate(PROMPT, seed=1, max_new_tokens=40)
    want = answer.confidence[:-1] if answer.finish_reason == "stop" else answer.confidence  # no end token
    got = entries(server.post(path, body | OWN).json()["choices"])
    assert len(got) == len(want) > 0 and all(map(alike, got, want))
    chunks = server.chunks(path, body | OWN | {"stream": True})[:-1]
    assert entries([choice for chunk in chunks for choice in chunk["choices"]]) == got
    assert entries(server.post(path, body).json()["choices"]) == []


def test_a_stop_text_cuts_them_too(server: Running, llm: LLM) -> None:
    body = chat_body(llm, PROMPT, max_tokens=40)
    text = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:4]
    (choice,) = server.post("/v1/chat/completions", body | OWN | {"stop": stop}).json()["choices"]
    whole = entries(server.post("/v1/chat/completions", body | OWN).json()["choices"])
    got = entries([choice])
    assert 0 < len(got) < len(whole) and got == whole[: len(got)]
    assert "".join(one["text"] for one in got).startswith(choice["message"]["content"])


def test_responses_refuse_it(server: Running, llm: LLM) -> None:
    answer = server.post("/v1/responses", {"model": llm.name, "input": PROMPT} | OWN)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "dgemma.confidence"


def test_pins_are_certain() -> None:
    from dgemma.control import Control

    item = Request(prompt=prompt(9), config=config(), control=Control(pins=((2, 77),)))
    committed = next(e for e in run(Engine(MODEL, NO_REUSE), [item]) if isinstance(e, Committed))
    assert (committed.entropy[2], committed.top_logprob[2]) == (0, 0)
    assert (committed.revisions[2], committed.last_change[2]) == (0, 1)
