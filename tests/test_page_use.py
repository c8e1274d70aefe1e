"""Using the page: keyboard, phone, keys, history, faults, settings; in a real browser, before a real server."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from typing import Any

import page_kit
import pytest
from page_kit import Reader, sse

from dgemma.api import LLM

pytest_plugins = ["page_fixtures"]

KEY = "sk-of-this-test"
NARROW_SCREEN = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def test_a_conversation_by_keyboard_alone(reader: Callable[..., Reader]) -> None:
    one = reader()
    one.open()
    keys, page = one.page.keyboard, one.page
    keys.type("Tell me a story.")
    keys.press("Enter")
    one.wait()
    names = []
    for _ in range(40):
        keys.press("Shift+Tab")
        told = page.evaluate(
            """() => { const one = document.activeElement, look = getComputedStyle(one);
              const sibling = one.nextElementSibling && getComputedStyle(one.nextElementSibling);
              return { name: one.getAttribute("aria-label") || one.labels?.[0]?.textContent || one.textContent.trim(),
                seen: look.outlineStyle !== "none" || sibling?.outlineStyle === "solid",
                steps: one.matches(".steps") } }"""
        )
        assert told["name"] and told["seen"], told
        names.append(told["name"])
        if told["steps"]:
            break
    assert names[-1] == "Step"
    last = page.inner_text(".count")
    keys.press("Home")
    assert page.inner_text(".count").startswith("1 /") and page.inner_text(".count") != last
    before = one.cells()
    keys.press("ArrowRight")
    assert page.inner_text(".count").startswith("2 /") and one.cells() != before
    keys.press("PageUp")
    keys.press("PageUp")
    keys.press("Space")
    page.wait_for_selector(".play[aria-label=Pause]")
    keys.press("Space")
    page.wait_for_selector(".play[aria-label=Play]")
    keys.press("/")
    keys.type("Another one, please.")
    keys.press("Enter")
    one.wait()
    first, second = one.sent
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][:1] == first["messages"]
    assert second["messages"][1]["content"] == page.text_content(".turn:first-child .answer .words:visible")


def test_a_phone_needs_no_sideways_scroll(reader: Callable[..., Reader]) -> None:
    one = reader(**NARROW_SCREEN)
    one.open()
    one.ask("Tell me a story about " + "a" * 200)
    one.show(0, 0)
    for panel in (None, "list", "sampler"):
        if panel:
            one.page.click(f"#open-{panel}")
        wide = one.page.evaluate(
            """() => [...document.querySelectorAll("body *")]
              .filter(one => one.checkVisibility() && !one.closest(".unseen, .skip"))
              .filter(one => { const box = one.getBoundingClientRect();
                return box.width && (box.right > 390.5 || box.left < -0.5) })
              .map(one => one.outerHTML.slice(0, 80))"""
        )
        assert wide == []
        assert one.page.evaluate("document.documentElement.scrollWidth") == 390
        if panel:
            assert one.page.locator(f"#{panel}").is_visible()
            assert one.page.evaluate("document.getElementById('main').inert")
            one.page.keyboard.press("Escape")
            assert not one.page.locator(f"#{panel}").is_visible()


def test_a_server_with_keys_asks_for_one(reader: Callable[..., Reader], llm: LLM) -> None:
    with page_kit.serving(llm, api_keys=(KEY,)) as address:
        one = reader(address)
        one.open(ready="#banner #key")
        assert "API key" in one.page.inner_text("#banner")
        one.page.fill("#key", "sk-another")
        one.page.keyboard.press("Enter")
        one.page.wait_for_selector("text=not among its keys")
        one.page.fill("#key", KEY)
        one.page.keyboard.press("Enter")
        one.page.wait_for_selector("#send:not([disabled])")
        assert not one.page.locator("#banner").is_visible()
        one.ask("Tell me a story.")
        assert one.page.text_content(".answer .words:visible")
        kept = one.page.evaluate("() => [JSON.stringify({...sessionStorage}), JSON.stringify({...localStorage})]")
        assert KEY in kept[0] and KEY not in kept[1]


def test_reload_keeps_the_conversation_and_its_canvases(reader: Callable[..., Reader]) -> None:
    one = reader()
    one.open()
    one.page.click("#system-row summary")
    one.page.fill("#system", "Tell short stories.")
    one.ask("Tell me a story.")
    one.show(1, 0)
    text, before = one.page.inner_text("#turns .answer"), one.cells()
    one.page.reload()
    one.page.wait_for_selector("#send:not([disabled])")
    one.page.wait_for_selector(".grid .cell")
    one.show(1, 0)
    assert (one.page.inner_text("#turns .answer"), one.cells()) == (text, before)
    assert one.page.input_value("#system") == "Tell short stories."
    assert one.sent[0]["messages"][0] == {"role": "system", "content": "Tell short stories."}

    # Edit and send again: one answer in place of the old one, asked with the new words.
    one.page.click(".question .actions button")
    one.page.fill(".edit textarea", "Tell me a story about a hen.")
    one.page.keyboard.press("Enter")
    one.wait()
    assert one.page.locator(".turn").count() == 1
    assert one.sent[1]["messages"][-1]["content"] == "Tell me a story about a hen."

    # A second conversation beside it; deleting the first leaves the second.
    one.page.click("#new")
    one.ask("Write a story.")
    one.page.hover("#conversations li:last-child")
    one.page.click("#conversations li:last-child .drop")
    assert one.page.locator("#conversations li").count() == 2, "one click must not delete"
    one.page.click("#conversations li:last-child .drop")
    assert one.page.locator("#conversations .open").all_inner_texts() == ["Write a story."]


@pytest.mark.parametrize(
    ("how", "told"),
    [("429", r"full.*wait 7 s"), ("gone", r"not there"), ("cut", r"not there"), ("in the stream", r"failed.*planted")],
)
def test_a_fault_is_told_and_can_be_tried_again(reader: Callable[..., Reader], how: str, told: str) -> None:
    one = reader()
    one.open()
    fault = {"error": {"message": "planted", "type": "x", "param": None, "code": "engine_full"}}
    cut = 'data: {"choices": [{"index": 0, "delta": {"content": "Once"}, "finish_reason": null}]}\n\n'
    kind = "text/event-stream"
    acts: dict[str, Callable[[Any], None]] = {
        "429": lambda route: route.fulfill(status=429, headers={"retry-after": "7"}, json=fault),
        "gone": lambda route: route.abort(),
        "cut": lambda route: route.fulfill(content_type=kind, body=cut),
        "in the stream": lambda route: route.fulfill(content_type=kind, body=cut + sse(fault)),
    }
    one.page.route("**/v1/chat/completions", acts[how])
    one.ask("Tell me a story.")
    assert re.search(told, one.page.inner_text(".answer [role=alert]"))
    if how in ("cut", "in the stream"):
        assert one.page.text_content(".answer > .words") == "Once", "what had come must stay"
    one.page.unroute("**/v1/chat/completions")
    one.page.click(".answer [role=alert] button")
    one.wait()
    assert one.page.locator(".answer").count() == 1
    assert not one.page.locator(".answer [role=alert]").is_visible()
    assert one.record()["reason"] in ("stop", "length")


def test_escape_stops_an_answer(reader: Callable[..., Reader]) -> None:
    one = reader()
    one.open()
    held: list[Any] = []
    one.page.route("**/v1/chat/completions", lambda route: held.append(route))  # it does not answer
    one.page.fill("#input", "Tell me a story.")
    one.page.keyboard.press("Enter")
    one.page.wait_for_selector("#stop:visible")
    assert one.page.get_attribute(".answer", "aria-busy") == "true"
    one.page.keyboard.press("Escape")
    one.wait()
    assert one.record()["reason"] == "abort"
    assert "Stopped" in one.page.inner_text(".answer")
    held[0].abort()


CHANGED = {
    "max_tokens": 40, "temperature": 0.5, "top_p": 0.9, "top_k": 50, "seed": 5,
    "mode": "ar", "steps": 9, "canvas_length": 32, "narrow": "never",
    "verify_pace": "fixed", "verify_draft": "sample",
    "sampler": "confidence", "accept_confidence": 0.7, "t_max": 0.9, "t_min": 0.3,
    "stability_threshold": 2, "confidence_threshold": None, "convention": "jax", "trace": True,
}  # fmt: skip
TOP = ("max_tokens", "temperature", "top_p", "top_k", "seed")


def test_controls_send_what_differs_and_nothing_else(reader: Callable[..., Reader], url: str) -> None:
    one = reader()
    one.open()
    plain = {"model", "stream", "stream_options", "messages", "path"}
    one.ask("Tell me a story.")
    assert set(one.sent[-1]) == plain
    one.set(entropy_bound=0.2)  # before another sampler hides it
    one.set(**CHANGED)
    one.ask("Tell me a story.")
    own = {name: value for name, value in CHANGED.items() if name not in TOP} | {"entropy_bound": 0.2}
    assert {name: one.sent[-1][name] for name in TOP} == {name: CHANGED[name] for name in TOP}
    assert one.sent[-1]["dgemma"] == own
    assert not one.page.locator(".answer [role=alert]").last.is_visible()
    with urllib.request.urlopen(f"{url}v1/models") as answer:
        fields = json.load(answer)["data"][0]["dgemma"]["generation"]
    assert set(fields) - {"max_new_tokens"} <= {*own, *TOP}, "the API has a field without a control"
    one.page.click("#open-sampler")
    one.page.click("#reset")
    assert one.page.locator(".row.changed").count() == 0
    one.page.click("#close-sampler")
    one.ask("Tell me a story.")
    assert set(one.sent[-1]) == plain


def test_a_model_without_a_chat_template_completes(reader: Callable[..., Reader]) -> None:
    puzzle = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    with page_kit.serving(LLM.load("sudoku")) as address:
        one = reader(address)
        one.open()
        assert not one.page.locator("#system-row").is_visible()
        one.set(seed=1)
        one.ask(puzzle)
    assert one.sent[0]["path"] == "v1/completions" and one.sent[0]["prompt"] == puzzle
    answer = one.page.text_content(".answer > .words") or ""
    assert re.fullmatch(re.escape(puzzle) + "[1-9]{81}", answer)
    assert "".join(cell["text"] for cell in one.cells()) == answer.removeprefix(puzzle)
    tops = one.page.locator(".grid .cell").evaluate_all("cells => new Set(cells.map(one => one.offsetTop)).size")
    assert tops == 9, "a board is nine rows high"


def test_light_and_dark(reader: Callable[..., Reader]) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        one = reader(color_scheme=scheme)
        one.open()
        ground = lambda one=one: one.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")  # noqa: E731
        grounds.append(ground())
    one.page.click("#theme")
    assert one.page.inner_text("#theme") == "Light" and ground() == grounds[0] != grounds[1]
    one.page.reload()
    assert ground() == grounds[0], "the choice is kept"
