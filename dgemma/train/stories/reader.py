"""Reads a text back with the story grammar: `check` names faults, `consistency` gives the share without any.

Every sentence is matched with all slots open; then the plot whose order explains the text best is found, and
the slots are compared in reading order with what the story said first. So a wrong colour is told apart from
an unknown sentence.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from dgemma.train.stories import words
from dgemma.train.stories.grammar import PIECE, Plot, gender_of, kind_fits, plots, split_sentences

_SAME = {
    "H": "hero", "C": "companion", "kind": "kind", "ckind": "companion's kind", "col": "colour",
    "place": "place", "fam": "family", "gender": "pronoun of the hero", "other": "pronoun of the companion",
    "fgender": "pronoun of the family", "timed": "time",
}  # fmt: skip
_MISS, _ORDER, _UNKNOWN = 1.0, 1.2, 1.1
_GAP, _STRANGE = "something is missing before", "unknown sentence shape"


@dataclass(frozen=True)
class _Pattern:
    regex: re.Pattern[str]
    slots: tuple[str, ...]


@dataclass(frozen=True)
class _Grammar:
    """Sentence patterns, an index by first word ("" for any), and each plot's places of a pattern."""

    patterns: tuple[_Pattern, ...]
    by_word: Mapping[str, tuple[int, ...]]
    spots: Mapping[str, Mapping[int, tuple[tuple[int, int, int], ...]]]


def _surfaces(slot: str) -> tuple[str, ...]:
    """Every wording a slot can have in any story; names are open and handled apart."""
    bare = slot[1:].capitalize() if slot in ("Che", "Chis") else slot
    bare = slot[1:] if slot in ("che", "chim", "chis", "fhe") else bare
    if bare in words.PRONOUNS:
        return words.PRONOUNS[bare]
    tables: dict[str, tuple[str, ...]] = {
        "kind": (*words.ANIMALS, "boy", "girl"), "ckind": (*words.ANIMALS, "boy", "girl"),
        "col": words.COLOURS, "place": tuple(words.PLACES), "inplace": tuple(words.PLACES.values()),
        "fam": tuple(words.FAMILY), "Long": words.LONG_AGO, "One": words.ONE_DAY,
        "When": words.WHEN_LONG + words.WHEN_DAY,
    }  # fmt: skip
    if slot in tables:
        return tables[slot]
    return tuple(dict.fromkeys(value for plot in plots() for value in plot.values.get(slot, ())))


def _regex(template: str, slots: list[str]) -> str:
    """A regular expression for a template with every slot open; appends its groups' slots to `slots`."""
    parts, at = [], 0
    for match in PIECE.finditer(template):
        parts.append(re.escape(template[at : match.start()]))
        slot, options = match.groups()
        if options:
            parts.append("(?:" + "|".join(_regex(option, slots) for option in options.split("|")) + ")")
        else:
            name = f"(?!(?:{'|'.join(words.NOT_NAMES)})\\b)[A-Z][a-z]+"
            known = "|".join(sorted(map(re.escape, _surfaces(slot)), key=len, reverse=True))
            parts.append(f"({name if slot in ('H', 'C') else known})")
            slots.append(slot)
        at = match.end()
    return "".join(parts) + re.escape(template[at:])


def _first_words(sentence: str) -> set[str]:
    """The words a template sentence can start with; "" when it can be any name."""
    match = PIECE.match(sentence)
    if not match:
        return {_first_word(sentence)} if not re.match(r"\S*[\[{]", sentence) else {""}
    if match[1] in ("H", "C"):
        return {""}
    return {_first_word(option) for option in (_surfaces(match[1]) if match[1] else match[2].split("|"))}


def _pattern(sentence: str) -> _Pattern:
    slots: list[str] = []
    return _Pattern(re.compile(_regex(sentence, slots) + r"\Z"), tuple(slots))


def _first_word(sentence: str) -> str:
    return sentence.split(" ")[0].strip(",")


