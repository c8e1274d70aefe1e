"""Reads the sentence notation of `plots` into plots, beats and lines. It knows nothing of random draws
or checking."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from dgemma.train.stories import words
from dgemma.train.stories.plots import PLOTS, SHARED
from dgemma.train.stories.plots_more import MORE_PLOTS

SLOT = re.compile(r"\{(\w+)\}")
CHOICE = re.compile(r"\[([^\]]+)\]")
PIECE = re.compile(r"\{(\w+)\}|\[([^\]]+)\]")  # a slot, or a choice that may hold slots
_TEMPLATE_CUT = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z]|\{[A-Z]|\[[A-Z])')
_TEXT_CUT = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=["A-Z])')


@dataclass(frozen=True, slots=True)
class Line:
    """One way to tell a beat: a template, how often it is taken, and its sentences."""

    text: str
    weight: int
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """One event of a plot; exactly one of its lines is told."""

    name: str
    lines: tuple[Line, ...]
    paragraph: bool


@dataclass(frozen=True)
class Plot:
    """A plot: its beats in order, the values of its own slots, and slots that follow another one (`do`
    follows `thing`)."""

    name: str
    beats: tuple[Beat, ...]
    values: Mapping[str, tuple[str, ...]]
    follows: Mapping[str, tuple[str, Mapping[str, str]]]


def split_sentences(text: str) -> list[str]:
    """Sentences of a plain text. Quotes do not hold sentences together, so `"No. I am here."` is two."""
    return [part for part in _TEXT_CUT.split(" ".join(text.split())) if part]


def _split_template(text: str) -> tuple[str, ...]:
    return tuple(_TEMPLATE_CUT.split(text))


def _line(source: str) -> Line:
    weight, _, rest = source.partition("* ")
    text, count = (rest, int(weight)) if weight.isdigit() else (source, 1)
    return Line(text.strip(), count, _split_template(text.strip()))


def _beats(source: str) -> Iterator[tuple[str, list[str]]]:
    """Each beat as (its mark: a name, "" or "&", its lines); a bare "@name" has no lines."""
    mark: str = ""
    lines: list[str] = []
    for raw in source.splitlines():
        row = raw.strip()
        if row.startswith(("=", "@")) and lines:
            yield mark, lines
            mark, lines = "", []
        if row == "&":
            if lines:
                yield mark, lines
            mark, lines = "&", []
        elif row.startswith("@"):
            yield row + mark, []
            mark = ""
        elif row.startswith(("=", "-")):
            lines.append(row[1:].strip())
    if lines:
        yield mark, lines


def _shared() -> dict[str, tuple[Line, ...]]:
    blocks = re.split(r"^@", SHARED, flags=re.M)[1:]
    return {
        block.splitlines()[0].strip(): tuple(
            _line(row[1:].strip()) for row in block.splitlines()[1:] if row[:1] in ("=", "-")
        )
        for block in blocks
    }


def _plot(source: str, shared: Mapping[str, tuple[Line, ...]]) -> Plot:
    head, _, body = source.partition("\n")
    values: dict[str, tuple[str, ...]] = {}
    follows: dict[str, tuple[str, Mapping[str, str]]] = {}
    rows = []
    for row in body.splitlines():
        match = re.match(r"^([a-z]+)(?:/([a-z]+))? = (.+)$", row)
        if not match:
            rows.append(row)
            continue
        name, other, listed = match.groups()
        items = listed.split("|")
        values[name] = tuple(item.split("/")[0] for item in items)
        if other:
            table = dict(item.split("/") for item in items)
            follows[other] = (name, table)
            values[other] = tuple(dict.fromkeys(table.values()))
    beats = []
    for number, (mark, lines) in enumerate(_beats("\n".join(rows))):
        name = mark.strip("@&") or str(number)
        told = shared[name] if mark.startswith("@") else tuple(map(_line, lines))
        beats.append(Beat(name, told, "&" in mark))
    return Plot(head.strip(), tuple(beats), values, follows)


@lru_cache(maxsize=1)
def plots() -> tuple[Plot, ...]:
    """All plots of the grammar, parsed once."""
    shared = _shared()
    return tuple(_plot(source, shared) for source in re.split(r"^# ", PLOTS + MORE_PLOTS, flags=re.M)[1:])


def names(gender: str, human: bool) -> tuple[str, ...]:
    """Names of one gender ("m", "f") for children or for animals."""
    if human:
        return words.BOYS if gender == "m" else words.GIRLS
    return words.HE_ANIMALS if gender == "m" else words.SHE_ANIMALS


def gender_of(name: str) -> str:
    """The fixed gender of a name: "m", "f", or "" for a name the grammar does not have."""
    if name in words.BOYS or name in words.HE_ANIMALS:
        return "m"
    return "f" if name in words.GIRLS or name in words.SHE_ANIMALS else ""


def kind_fits(kind: str, name: str) -> bool:
    """Whether a boy, girl or animal can have this name."""
    if kind in ("boy", "girl"):
        return name in (words.BOYS if kind == "boy" else words.GIRLS)
    return name in words.HE_ANIMALS or name in words.SHE_ANIMALS
