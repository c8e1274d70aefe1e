"""A text with holes as tokens: what is pinned where for given lengths of the holes, and what an answer says in them.

A fill neither begins nor ends in a space. One space before a hole is written with the fill, as most tokens begin with
their space; a mask makes the fill begin with it, so that the text around holes stays as it is. Knows a tokenizer, ids
and masks; no model and no requests.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dgemma.control.control import Control, Mask
from dgemma.control.lexicon import Lexicon, Masks, doubles, echoes
from dgemma.control.template import WORDS, Hole, Template
from dgemma.errors import RequestError

USUAL_MOST = 16
Lengths = tuple[int, ...]
"""Of each hole, in tokens."""


@dataclass(frozen=True)
class Layout:
    """Where everything stands for one choice of `lengths`: holes begin at `starts`, the last text ends at `size`."""

    lengths: Lengths
    starts: tuple[int, ...]
    size: int

    @property
    def spans(self) -> Iterator[slice]:
        return (slice(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True))


@dataclass(frozen=True)
class Reading:
    """What an answer says in the holes; `flaws[i]` is what is wrong with fill i: "", "echo", "words" or "text"."""

    fills: tuple[str, ...]
    flaws: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not any(self.flaws)


@dataclass
class Infill:
    """A template in a model's tokens, behind the ids `before`. `prompt` are all ids before the first hole, `tails[i]`
    those behind hole i.

    `gaps[i]` is the space that fill i begins with, or empty. A hole without text behind it is open: it may end early.
    `most` are the tokens at most of a hole that says nothing of its length.
    """

    lexicon: Lexicon
    template: Template
    before: tuple[int, ...]
    blank: tuple[int, ...]
    """Tokens that end or fill an answer: they may stand behind the last text, not before."""
    most: int = USUAL_MOST
    draft: tuple[int, ...] = ()
    """What the canvas starts from, instead of noise, where nothing is pinned."""
    prompt: tuple[int, ...] = field(init=False)
    gaps: tuple[str, ...] = field(init=False)
    texts: tuple[str, ...] = field(init=False)
    """What stands before, between and behind the fills, gaps taken off."""
    tails: tuple[tuple[int, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        *before, last = self.template.texts
        cut = [text[:-1] if _gap(text, place) else text for place, text in enumerate(before)]
        self.gaps = tuple(text[len(short) :] for text, short in zip(before, cut, strict=True))
        self.texts = (*cut, last)
        self.prompt = (*self.before, *self.lexicon.tokenizer.encode(self.texts[0]))
        self.tails = tuple(self.lexicon.held(text) for text in self.texts[1:])
        self._masks = Masks(self.lexicon)

    @property
    def open(self) -> bool:
        """Whether the last hole ends the text."""
        return not self.tails[-1]

    def layout(self, lengths: Lengths) -> Layout:
        starts, at = [], 0
        for length, tail in zip(lengths, self.tails, strict=True):
            starts.append(at)
            at += length + len(tail)
        return Layout(lengths, tuple(starts), at)

    def least(self) -> Lengths:
        """The shortest holes; a word has at least one token."""
        return tuple(hole.low for hole in self.template.holes)

    def choices(self, room: int) -> list[range]:
        """Lengths that each hole may have, if all but it are as short as they can be, in a canvas of `room`."""
        spare = room - self.layout(self.least()).size
        return [range(hole.low, self._most(place, hole, spare) + 1) for place, hole in enumerate(self.template.holes)]

    def _most(self, place: int, hole: Hole, spare: int) -> int:
        if hole.high is not None and hole.unit == WORDS:
            most = max(3 * hole.high, hole.high + 3)
        else:
            most = hole.high or max(self.most, hole.low)
        return max(hole.low, min(most, hole.low + max(0, spare)))

    def first(self, room: int, count: int) -> list[Lengths]:
        """Up to `count` choices of lengths that fit, each length of each hole in as many of them as can be."""
        choices = self.choices(room)
        ladders = [_ladder(choice, count) for choice in choices]
        if self.open and self.template.holes[-1].high is None:
            ladders[-1] = [choices[-1][-1]]
        wanted = min(count, math.prod(map(len, ladders)))
        # Each hole in an order of its own, or all would be long together.
        orders = [ladder if place == 0 else _shuffled(ladder, place) for place, ladder in enumerate(ladders)]
        found = dict.fromkeys(
            tuple(order[(turn + turn // len(order) * place) % len(order)] for place, order in enumerate(orders))
            for turn in range(4 * wanted)
        )
        fitting = [lengths for lengths in found if self.layout(lengths).size <= room]
        shortest = tuple(min(ladder) for ladder in ladders)
        return (fitting or [shortest])[:wanted]

    def near(self, lengths: Lengths, known: set[Lengths], room: int, count: int) -> list[Lengths]:
        """Up to `count` unknown choices that differ from `lengths` in one hole, the closest first."""
        choices = self.choices(room)
        found = []
        for step in (1, -1, 2, -2):
            for place, choice in enumerate(choices):
                if self.open and place == len(choices) - 1 and self.template.holes[place].high is None:
                    continue
                moved = (*lengths[:place], lengths[place] + step, *lengths[place + 1 :])
                if moved[place] in choice and moved not in known and self.layout(moved).size <= room:
                    found.append(moved)
        return found[:count]

    def control(self, lengths: Lengths, banned: Sequence[frozenset[int]] = (), whole: bool = False) -> Control:
        """Pins and masks of an answer. `banned` are tokens that the holes must not end in; `whole`: no parts of
        characters."""
        layout = self.layout(lengths)
        pins = tuple(
            (span.stop + place, token)
            for span, tail in zip(layout.spans, self.tails, strict=True)
            for place, token in enumerate(tail)
        )
        masks: list[tuple[int, Mask]] = []
        for number, span in enumerate(layout.spans):
            last = banned[number] if banned else frozenset[int]()
            masks += self._hole_masks(number, span, last, whole)
        silent = set(self.lexicon.silent) - set(self.blank)
        return Control(
            pins=pins, draft=self.draft, bans=tuple((token, None) for token in sorted(silent)), masks=tuple(masks)
        )

    def _hole_masks(self, number: int, span: slice, banned: frozenset[int], whole: bool) -> Iterator[tuple[int, Mask]]:
        hole, text = self.template.holes[number], self.texts[number + 1]
        ended = number == len(self.tails) - 1 and self.open
        words = hole.unit == WORDS and hole.high is not None and span.stop - span.start <= hole.high
        spaced = True if self.gaps[number] else False if hole.tight else None
        for place in range(span.start, span.stop):
            last, inside = place == span.stop - 1, place > span.start
            if ended and not words and inside:
                continue  # it may end anywhere
            yield (
                place,
                self._masks.of(
                    spaced=spaced if not inside else True if words else None,
                    ends=last and hole.tight,
                    word=words,
                    after=doubles(text) if last else frozenset(),
                    without=banned if last else frozenset(),
                    whole=whole,
                ),
            )

    def read(self, ids: Sequence[int], lengths: Lengths) -> Reading:
        """The fills of an answer, and their flaws."""
        tokenizer, layout = self.lexicon.tokenizer, self.layout(lengths)
        fills, flaws = [], []
        for number, span in enumerate(layout.spans):
            own = [token for token in ids[span] if token not in self.blank]
            written = tokenizer.decode_after(own, skip_special=False)
            gap = self.gaps[number]
            fills.append(written.removeprefix(gap))
            flaws.append("" if written.startswith(gap) and "\ufffd" not in written else "text")
            flaws[-1] = flaws[-1] or self._flaw(number, fills[-1])
        whole = "".join(g + f + t for g, f, t in zip(self.gaps, fills, self.texts[1:], strict=True))
        kept = [token for token in ids if token not in self.blank]
        if tokenizer.decode_after(kept, skip_special=False) != whole:
            flaws = [flaw or "text" for flaw in flaws]
        return Reading(tuple(fills), tuple(flaws))

    def _flaw(self, number: int, fill: str) -> str:
        hole = self.template.holes[number]
        if echoes(fill, self.texts[number + 1]):
            return "echo"
        count = len(fill.split())
        if hole.unit == WORDS and hole.high is not None and not hole.low <= count <= hole.high:
            return "words"
        return ""


def _gap(text: str, place: int) -> bool:
    """Whether the text ends in one space that the fill behind it is to begin with."""
    return text.endswith(" ") and not text[:-1][-1:].isspace() and (len(text) > 1 or place > 0)


def _ladder(choice: range, count: int) -> list[int]:
    """At most `count` of the lengths: all, or the short ones and then ever fewer."""
    if len(choice) <= count:
        return list(choice)
    if count == 1:
        return [choice[len(choice) // 2]]
    ratio = (choice[-1] / choice[0]) ** (1 / (count - 1))
    found: list[int] = []
    for step in range(count):
        wanted = round(choice[0] * ratio**step)
        found.append(max(wanted, found[-1] + 1) if found else choice[0])
    return [min(length, choice[-1]) for length in found]


def _shuffled(ladder: Sequence[int], salt: int) -> list[int]:
    return random.Random(salt).sample(list(ladder), len(ladder))


def check_room(least: int, room: int, truncate: bool) -> None:
    """Everything behind the first hole has to fit into a canvas, unless it may be cut into several."""
    if least > room and not truncate:
        raise RequestError(
            f"from the first hole on the text needs at least {least} tokens, and the widest canvas of this model "
            f"holds {room}: a hole cannot see behind its canvas. Shorten the text behind it, or allow it with truncate"
        )
