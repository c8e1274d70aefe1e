"""What of a given text is to be written anew: chosen spans of characters, or the tokens that are least likely.

An edit is a template (`control.infill`) with holes as long as what stood there. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dgemma.config import is_whole
from dgemma.control.lexicon import Lexicon
from dgemma.control.template import Hole, Template
from dgemma.errors import RequestError

Span = tuple[int, int]
"""Characters from the first on, up to but without the second."""


@dataclass(frozen=True)
class Change:
    """`old` stood at the characters `start:end` of the given text, `new` stands in its place."""

    start: int
    end: int
    old: str
    new: str


def checked(text: str, spans: Sequence[Sequence[int]]) -> list[Span]:
    """The spans in order, without spaces at their ends; spans that touch become one."""
    found: list[Span] = []
    for span in sorted(map(_span, spans)):
        start, end = span
        if not 0 <= start < end <= len(text):
            raise RequestError(f"spans: {start}:{end} is not in the text, which has characters 0:{len(text)}")
        inner = text[start:end]
        if not inner.strip():
            raise RequestError(f"spans: {start}:{end} holds nothing but spaces: {inner!r}")
        start, end = end - len(inner.lstrip()), start + len(inner.rstrip())
        if found and start < found[-1][1]:
            raise RequestError(f"the spans {found[-1][0]}:{found[-1][1]} and {span[0]}:{span[1]} overlap")
        if found and start == found[-1][1]:
            start = found.pop()[0]
        found.append((start, end))
    if not found:
        raise RequestError("there are no spans to edit; give at least 1")
    return found


def _span(given: Sequence[int]) -> Span:
    if len(given) != 2 or not all(map(is_whole, given)):
        raise RequestError(f"a span is two whole numbers, first and end character; got {given!r}")
    return given[0], given[1]


def template_of(lexicon: Lexicon, text: str, spans: Sequence[Span], resize: int = 0) -> Template:
    """The text with a hole for each span, of as many tokens as it has, give or take `resize`."""
    texts, holes, at = [], [], 0
    for start, end in spans:
        gap = " " if text[at:start].endswith(" ") else ""
        size = len(lexicon.held(gap + text[start:end]))
        texts.append(text[at:start])
        holes.append(Hole(max(1, size - resize), size + resize))
        at = end
    return Template((*texts, text[at:]), tuple(holes))


def token_spans(lexicon: Lexicon, text: str, ids: Sequence[int]) -> list[Span]:
    """The characters that each token of `text` has a part in; a character may be of several tokens."""
    starts = [0]
    for character in text:
        starts.append(starts[-1] + len(character.encode()))
    place = {byte: at for at, byte in enumerate(starts)}
    spans, byte = [], 0
    for token in ids:
        begin, byte = byte, byte + len(lexicon.pieces[token])
        first = max(at for at in range(begin, max(-1, begin - 4), -1) if at in place)
        last = min(at for at in range(byte, byte + 4) if at in place)
        spans.append((place[first], place[last]))
    return spans


def doubted(text: str, spans: Sequence[Span], logprobs: Sequence[float], share: float, keep: Span) -> list[Span]:
    """The words around the least likely `share` of the tokens, one at least; what is outside of `keep` stays.

    Whole words, because what is left of one would have to be gone on with.
    """
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise RequestError(f"doubt is a share of the tokens, more than 0 and at most 1; got {share!r}")
    start, end = keep
    able = [
        number
        for number, (first, last) in enumerate(spans)
        if start <= first < last <= end and text[first:last].strip()
    ]
    if not able:
        raise RequestError(f"there is no token to doubt in the characters {start}:{end} of the text")
    count = max(1, math.floor(share * len(able) + 0.5))
    chosen = sorted(sorted(able, key=lambda number: logprobs[number])[:count])
    found: list[Span] = []
    for number in chosen:
        first, last = _grown(text, *spans[number], keep)
        if found and first <= found[-1][1] + (text[found[-1][1] : first] == " "):
            before = found.pop()
            first, last = before[0], max(last, before[1])
        found.append((first, last))
    return checked(text, found)


def _grown(text: str, first: int, last: int, keep: Span) -> Span:
    """The span without its outer spaces, with the rest of the words that it begins and ends in."""
    inner = text[first:last]
    first, last = last - len(inner.lstrip()), first + len(inner.rstrip())
    while first > keep[0] and _within(text[first - 1 : first + 1]):
        first -= 1
    while last < keep[1] and _within(text[last - 1 : last + 1]):
        last += 1
    return first, last


def _within(pair: str) -> bool:
    return all(character.isalnum() or character in "_'" for character in pair)


def kept(text: str, prefix: int, suffix: int) -> Span:
    """The characters that may change if the first `prefix` and the last `suffix` ones may not."""
    for name, value in (("keep_prefix", prefix), ("keep_suffix", suffix)):
        if not is_whole(value, 0, len(text)):
            raise RequestError(f"{name} is a number of characters, 0..{len(text)} of this text; got {value!r}")
    if prefix + suffix >= len(text):
        raise RequestError(f"keep_prefix {prefix} and keep_suffix {suffix} leave nothing of {len(text)} characters")
    return prefix, len(text) - suffix
