"""What tokens are as text: which of them begin a word, end in a space, are no text at all. For masks of places.

Knows a tokenizer and no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from dgemma.control.control import Mask
from dgemma.errors import RequestError
from dgemma.text.tokenizer import Tokenizer

_ANCHORS = ("", "a", "\n")
_UNIT = re.compile(r"\w+|[^\w\s]")
CLOSERS = ".,;:!?"


class Lexicon:
    """The texts of all `vocab` ids of a model, read once; ids that the tokenizer does not know have none."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab

    @cached_property
    def pieces(self) -> list[bytes]:
        """Empty for special tokens and whatever else is no text."""
        known = [piece or b"" for piece in self.tokenizer.token_bytes()][: self.vocab]
        return known + [b""] * (self.vocab - len(known))

    @cached_property
    def silent(self) -> tuple[int, ...]:
        """Ids without text."""
        return tuple(token for token, piece in enumerate(self.pieces) if not piece)

    @cached_property
    def spaced(self) -> Tensor:
        """`[V]` bool: begins with one space and something behind it."""
        return self._which(lambda piece: len(piece) > 1 and piece[:1] == b" " and not _text(piece[1:])[:1].isspace())

    @cached_property
    def padded(self) -> Tensor:
        """`[V]` bool: begins with a white space."""
        return self._which(lambda piece: _text(piece)[:1].isspace())

    @cached_property
    def trailing(self) -> Tensor:
        """`[V]` bool: ends in a white space."""
        return self._which(lambda piece: _text(piece)[-1:].isspace())

    @cached_property
    def worded(self) -> Tensor:
        """`[V]` bool: all of it but a first space is one word: it has a letter or digit, and no space inside."""
        return self._which(lambda piece: len(piece.split()) == 1 and any(c.isalnum() for c in _text(piece)))

    @cached_property
    def broken(self) -> Tensor:
        """`[V]` bool: no whole characters."""
        return self._which(lambda piece: "\ufffd" in _text(piece))

    def ending_like(self, units: set[str]) -> Tensor:
        """`[V]` bool: whose last unit is one of `units` (see `units`)."""
        return self._which(lambda piece: bool(found := _UNIT.findall(_text(piece).casefold())) and found[-1] in units)

    def held(self, text: str) -> tuple[int, ...]:
        """Ids that decode to exactly `text` wherever they stand, whatever is before them.

        Some tokenizers put a space before a text or drop one: then the ids are taken from behind another text.
        """
        if not text:
            return ()
        tokenizer = self.tokenizer
        for anchor in _ANCHORS:
            before = tokenizer.encode(anchor) if anchor else []
            ids = tokenizer.encode(anchor + text)
            own = ids[len(before) :]
            if ids[: len(before)] != before or tokenizer.decode_after(own, skip_special=False) != text:
                continue
            if special := [token for token in own if token in tokenizer.special_ids]:
                name = tokenizer.decode(special[:1], skip_special=False)
                raise RequestError(
                    f"the text holds the special token {name!r}; it can stand before the first hole only"
                )
            return tuple(own)
        raise RequestError(
            f"this model's tokenizer cannot write {_short(text)!r} exactly as it is, so it cannot be kept"
        )

    def _which(self, rule: Callable[[bytes], bool]) -> Tensor:
        return torch.tensor([bool(piece) and rule(piece) for piece in self.pieces], dtype=torch.bool)


class Masks:
    """Masks of places, each made once: requests with the same one can be predicted together."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        self._known: dict[tuple[bool | None, bool, bool, frozenset[str], frozenset[int], bool], Mask] = {}

    def of(
        self,
        *,
        spaced: bool | None = None,
        ends: bool = False,
        word: bool = False,
        after: frozenset[str] = frozenset(),
        without: frozenset[int] = frozenset(),
        whole: bool = False,
    ) -> Mask:
        """`spaced`: begins with a space, or (False) does not. `ends`: not in one. `word`: a whole word. `after`: units
        that it does not end in. `without`: tokens. `whole`: of whole characters."""
        key = (spaced, ends, word, after, without, whole)
        if key not in self._known:
            self._known[key] = Mask(self._banned(*key))
        return self._known[key]

    def _banned(
        self,
        spaced: bool | None,
        ends: bool,
        word: bool,
        after: frozenset[str],
        without: frozenset[int],
        whole: bool,
    ) -> Tensor:
        lexicon = self._lexicon
        banned = torch.zeros(lexicon.vocab, dtype=torch.bool)
        banned[list({*lexicon.silent, *without})] = True
        if spaced is not None:
            banned |= ~lexicon.spaced if spaced else lexicon.padded
        if ends:
            banned |= lexicon.trailing
        if word:
            banned |= ~lexicon.worded
        if after:
            banned |= lexicon.ending_like(set(after))
        if whole:
            banned |= lexicon.broken
        return banned


def units(text: str) -> list[str]:
    """Words and single other signs, without case and spaces."""
    return _UNIT.findall(text.casefold())


def echoes(fill: str, text: str) -> bool:
    """Whether `fill` ends in a beginning of the `text` behind it, or says its first three units before.

    A single sign is no echo unless it would stand twice in a row; closing signs are: `so.` before `.` or `,`.
    """
    own, next_ = units(fill), units(text)
    if not own or not next_:
        return False
    for count in range(1, min(len(own), len(next_)) + 1):
        if own[-count:] == next_[:count] and (count > 1 or _is_word(next_[0])):
            return True
    if not _is_word(next_[0]) and text[:1] == next_[0] and own[-1] in doubles(text):
        return True
    return any(own[at : at + 3] == next_[:3] for at in range(len(own) - 2)) and len(next_) >= 3


def doubles(text: str) -> frozenset[str]:
    """The units that a fill before `text` must not end in, for they would stand there twice."""
    following = units(text)
    if not following:
        return frozenset()
    first = following[0]
    if _is_word(first):
        return frozenset({first})
    return frozenset(CLOSERS if first in CLOSERS else first) if text[:1] == first else frozenset()


def _is_word(unit: str) -> bool:
    return unit[0].isalnum() or unit[0] == "_"


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
