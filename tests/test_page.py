"""The web page in a real browser, before a real server with the shipped model; every other origin is out of reach."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Callable
from typing import Any

import page_kit
import pytest
from page_kit import Reader, sse

from dgemma.api import LLM
from dgemma.events import Draft
from dgemma.trace import TraceReader
from dgemma.view import HEAT_COLOURS, HEAT_NATS, cells

pytest_plugins = ["page_fixtures"]

TRANSPARENT = "rgba(0, 0, 0, 0)"


def recorded(url: str, trace_id: str) -> TraceReader:
    with urllib.request.urlopen(f"{url}v1/traces/{trace_id}") as answer:
        return TraceReader(answer.read().splitlines())


def drafts_of(trace: TraceReader) -> dict[int, list[Draft]]:
    found: dict[int, list[Draft]] = {}
    for moment in trace:
        if isinstance(moment.event, Draft):
            found.setdefault(moment.event.canvas, []).append(moment.event)
    return found


def corrections(drafts: list[Draft], step: int) -> set[int]:
    """Positions accepted in some earlier step whose prediction this step changed."""
    places = range(len(drafts[step].tokens))
    once = {p for p in places if any(draft.accepted[p] for draft in drafts[:step])}
    return {p for p in once if drafts[step].tokens[p] != drafts[step - 1].tokens[p]}


def css(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


def looks(draft: Draft, trace: TraceReader, corrected: set[int]) -> list[dict[str, Any]]:
    """What the cells of a draft must look like, from what the terminal's view says."""
    return [
        {
            "text": cell.text,
            "colour": css(HEAT_COLOURS[cell.heat - 1]) if cell.heat else TRANSPARENT,
            "accepted": cell.accepted,
            "corrected": place in corrected,
        }
        for place, cell in enumerate(cells(draft, trace.piece, frozenset(trace.header.blank)))
    ]


def test_cells_equal_the_recorded_trace(reader: Callable[..., Reader], url: str) -> None:
    one = reader()
    one.open()
    one.set(seed=11, trace=True)
    one.ask("Tell me a story.")
    trace = recorded(url, one.record()["traceId"])
    drafts = drafts_of(trace)
    steps = [(canvas, step) for canvas, some in drafts.items() for step in range(len(some))]
    # Three at random, and one with a self-correction: the mark must be there, and only there.
    chosen = random.Random(5).sample(steps, 3)
    chosen.append(next(place for place in steps if place[1] and corrections(drafts[place[0]], place[1])))
    seen = []
    for canvas, step in chosen:
        one.show(canvas, step)
        wanted = looks(drafts[canvas][step], trace, corrections(drafts[canvas], step) if step else set())
        assert one.cells() == wanted
        assert one.page.inner_text(".turn:last-child .count") == f"{step + 1} / {len(drafts[canvas])}"
        seen += wanted
    assert len({cell["colour"] for cell in seen}) > 3, "the steps are too much alike to prove a thing"
    assert {cell["accepted"] for cell in seen} == {True, False}


@pytest.mark.soak
def test_every_step_of_a_conversation_equals_its_traces(llm: LLM) -> None:
    """Fails where there is no browser, and looks at every step of every canvas."""
    assert page_kit.missing() == ""
    with page_kit.serving(llm) as url, page_kit.browsing() as browser:
        one = Reader(browser, url, reduced_motion="reduce")
        one.open()
        for seed, question in enumerate(("Tell me a story.", "And one about a hen.", "Write a story about the sea.")):
            one.set(seed=seed, trace=True)
            one.ask(question)
            trace = recorded(url, one.record()["traceId"])
            for canvas, drafts in drafts_of(trace).items():
                for step, draft in enumerate(drafts):
                    one.show(canvas, step)
                    assert one.cells() == looks(draft, trace, corrections(drafts, step) if step else set())
        assert (one.outside, one.faults) == ([], [])


def test_a_slow_picture_shows_every_step(reader: Callable[..., Reader]) -> None:
    one = reader()
    one.open()
    one.set(seed=11, max_tokens=16)
    one.page.click("#open-sampler")
    one.page.select_option("#pace", "24")
    one.page.click("#close-sampler")
    one.page.evaluate(
        """() => { window.seen = [];
          new MutationObserver(() => window.seen.push(document.querySelector(".count")?.textContent))
            .observe(document.getElementById("turns"), { subtree: true, childList: true, characterData: true }) }"""
    )
    one.ask("Tell me a story.")
    seen = {int(text.split(" / ")[0]) for text in one.page.evaluate("window.seen") if text}
    steps = int(one.page.get_attribute(".steps", "max") or 0) + 1
    assert steps > 5 and seen == set(range(1, steps + 1))


