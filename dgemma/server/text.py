"""Tokens to text as it becomes final: thoughts apart, stop texts cut out, every token's place known.

Tokens are taken one at a time, so the outcome depends on them alone, not on how canvases cut them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dgemma.text.chat import CHANNEL_CLOSE, CHANNEL_OPEN, AnswerStream
from dgemma.text.tokenizer import StreamDecoder, Tokenizer


class StopFinder:
    """Finds the stop text that is complete first. Text that may begin one is held back until that is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take more text; what is certainly no part of a stop text. After a find there is no more."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        places = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)[1]]
        keep = self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The end: what was held back was no stop text."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        longest = min(max(map(len, self._stops)) - 1, len(text))
        for size in range(longest, 0, -1):
            end = text[len(text) - size :]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


@dataclass(frozen=True)
class Piece:
    """What became final: text of the answer, of a thought, and the answer's tokens (by place) whose text is out now."""

    text: str = ""
    thought: str = ""
    tokens: tuple[int, ...] = ()


class Assembler:
    """The text of one answer. `push` tokens without the end token; `flush` at the end."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), thoughts: bool = False) -> None:
        """`thoughts` tells what stands between channel tokens apart from the answer."""
        self._plain = None if thoughts else StreamDecoder(tokenizer)
        self._answers = AnswerStream(tokenizer) if thoughts else None
        self._channel = {tokenizer.token_id(name): name == CHANNEL_OPEN for name in (CHANNEL_OPEN, CHANNEL_CLOSE)}
        self._thinking = False
        self._finder = StopFinder(stops)
        self._starts: list[int] = []  # where in the answer a token's text begins; -1: it is part of a thought
        self._decoded = self._released = self._told = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found: nothing that comes after it counts."""
        return self._finder.found

    @property
    def tokens(self) -> int:
        """Tokens taken; once stopped, those whose text begins before the stop text."""
        return len(self._starts)

    @property
    def thought_tokens(self) -> int:
        return self._starts.count(-1)

    def push(self, ids: Sequence[int]) -> Piece:
        """Take final tokens."""
        text = thought = ""
        for token in ids:
            if self.stopped:
                break
            marks = self._answers is not None and token in self._channel
            self._starts.append(-1 if marks or self._thinking else self._decoded)
            self._thinking = self._channel[token] if marks else self._thinking
            new, aside = self._decode([token])
            text, thought = text + self._release(new), thought + aside
        return self._piece(text, thought)

    def flush(self) -> Piece:
        """What is still held back."""
        if self.stopped:
            return Piece()
        new, thought = self._decode(None)
        text = self._release(new)
        return self._piece(text + self._finder.flush(), thought, last=True)

    def _decode(self, ids: Sequence[int] | None) -> tuple[str, str]:
        """Text and thought of more tokens; of None: the rest."""
        if self._answers is None:
            assert self._plain is not None
            return (self._plain.flush() if ids is None else self._plain.push(ids)), ""
        parts = self._answers.flush() if ids is None else self._answers.push(ids)
        return "".join(part.text for part in parts), "".join(part.thought for part in parts)

    def _release(self, text: str) -> str:
        self._decoded += len(text)
        return self._finder.push(text)

    def _piece(self, text: str, thought: str, last: bool = False) -> Piece:
        self._released += len(text)
        if self.stopped:
            while self._starts and self._starts[-1] >= self._released:
                self._starts.pop()
        elif last:
            self._released = self._decoded + 1
        begun = self._told
        while self._told < len(self._starts) and self._starts[self._told] < self._released:
            self._told += 1
        return Piece(text, thought, tuple(n for n in range(begun, self._told) if self._starts[n] >= 0))
