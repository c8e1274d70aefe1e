"""Questions about stories: answers stand in the text, false claims are false, rows can be trained on and measured."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from dgemma.control.decide import Question
from dgemma.eval.decisions import Item
from dgemma.train.stories import make_story
from dgemma.train.stories.questions import HOLE, StoryQuestion, story_clozes, story_questions, story_row

SEEDS = range(5_000_000, 5_000_300)


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, StoryQuestion]]:
    return [(make_story(seed).text, one) for seed in SEEDS for one in story_questions(make_story(seed), seed)]


def test_answers_are_told_by_the_text(asked: list[tuple[str, StoryQuestion]]) -> None:
    """Read from the text alone, not from the facts that made it."""
    for text, one in asked:
        if one.topic == "colour":
            thing = one.text.removeprefix("What colour was the ").partition("?")[0]
            assert f"{one.answer} {thing}" in text
        elif one.topic == "is colour":
            thing, colour = re.fullmatch(r"Was the (.+) (\w+)\? \[\[answer\]\]\.", one.text).groups()  # type: ignore[union-attr]
            assert (f"{colour} {thing}" in text) == (one.answer == "Yes"), one
        elif one.topic == "is there":
            name = one.text.split()[1]
            assert bool(re.search(rf"\b{name}\b", text)) == (one.answer == "Yes"), (name, text)
        elif one.topic == "count":
            name = one.text.split()[3]
            assert len(re.findall(name, text)) == int(one.answer) <= 9
        else:
            assert one.topic.endswith("kind") or one.answer in text, one


def test_claims_are_as_often_false(asked: list[tuple[str, StoryQuestion]]) -> None:
    said = Counter((one.topic, one.answer) for _, one in asked if one.kind == "yesno")
    for topic in ("is colour", "is kind", "is there"):
        total = said[topic, "Yes"] + said[topic, "No"]
        assert total > 200 and 0.4 < said[topic, "Yes"] / total < 0.6, topic
    assert {one.kind for _, one in asked} == {"yesno", "choice", "score"}


def test_a_row_holds_its_questions_and_differs_by_seed() -> None:
    row = story_row(7)
    questions = story_questions(make_story(7), 7)
    assert row["prompt"] == make_story(7).text + "\n\n"
    assert row["completion"].split("\n") == [one.told for one in questions] and HOLE not in row["completion"]
    assert story_row(7) == row != story_row(8)
    assert len({tuple(one.topic for one in story_questions(make_story(seed), seed)) for seed in range(20)}) > 10


def test_clozes_put_the_word_back_where_it_was() -> None:
    topics = Counter()
    for seed in SEEDS:
        story = make_story(seed)
        for one in story_clozes(story):
            topics[one.topic] += 1
            assert story.text.startswith(one.told) and one.answer in one.labels
            assert one.text.count(HOLE) == 1 and one.answer in one.text.partition(HOLE)[0], "named before"
    assert min(topics[topic] for topic in ("hero", "companion", "colour")) > 100


def test_questions_are_what_calibrate_reads(asked: list[tuple[str, StoryQuestion]]) -> None:
    for text, one in asked[:50]:
        row = {"template": f"{text} [[question]]", "kind": one.kind, "labels": list(one.labels), "text": one.text}
        item = Item.of({**row, "answer": one.answer})
        assert isinstance(item.question, Question) and item.question.labels[item.truth] == one.answer
