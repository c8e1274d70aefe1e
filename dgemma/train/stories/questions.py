"""Closed questions about a told story, and its facts as JSON: small tasks for decision reads and for constraints.

It knows no model.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from dgemma.train.stories import words
from dgemma.train.stories.tell import Story, make_story

HOLE = "[[answer]]"
_KINDS = (*words.ANIMALS, "boy", "girl")
_NAMES = (*words.BOYS, *words.GIRLS, *words.HE_ANIMALS, *words.SHE_ANIMALS)
_MOST = 9  # what "how many" counts up to
_DECOYS = 10_000_000  # added to a seed: the story whose words are asked for in vain
_THERE = (  # topic, question, words, and how many of a story's are asked for
    ("name there", "Is {} there?", _NAMES, 2),
    ("kind there", "Is a {} there?", _KINDS, 2),
    ("colour there", "Is anything {} there?", words.COLOURS, 1),
    ("place there", "Is {} there?", tuple(words.PLACES), 1),
)
FACTS = ("hero", "kind", "companion", "companion_kind", "place", "thing", "colour")


@dataclass(frozen=True)
class StoryQuestion:
    """One question of `kind` "yesno", "choice" or "score" about a `topic`.

    `text` has a hole where one of `labels` belongs; `answer` is the right one.
    """

    topic: str
    kind: str
    text: str
    labels: tuple[str, ...]
    answer: str

    @property
    def told(self) -> str:
        """The question with its answer."""
        return self.text.replace(HOLE, self.answer)


def story_questions(story: Story, seed: int, sentences: int | None = None) -> list[StoryQuestion]:
    """Every question that the story answers, in the order of `seed`, which also draws what is false.

    `sentences`: the story is an opening of so many (see `opening`).
    """
    rng = random.Random(f"questions {seed}")
    decoy = make_story(seed + _DECOYS)
    if sentences:
        decoy = opening(decoy, sentences)
    asked = [one for make in _TOPICS if (one := make(story, rng)) is not None]
    asked += _presence(story, decoy, rng)
    rng.shuffle(asked)
    return asked


def opening(story: Story, sentences: int) -> Story:
    """The first sentences of a story. Its facts are those of the whole."""
    ends = [match.end() for match in re.finditer(r'[.!?]"?(?=\s|$)', story.text)]
    return replace(story, text=story.text[: ends[:sentences][-1]])


def question_parts(seed: int, *, whole: bool = True) -> list[tuple[str, str]]:
    """To train on: a seed's story, or three to five sentences of it, and its questions, one a line.

    Pairs of what is asked, the story before the first, and what is answered, to the end of its line.
    """
    story, sentences = make_story(seed), None if whole else 3 + seed % 3
    if sentences:
        story = opening(story, sentences)
    parts, before = [], f"{story.text}\n\n"
    for question in story_questions(story, seed, sentences):
        asked, behind = question.text.split(HOLE)
        parts.append((f"{before}{asked.rstrip()}", f" {question.answer}{behind}"))
        before = "\n"
    return parts


def story_facts(story: Story) -> dict[str, str]:
    """What a story tells of the fields in `FACTS`, in their order."""
    return {name: value for name in FACTS if (value := getattr(story, name))}


def facts_row(seed: int) -> dict[str, str]:
    """To train on: the story of a seed, and its facts as a schema's answer writes them.

    Of ten rows six have all facts in order, two in any order, two have only some.
    """
    story, rng = make_story(seed), random.Random(f"facts {seed}")
    facts = list(story_facts(story).items())
    kind = rng.random()
    if kind < 0.4:
        rng.shuffle(facts)
    if kind < 0.2:
        facts = facts[: rng.randint(1, len(facts) - 1)]
    return {"prompt": f"{story.text}\n", "completion": json.dumps(dict(facts))}


def _yes_no(topic: str, text: str, truth: bool) -> StoryQuestion:
    return StoryQuestion(topic, "yesno", f"{text} {HOLE}.", ("Yes", "No"), "Yes" if truth else "No")


def _claim(rng: random.Random, right: str, others: tuple[str, ...]) -> tuple[str, bool]:
    """The right word, or as often a wrong one."""
    truth = rng.random() < 0.5
    return (right if truth else rng.choice([word for word in others if word != right])), truth


def _is_colour(story: Story, rng: random.Random) -> StoryQuestion | None:
    if f"{story.colour} {story.thing}" not in story.text or not story.colour:
        return None
    colour, truth = _claim(rng, story.colour, words.COLOURS)
    return _yes_no("is colour", f"Was the {story.thing} {colour}?", truth)


def _is_kind(story: Story, rng: random.Random) -> StoryQuestion | None:
    """Both kinds are in the story: whose is it?"""
    people = [(story.hero, story.kind), (story.companion, story.companion_kind)]
    if not all(has(story.text, word) for pair in people for word in pair):
        return None
    rng.shuffle(people)
    (name, kind), (_, other) = people
    truth = rng.random() < 0.5
    return _yes_no("is kind", f"Was {name} a {kind if truth else other}?", truth) if kind != other else None


def _is_animal(story: Story, rng: random.Random) -> StoryQuestion | None:
    return _of_hero(story, "is animal", "Is the hero an animal?", story.kind in words.ANIMALS)


def _is_she(story: Story, rng: random.Random) -> StoryQuestion | None:
    return _of_hero(story, "is she", "Is the hero a she?", story.gender == "f")


def _of_hero(story: Story, topic: str, text: str, truth: bool) -> StoryQuestion | None:
    """The hero is whom the story calls by kind and name first."""
    return _yes_no(topic, text, truth) if has(story.text, story.hero) and has(story.text, story.kind) else None


def _presence(story: Story, decoy: Story, rng: random.Random) -> list[StoryQuestion]:
    """Does a word occur? One of the story that the decoy lacks, or as often one of the decoy that the story lacks.

    Both are stories alike, so that every word is as often there as not, and the word alone tells nothing.
    """
    asked = []
    for topic, text, among, count in _THERE:
        own, others = ([word for word in among if has(one.text, word)] for one in (story, decoy))
        rng.shuffle(own)
        rng.shuffle(others)
        for at in range(count):
            truth = rng.random() < 0.5
            options, without = (own, others) if truth else (others, own)
            if at < len(options) and options[at] not in without:
                asked.append(_yes_no(topic, text.format(options[at]), truth))
    return asked


def has(text: str, word: str) -> bool:
    """Whether a text has a word, or words, whole."""
    return re.search(rf"\b{word}\b", text) is not None


def _colour(story: Story, rng: random.Random) -> StoryQuestion | None:
    if f"{story.colour} {story.thing}" not in story.text or not story.colour:
        return None
    text = f"What colour was the {story.thing}? It was {HOLE}."
    return StoryQuestion("colour", "choice", text, words.COLOURS, story.colour)


def _friend(story: Story, rng: random.Random) -> StoryQuestion | None:
    if not (has(story.text, story.hero) and has(story.text, story.companion)):
        return None
    text = f"Who was with {story.hero}? It was {HOLE}."
    return StoryQuestion("friend", "choice", text, _NAMES, story.companion)


def _kind(story: Story, rng: random.Random) -> StoryQuestion | None:
    name, kind = rng.choice([(story.hero, story.kind), (story.companion, story.companion_kind)])
    if not (has(story.text, name) and has(story.text, kind)):
        return None
    return StoryQuestion("kind", "choice", f"What was {name}? A {HOLE}.", _KINDS, kind)


def _place(story: Story, rng: random.Random) -> StoryQuestion | None:
    told = [place for place in words.PLACES if place in story.text]
    if told != [story.place]:
        return None
    return StoryQuestion("place", "choice", f"Where was it? Near {HOLE}.", tuple(words.PLACES), story.place)


def _count(story: Story, rng: random.Random) -> StoryQuestion | None:
    name = rng.choice([story.hero, story.companion])
    times = story.text.count(name)
    if not 1 <= times <= _MOST:
        return None
    labels = tuple(map(str, range(1, _MOST + 1)))
    return StoryQuestion("count", "score", f"How often is {name} named? {HOLE} times.", labels, str(times))


_TOPICS: tuple[Callable[[Story, random.Random], StoryQuestion | None], ...] = (
    _is_animal, _is_she, _is_colour, _is_kind, _colour, _friend, _kind, _place, _count,
)  # fmt: skip


def story_clozes(story: Story) -> list[StoryQuestion]:
    """The story up to the last time that it names its hero, companion or colour, with a hole for that word and the rest
    of its sentence behind. Needs no training: it is what the story says next.
    """
    told = [
        ("hero", story.hero, _NAMES),
        ("companion", story.companion, _NAMES),
        ("colour", story.colour, words.COLOURS),
    ]
    found = []
    for topic, word, labels in told:
        spots = [match for match in re.finditer(rf"(?<= ){word}\b", story.text)] if word else []
        if len(spots) > 1:
            start, end = spots[-1].span()
            rest = re.split(r'(?<=[.!?,"])', story.text[end:], maxsplit=1)[0]
            found.append(StoryQuestion(topic, "choice", f"{story.text[:start]}{HOLE}{rest}", labels, word))
    return found
