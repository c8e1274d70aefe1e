"""Templates: what is a hole, what is text, and where a mistake is said to be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.control.template import TOKENS, WORDS, Hole, Template, escaped, parse
from dgemma.errors import RequestError


@pytest.mark.parametrize(
    ("written", "hole"),
    [
        ("[[...]]", Hole()),
        ("[[…]]", Hole()),
        ("[[ ... ]]", Hole()),
        ("[[... 3 words ...]]", Hole(3, 3, WORDS)),
        ("[[...1 word...]]", Hole(1, 1, WORDS)),
        ("[[... 5 tokens ...]]", Hole(5, 5, TOKENS)),
        ("[[... 2-6 tokens ...]]", Hole(2, 6, TOKENS)),
        ("[[… 2 - 4 words …]]", Hole(2, 4, WORDS)),
        ("[[2 words]]", Hole(2, 2, WORDS)),
        ("[[a short reason]]", Hole(instruction="a short reason")),
        ("[[3 wordy birds]]", Hole(instruction="3 wordy birds")),
    ],
)
def test_holes(written: str, hole: Hole) -> None:
    assert parse(f"a {written}b") == Template(("a ", "b"), (hole,))
    assert parse(hole.written).holes == (hole,), "what it writes, it reads"


def test_text_and_holes_alternate() -> None:
    assert parse("[[...]]").texts == ("", "")
    template = parse("The [[...]] sat\non [[... 2 words ...]][[...]]. ]] [x]")
    assert template.texts == ("The ", " sat\non ", "", ". ]] [x]")
    assert template.filled(["cat", "a", "mat"]) == "The cat sat\non amat. ]] [x]"


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        (r"a \[[...]] [[...]]", ("a [[...]] ", "")),
        (r"a \\[[...]]", ("a \\", "")),
        (r"a \\\[[...]] [[...]]", ("a \\[[...]] ", "")),
        (r"a\b \[ [[...]]\n", ("a\\b \\[ ", "\\n")),
    ],
)
def test_escapes(text: str, texts: tuple[str, ...]) -> None:
    assert parse(text).texts == texts


text = st.text(st.sampled_from("[]\\ .a\n"), max_size=12)


@given(st.lists(text, min_size=2, max_size=4))
def test_escaped_text_comes_back(parts: list[str]) -> None:
    # A bracket right before a hole would become a part of it.
    parts = [part.rstrip("[") for part in parts[:-1]] + parts[-1:]
    template = Template(tuple(parts), tuple(Hole(n + 1, n + 1) for n in range(len(parts) - 1)))
    assert parse(template.written) == template
    assert all(escaped(part) == part for part in parts if "[[" not in part)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no hole", "no hole"),
        ("only \\[[...]] text", "no hole"),
        ("ab [[... ", "begins at character 4 and does not end"),
        ("ab\ncd [[...]] [[x", "begins at line 2, character 12 and does not end"),
        ("[[ a [[...]]", "at character 1 has another one inside"),
        ("x [[]]", "at character 3 says ''"),
        ("x [[?]]", "at character 3 says '\\?'"),
        ("x [[... 0 words ...]]", "asks for 0 words; it may have 1 to 256"),
        ("x [[... 6-2 tokens ...]]", "asks for 6-2 tokens"),
        ("x [[... 257 tokens ...]]", "asks for 257 tokens"),
    ],
)
def test_mistakes_have_a_place(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse(text)
