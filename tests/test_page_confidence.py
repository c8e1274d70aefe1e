"""Words in doubt on the page: which are underlined and how, what is told of them, by keyboard, in light and dark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from page_kit import Reader

from dgemma.api import LLM
from dgemma.view import HEAT_COLOURS, heat

pytest_plugins = ["page_fixtures"]

PROMPT = "Tell me a story."
HASTY = {"seed": 1, "steps": 12}  # too few steps: some canvases end in doubt
DOUBT = 1  # the heat from which a word is marked


@pytest.fixture(scope="module")
def llm() -> LLM:
    """The shipped model: a random one doubts everything."""
    model = LLM.load("default")
    model.generation = model.generation.with_(max_new_tokens=64)
    return model


def marked(one: Reader) -> list[dict[str, Any]]:
    return one.page.locator(".answer .doubt").evaluate_all(
        """words => words.map(word => { const look = getComputedStyle(word); return { text: word.textContent,
             told: word.title, label: word.getAttribute("aria-label"), colour: look.textDecorationColor,
             line: look.textDecorationLine, width: parseFloat(look.textDecorationThickness) } })"""
    )


def rgb(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_in_doubt_are_underlined_by_entropy(reader: Callable[..., Reader], llm: LLM, scheme: str) -> None:
    """Against the library's own numbers for the same answer, word by word."""
    answer = llm.chat([{"role": "user", "content": PROMPT}], **HASTY)
    want = [sure for sure in answer.confidence if heat(round(sure.entropy, 4)) >= DOUBT and sure.text.strip()]
    assert len(want) > 3 and any(sure.revisions for sure in want)
    one = reader(color_scheme=scheme)
    one.open()
    one.set(**HASTY)
    one.ask(PROMPT)
    assert one.page.text_content(".answer > .words") == answer.text, "marks change no text"
    got = marked(one)
    assert [word["text"] for word in got] == [sure.text.lstrip() for sure in want]
    widths = {}
    for word, sure in zip(got, want, strict=True):
        level = heat(round(sure.entropy, 4))
        assert word["colour"] == rgb(HEAT_COLOURS[level - 1]) and word["line"] == "underline"
        assert word["told"] == word["label"] and f"{sure.entropy:.2f} nats" in word["told"]
        times = f"changed {sure.revisions} time" if sure.revisions else "the same in all"
        assert times in word["told"]
        assert not sure.revisions or f"last in step {sure.last_change} of {sure.steps}" in word["told"]
        widths[level] = word["width"]
    order = [widths[level] for level in sorted(widths)]
    assert order == sorted(order) and len(set(order)) > 1, "the more doubt, the thicker"


def test_words_in_doubt_by_keyboard(reader: Callable[..., Reader]) -> None:
    one = reader()
    one.open()
    one.set(**HASTY)
    one.ask(PROMPT)
    words, keys = marked(one), one.page.keyboard
    told = lambda: one.page.inner_text(".answer > .readout")  # noqa: E731
    assert told() == f"{len(words)} words in doubt"
    assert one.page.locator(".answer .doubt[tabindex='0']").count() == 1, "one stop for all of them"
    one.page.focus(".answer .doubt[tabindex='0']")
    assert told() == words[0]["told"]
    keys.press("ArrowRight")
    assert told() == words[1]["told"]
    keys.press("ArrowLeft")
    keys.press("ArrowLeft")
    assert told() == words[0]["told"], "the first has none before it"
    keys.press("End")
    assert told() == words[-1]["told"]
    keys.press("Tab")
    assert told() == f"{len(words)} words in doubt"
    keys.press("Shift+Tab")
    assert told() == words[-1]["told"], "it comes back to the word it left"


def test_they_can_be_switched_off_and_outlive_a_reload(reader: Callable[..., Reader]) -> None:
    one = reader()
    one.open()
    one.set(**HASTY)
    one.ask(PROMPT)
    words = marked(one)
    one.page.click("#open-sampler")
    one.page.uncheck("#doubts")
    one.page.click("#close-sampler")
    assert {word["line"] for word in marked(one)} == {"none"}
    one.page.reload()
    one.page.wait_for_selector(".answer .doubt")
    assert marked(one) == words


def test_an_answer_in_mode_ar_has_none(reader: Callable[..., Reader]) -> None:
    one = reader()
    one.open()
    one.set(mode="ar", max_tokens=8)
    one.ask(PROMPT)
    assert marked(one) == [] and not one.page.locator(".answer > .readout").is_visible()
