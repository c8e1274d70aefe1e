r"""Text with holes: `The [[...]] sat on the [[... 3 words ...]]`, read into text and holes. Knows no tokens.

A hole is `[[...]]` (any length), `[[... 3 words ...]]`, `[[... 2-6 tokens ...]]` or `[[a short reason]]`, which tells
the model what belongs there. `\[[` is no hole but two brackets; a backslash before a hole is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dgemma.errors import RequestError

OPEN, CLOSE = "[[", "]]"
WORDS, TOKENS = "words", "tokens"
MOST_TOKENS = 256
_ALLOWED = (
    "a hole is [[...]], [[... 3 words ...]], [[... 5 tokens ...]], [[... 2-6 tokens ...]] or [[an instruction]]; "
    r"\[[ stands for two brackets"
)
_MARK = re.compile(r"(\\*)\[\[")
_DOTS = r"(?:\.\.\.|…)?"
_SIZE = re.compile(rf"{_DOTS}\s*(\d+)(?:\s*-\s*(\d+))?\s+(words?|tokens?)\s*{_DOTS}")


@dataclass(frozen=True)
class Hole:
    """A place to be filled with `low` to `high` (None: any number of) `unit`s. `instruction` says with what.

    A fill that is not `tight` may begin and end in spaces.
    """

    low: int = 1
    high: int | None = None
    unit: str = TOKENS
    instruction: str = ""
    tight: bool = True

    @property
    def written(self) -> str:
        """The hole as it stands in a template."""
        if self.instruction:
            return f"[[{self.instruction}]]"
        if self.high is None:
            return "[[...]]"
        span = f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}"
        return f"[[... {span} {self.unit if self.high > 1 else self.unit[:-1]} ...]]"


@dataclass(frozen=True)
class Template:
    """`texts[i]` stands before `holes[i]`, the last text behind all of them."""

    texts: tuple[str, ...]
    holes: tuple[Hole, ...]

    def __post_init__(self) -> None:
        assert len(self.texts) == len(self.holes) + 1

    def filled(self, fills: Sequence[str]) -> str:
        """The text with every hole filled."""
        return self.texts[0] + "".join(fill + text for fill, text in zip(fills, self.texts[1:], strict=True))

    @property
    def written(self) -> str:
        """The text that `parse` reads as this template."""
        *before, last = (escaped(text) for text in self.texts)
        # A backslash before a hole would take its brackets for text.
        parts = [*(text + "\\" * (len(text) - len(text.rstrip("\\"))) for text in before), last]
        return parts[0] + "".join(hole.written + text for hole, text in zip(self.holes, parts[1:], strict=True))

    @property
    def instructions(self) -> tuple[str, ...]:
        return tuple(hole.instruction for hole in self.holes if hole.instruction)


def parse(text: str) -> Template:
    """The template that `text` writes; `RequestError` with the place of what is wrong."""
    texts, holes = [""], []
    at = 0
    while found := _MARK.search(text, at):
        texts[-1] += text[at : found.start()] + "\\" * (len(found[1]) // 2)
        if len(found[1]) % 2:
            texts[-1] += OPEN
            at = found.end()
            continue
        end = text.find(CLOSE, found.end())
        if end < 0:
            raise _fault(text, found.end() - 2, f"a hole begins {{place}} and does not end; {_ALLOWED}")
        inner = text[found.end() : end]
        if OPEN in inner:
            raise _fault(text, found.end() - 2, f"the hole {{place}} has another one inside; {_ALLOWED}")
        holes.append(_hole(inner.strip(), text, found.end() - 2))
        texts.append("")
        at = end + 2
    texts[-1] += text[at:]
    if not holes:
        raise RequestError(f"the text has no hole; {_ALLOWED}")
    return Template(tuple(texts), tuple(holes))


def escaped(text: str) -> str:
    """`text` as a template without holes: `parse` of it and a hole gives it back."""
    return _MARK.sub(lambda found: found[1] * 2 + "\\" + OPEN, text)


def _hole(inner: str, text: str, at: int) -> Hole:
    if inner in ("...", "…"):
        return Hole()
    size = _SIZE.fullmatch(inner)
    if not size:
        if not inner or not re.search(r"\w", inner):
            raise _fault(text, at, f"the hole {{place}} says {inner!r}; {_ALLOWED}")
        return Hole(instruction=inner)
    low, high = int(size[1]), int(size[2] or size[1])
    if not 1 <= low <= high <= MOST_TOKENS:
        raise _fault(
            text,
            at,
            f"the hole {{place}} asks for {inner.strip('. …')}; it may have 1 to {MOST_TOKENS}, the lower first",
        )
    return Hole(low, high, WORDS if size[3].startswith("word") else TOKENS)


def _fault(text: str, at: int, message: str) -> RequestError:
    line, column = text.count("\n", 0, at) + 1, at - (text.rfind("\n", 0, at) + 1) + 1
    place = f"at character {column}" if "\n" not in text else f"at line {line}, character {column}"
    return RequestError(message.replace("{place}", place))
