"""Closed questions about a told story, with their answers: a small task for decision reads. It knows no model."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from dgemma.train.stories import words
from dgemma.train.stories.tell import Story, make_story

HOLE = "[[answer]]"
_KINDS = (*words.ANIMALS, "boy", "girl")
_NAMES = (*words.BOYS, *words.GIRLS, *words.HE_ANIMALS, *words.SHE_ANIMALS)
_MOST = 9  # what "how many" counts up to


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


def story_questions(story: Story, seed: int) -> list[StoryQuestion]:
    """Every question that the story answers, in the order of `seed`, which also draws what is false."""
    rng = random.Random(f"questions {seed}")
    asked = [one for make in _TOPICS if (one := make(story, rng)) is not None]
    rng.shuffle(asked)
    return asked


def story_row(seed: int) -> dict[str, str]:
    """A row to train on: the story of a seed, and its questions with their answers, one a line."""
    story = make_story(seed)
    lines = "\n".join(question.told for question in story_questions(story, seed))
    return {"prompt": f"{story.text}\n\n", "completion": lines}


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


def _is_kind(story: Story, rng: random.Random) -> StoryQuestion:
    kind, truth = _claim(rng, story.companion_kind, _KINDS)
    return _yes_no("is kind", f"Was {story.companion} a {kind}?", truth)


def _is_there(story: Story, rng: random.Random) -> StoryQuestion:
    others = tuple(name for name in _NAMES if name not in story.text.replace(".", " ").replace(",", " ").split())
    name, truth = _claim(rng, rng.choice([story.hero, story.companion]), others)
    return _yes_no("is there", f"Was {name} there?", truth)


def _colour(story: Story, rng: random.Random) -> StoryQuestion | None:
    if f"{story.colour} {story.thing}" not in story.text or not story.colour:
        return None
    text = f"What colour was the {story.thing}? It was {HOLE}."
    return StoryQuestion("colour", "choice", text, words.COLOURS, story.colour)


def _friend(story: Story, rng: random.Random) -> StoryQuestion:
    text = f"Who was with {story.hero}? It was {HOLE}."
    return StoryQuestion("friend", "choice", text, _NAMES, story.companion)


def _kind(story: Story, rng: random.Random) -> StoryQuestion:
    name, kind = rng.choice([(story.hero, story.kind), (story.companion, story.companion_kind)])
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
    _is_colour, _is_kind, _is_there, _colour, _friend, _kind, _place, _count,
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