@lru_cache(maxsize=1)
def _grammar() -> _Grammar:
    numbers: dict[str, int] = {}
    spots: dict[str, dict[int, list[tuple[int, int, int]]]] = {}
    for plot in plots():
        table = spots.setdefault(plot.name, {})
        for b, beat in enumerate(plot.beats):
            for k, line in enumerate(beat.lines):
                for part, sentence in enumerate(line.sentences):
                    table.setdefault(numbers.setdefault(sentence, len(numbers)), []).append((b, k, part))
    patterns: list[_Pattern] = []
    index: dict[str, list[int]] = {}
    for number, sentence in enumerate(numbers):
        patterns.append(_pattern(sentence))
        for word in _first_words(sentence):
            index.setdefault(word, []).append(number)
    frozen = {name: {n: tuple(found) for n, found in table.items()} for name, table in spots.items()}
    return _Grammar(tuple(patterns), {word: tuple(found) for word, found in index.items()}, frozen)


def _matches(sentence: str) -> dict[int, tuple[tuple[str, str], ...]]:
    """Patterns that fit a sentence, each with its (slot, wording) pairs."""
    grammar = _grammar()
    found = {}
    for number in (*grammar.by_word.get(_first_word(sentence), ()), *grammar.by_word.get("", ())):
        match = grammar.patterns[number].regex.match(sentence)
        if match:
            found[number] = tuple(
                (slot, said)
                for slot, said in zip(grammar.patterns[number].slots, match.groups(), strict=True)
                if said is not None
            )
    return found


def _follows(plot: Plot, before: tuple[int, int, int] | None, after: tuple[int, int, int]) -> bool:
    if before is None:
        return after[0] == 0 and after[2] == 0
    b, k, part = before
    if part + 1 < len(plot.beats[b].lines[k].sentences):
        return after == (b, k, part + 1)
    return after[0] == b + 1 and after[2] == 0


def _is_end(plot: Plot, spot: tuple[int, int, int] | None) -> bool:
    return (
        spot is not None
        and spot[0] == len(plot.beats) - 1
        and spot[2] == len(plot.beats[-1].lines[spot[1]].sentences) - 1
    )


@dataclass(frozen=True)
class _Step:
    """How one sentence was read: its slots (None when unknown) and what is wrong with its position."""

    pairs: tuple[tuple[str, str], ...] | None
    fault: str


def _align(plot: Plot, found: list[dict[int, tuple[tuple[str, str], ...]]]) -> tuple[float, tuple[_Step, ...], bool]:
    """The cheapest reading of the sentences as this plot: (cost, steps, whether it reached the ending)."""
    table = _grammar().spots[plot.name]
    states: dict[tuple[int, int, int] | None, tuple[float, tuple[_Step, ...]]] = {None: (0.0, ())}
    for matches in found:
        fresh: dict[tuple[int, int, int] | None, tuple[float, tuple[_Step, ...]]] = {}
        places = [(spot, pairs) for number, pairs in matches.items() for spot in table.get(number, ())]
        for before, (cost, steps) in states.items():
            options = [(before, cost + _UNKNOWN, _Step(None, _STRANGE))]
            for spot, pairs in places:
                if _follows(plot, before, spot):
                    options.append((spot, cost, _Step(pairs, "")))
                elif before is None or spot > before:
                    options.append((spot, cost + _MISS, _Step(pairs, _GAP)))
                else:
                    options.append((spot, cost + _ORDER, _Step(pairs, "order of events")))
            for state, total, step in options:
                if state not in fresh or total < fresh[state][0]:
                    fresh[state] = (total, (*steps, step))
        states = fresh
    final, (cost, steps) = min(states.items(), key=lambda item: item[1][0] + (not _is_end(plot, item[0])) * 0.5)
    return cost, steps, _is_end(plot, final)


def _claims(slot: str, wording: str) -> tuple[tuple[str, str], ...]:
    """What a filled slot says about the story, as (fact, value)."""
    if slot in ("H", "C"):
        return ((slot, wording), ("gender" if slot == "H" else "other", gender_of(wording)))
    if slot == "inplace":
        return (("place", next(place for place, phrase in words.PLACES.items() if phrase == wording)),)
    if slot == "fam":
        return (("fam", wording), ("fgender", words.FAMILY[wording]))
    if slot in ("Long", "One", "When"):
        return (
            (
                "timed",
                "yes" if (wording in words.ONE_DAY and slot == "One") or wording in words.WHEN_DAY else "no",
            ),
        )
    bare = slot[1:] if slot.lower() in ("che", "chim", "chis", "fhe") else slot
    if bare.capitalize() in ("He", "Him", "His", "Himself"):
        owner = "fgender" if slot == "fhe" else "other" if slot[0] in "cC" else "gender"
        return ((owner, "f" if wording.lower() in ("she", "her", "herself") else "m"),)
    return ((slot, wording),)