def test_the_answer_and_its_numbers_are_the_servers(reader: Callable[..., Reader], llm: LLM) -> None:
    one = reader()
    one.open()
    one.set(seed=3, max_tokens=48)
    one.ask("Tell me a story about a fox.")
    alone = llm.chat([{"role": "user", "content": "Tell me a story about a fox."}], seed=3, max_new_tokens=48)
    assert one.page.text_content(".answer .words:visible") == alone.text
    numbers = dict(zip(*(one.page.locator(f".numbers {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True))
    assert numbers["steps"] == str(sum(alone.steps))
    assert numbers["tokens"] == str(len(alone.token_ids))
    assert numbers["tokens a forward pass"] == f"{alone.tokens_per_forward:.2f}"
    assert numbers["seed"] == "3"
    assert float(numbers["seconds"]) >= 0 and int(numbers["tokens a second"].replace(",", "")) > 0


def test_self_corrections_flash_unless_motion_is_reduced(reader: Callable[..., Reader], url: str) -> None:
    flashes = {}
    for motion in ("reduce", "no-preference"):
        one = reader(reduced_motion=motion)
        one.open()
        one.set(seed=11, trace=True)
        one.ask("Tell me a story.")
        drafts = drafts_of(recorded(url, one.record()["traceId"]))
        canvas, step = next((c, s) for c, some in drafts.items() for s in range(1, len(some)) if corrections(some, s))
        one.show(canvas, step - 1)
        # What flashed on the way there is over.
        one.page.wait_for_function("() => !document.getAnimations().some(one => !(one instanceof CSSTransition))")
        # Counted in the same task as the step is taken: a flash lasts less than a slow machine's pause.
        flashes[motion] = one.page.evaluate(
            """() => { document.querySelector('[aria-label="Next step"]').click();
              return [...document.querySelectorAll(".cell")].filter(cell => cell.getAnimations()
                .some(one => !(one instanceof CSSTransition))).map(cell => Number(cell.dataset.place)) }"""
        )
        wanted = corrections(drafts[canvas], step)
    assert flashes == {"reduce": [], "no-preference": sorted(wanted)}


def crafted(width: int, **draft: Any) -> tuple[TraceReader, list[dict[str, Any]]]:
    """A trace of one draft and its commitment, to be read, and the chunks that stream it."""
    header = {"format": "dgemma-trace", "version": 1, "model": "m", "seed": 1, "mode": "diffusion", "prompt": "",
              "prompt_tokens": [2], "settings": {}, "blank": [0]}  # fmt: skip
    places = [[place, 7] for place in range(width)]
    line = {"type": "draft", "seconds": 0.1, "request": 1, "canvas": 0, "step": 1, "max_steps": 2, "temperature": 1.0,
            "width": width, "tokens": places, "canvas_tokens": places, "accepted": [], **draft}  # fmt: skip
    committed = {"type": "committed", "seconds": 0.2, "request": 1, "canvas": 0, "tokens": [7], "steps": 1,
                 "stop": "cap", "text": line["pieces"]["7"]}  # fmt: skip
    lines = [header, line, committed]
    trace = TraceReader([json.dumps(one) for one in lines])
    return trace, [{"choices": [], "dgemma": {"index": 0, "line": one}} for one in lines]


def answers(reader: Reader, *chunks: dict[str, Any]) -> None:
    """The next questions of this reader are answered with these chunks."""
    reader.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=sse(*chunks)),
    )


def test_heats_begin_where_the_terminals_do(reader: Callable[..., Reader]) -> None:
    around = [round(nats + more, 4) for nats in HEAT_NATS for more in (-0.0001, 0.0)]
    entropy = [0.0, *around, 9.0, None]
    trace, chunks = crafted(len(entropy), entropy=entropy, accepted=[1, 4], pieces={"7": " a"})
    one = reader()
    one.open()
    answers(one, *chunks)
    one.ask("Tell me a story.")
    ((draft,),) = drafts_of(trace).values()
    assert len({cell["colour"] for cell in one.cells()}) == len(HEAT_COLOURS) + 1
    assert one.cells() == looks(draft, trace, set())


def test_html_in_a_prompt_and_in_an_answer_stays_text(reader: Callable[..., Reader]) -> None:
    evil = "<img src=x onerror='window.hit=1'><script>window.hit=1</script><b>bold</b>"
    one = reader()
    one.open()
    _, chunks = crafted(2, entropy=[0.5, None], pieces={"7": evil})
    delta = {"reasoning_content": evil, "content": evil}
    answers(one, *chunks, {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    one.ask(evil)
    for place in (".said", ".answer > .words", ".thought .words", ".grid .cell:first-child"):
        assert one.page.text_content(place) == evil
    assert evil.startswith(one.page.inner_text("#conversations .open").rstrip("…"))
    one.page.reload()
    one.page.wait_for_selector(".grid .cell")
    assert one.page.locator("#turns :is(img, script, b), #conversations :is(img, script, b)").count() == 0
    assert one.page.evaluate("window.hit") is None
