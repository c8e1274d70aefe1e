"""Text of an answer as it becomes final: stop texts, held-back text, thoughts, the places of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_kit import byte_fallback, byte_level, save_tokenizer

from dgemma.server.text import Assembler, StopFinder
from dgemma.text.tokenizer import Tokenizer

LETTERS = st.text("ab", min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the stop text that is complete first begins, by looking at every prefix."""
    for end in range(1, len(text) + 1):
        places = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if places:
            return min(places)
    return None


@settings(deadline=None, max_examples=400)
@given(st.lists(st.text("abc", max_size=5), max_size=8), st.lists(LETTERS, min_size=1, max_size=4))
def test_stop_texts_are_found_wherever_the_text_is_cut(parts: list[str], stops: list[str]) -> None:
    finder, whole, released = StopFinder(stops), "".join(parts), ""
    for count, part in enumerate(parts):
        released += finder.push(part)
        seen = "".join(parts[: count + 1])
        place = first_stop(seen, stops)
        assert finder.found == (place is not None)
        if place is not None:
            assert released == seen[:place]
        else:
            # Nothing is given out that may still belong to a stop text, and nothing is held for less.
            held = seen[len(released) :]
            assert seen.startswith(released)
            assert held == "" or any(stop.startswith(held) for stop in stops)
            longer = range(len(held) + 1, len(seen) + 1)
            assert not any(stop.startswith(seen[-size:]) for size in longer for stop in stops)
    released += finder.flush()
    place = first_stop(whole, stops)
    assert released == (whole if place is None else whole[:place])


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    made = {"byte_level": byte_level, "byte_fallback": byte_fallback}[request.param]()
    return Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp(request.param), made))


def together(assembler: Assembler, parts: list[list[int]]) -> tuple[str, str, list[int]]:
    pieces = [assembler.push(part) for part in parts] + [assembler.flush()]
    text, thought = ("".join(getattr(piece, name) for piece in pieces) for name in ("text", "thought"))
    return text, thought, [place for piece in pieces for place in piece.tokens]


def test_the_text_is_the_same_however_canvases_cut_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("once the café of Lily, then – the")
    for size in (1, 2, 3, len(ids)):
        assembler = Assembler(tokenizer)
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        assert together(assembler, parts) == (tokenizer.decode(ids), "", list(range(len(ids))))
        assert assembler.tokens == len(ids) and not assembler.stopped


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("stop", ["café", "f", "é ", "Lily", "once", " t", "e c", "the caf"])
def test_a_stop_text_cuts_text_and_tokens(tokenizer: Tokenizer, stop: str, size: int) -> None:
    ids = tokenizer.encode("once the café of Lily, then – the")
    whole = tokenizer.decode(ids)
    place = whole.index(stop)
    assembler = Assembler(tokenizer, [stop])
    text, _, places = together(assembler, [ids[start : start + size] for start in range(0, len(ids), size)])
    assert text == whole[:place] and assembler.stopped
    # A token counts if its text begins before the stop text: what comes before it is shorter than the cut.
    expected = sum(len(tokenizer.decode(ids[:count]).rstrip("\ufffd")) < place for count in range(len(ids)))
    assert assembler.tokens == expected
    assert places == list(range(expected))


def test_the_first_of_several_stop_texts_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("once the café of Lily")
    for stops in (["Lily", "the"], ["the", "Lily"], ["e", "the"]):
        text, _, _ = together(Assembler(tokenizer, stops), [ids])
        assert text == ("onc" if "e" in stops else "once ")


def test_a_thought_has_no_stop_and_no_places(tokenizer: Tokenizer) -> None:
    opened, closed = (tokenizer.token_id(name) for name in ("<|channel>", "<channel|>"))
    assert opened is not None and closed is not None
    thought, answer = tokenizer.encode("the end"), tokenizer.encode("once the")
    heading = tokenizer.encode("thought\n")
    ids = [opened, *heading, *thought, closed, *answer]
    aside = len(heading) + len(thought) + 2
    for size in (1, 3, len(ids)):
        parts = [ids[start : start + size] for start in range(0, len(ids), size)]
        plain = Assembler(tokenizer, [], thoughts=True)
        assert together(plain, parts) == ("once the", "the end", list(range(aside, len(ids))))
        assert plain.thought_tokens == aside
        stopping = Assembler(tokenizer, ["the"], thoughts=True)
        text, aloud, places = together(stopping, parts)
        assert (text, aloud) == ("once ", "the end")
        begun = sum(len(tokenizer.decode(answer[:count])) < len("once ") for count in range(len(answer)))
        assert stopping.tokens == aside + begun and places == list(range(aside, aside + begun))
        at_once = Assembler(tokenizer, ["once"], thoughts=True)
        assert together(at_once, parts) == ("", "the end", [])
        assert at_once.tokens == aside