def _conflicts(plot: Plot, steps: tuple[_Step, ...]) -> list[list[str]]:
    """Per sentence, the facts that disagree with what was said before or with the plot."""
    facts: dict[str, str] = {}
    result: list[list[str]] = []
    for number, step in enumerate(steps):
        faults: list[str] = []
        for slot, wording in step.pairs or ():
            for fact, value in _claims(slot, wording):
                if fact == "timed" and number:
                    facts.setdefault(fact, "no")
                if fact in plot.values and value not in plot.values[fact]:
                    faults.append(f"{fact} {value!r} does not belong to this plot")
                if value == "":
                    faults.append(f"unknown name {wording!r}")
                elif facts.setdefault(fact, value) != value:
                    faults.append(f"{_SAME.get(fact, fact)}: {facts[fact]!r} became {value!r} ({wording!r})")
        faults += _mismatched(plot, facts) if not faults else []
        result.append(faults)
    return result


def _mismatched(plot: Plot, facts: dict[str, str]) -> list[str]:
    """Pairs of facts that cannot be together; each is reported once, then the later fact is taken as said."""
    faults = []
    for kind, name in (("kind", "H"), ("ckind", "C")):
        if kind in facts and name in facts and gender_of(facts[name]) and not kind_fits(facts[kind], facts[name]):
            faults.append(f"name {facts[name]!r} does not fit a {facts[kind]}")
            del facts[kind]
    if facts.get("gender") and facts.get("gender") == facts.get("other"):
        faults.append("hero and companion have the same gender")
        del facts["other"]
    for slot, (leader, table) in plot.follows.items():
        if slot in facts and leader in facts and table.get(facts[leader]) != facts[slot]:
            faults.append(f"{slot} {facts[slot]!r} does not fit {facts[leader]!r}")
            del facts[slot]
    return faults


def _read(text: str) -> tuple[list[str], list[list[str]], bool]:
    """The sentences, the faults of each, and whether the ending was reached."""
    sentences = split_sentences(text)
    found = [_matches(sentence) for sentence in sentences]
    readings = [(*_align(plot, found), plot) for plot in plots()]
    least = min(cost + 0.5 * (not ended) for cost, _, ended, _ in readings)
    best: tuple[list[list[str]], bool] | None = None
    for cost, steps, ended, plot in readings:
        if cost + 0.5 * (not ended) > least:
            continue
        placed = [
            # An unknown sentence stands for what is missing: one fault, not two.
            "" if step.fault == _GAP and at and steps[at - 1].fault == _STRANGE else step.fault
            for at, step in enumerate(steps)
        ]
        faults = [
            ([fault] if fault else []) + wrong for fault, wrong in zip(placed, _conflicts(plot, steps), strict=True)
        ]
        if best is None or sum(map(len, faults)) < sum(map(len, best[0])):
            best = (faults, ended)
    assert best is not None
    return sentences, best[0], best[1]


def check(text: str) -> list[str]:
    """What is wrong with a complete story, in reading order; empty when the grammar could have told it."""
    if not text.strip():
        return ["the text is empty"]
    sentences, faults, ended = _read(text)
    said = [f"{fault}: {sentence}" for sentence, wrong in zip(sentences, faults, strict=True) for fault in wrong]
    return said if ended else [*said, "the ending is missing"]


def consistency(text: str) -> float:
    """Share of sentences, 0 to 1, that the grammar knows and that agree with what came before.

    An unfinished last sentence is left out, so that a text may be cut anywhere.
    """
    sentences = split_sentences(text)
    if sentences and not re.search(r'[.!?]"?\Z', sentences[-1]):
        sentences.pop()
    if not sentences:
        return 0.0
    _, faults, _ = _read(" ".join(sentences))
    return sum(not wrong for wrong in faults) / len(faults)
