"""Questions about stories: answers stand in the text, false claims are false, rows can be trained on and measured."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from dgemma.control.decide import Question
from dgemma.eval.decisions import Item
from dgemma.train.stories import make_story
from dgemma.train.stories.questions import (
    FACTS,
    HOLE,
    StoryQuestion,
    facts_row,
    has,
    opening,
    question_parts,
    story_clozes,
    story_facts,
    story_questions,
)

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
        elif one.topic.endswith("there"):
            word = re.fullmatch(r"Is (?:a |anything )?(.+) there\? \[\[answer\]\]\.", one.text).group(1)  # type: ignore[union-attr]
            assert bool(re.search(rf"\b{word}\b", text)) == (one.answer == "Yes"), (word, text)
        elif one.topic == "is animal":
            assert (re.search(r" (boy|girl|[a-z]+) (?:named|called) ", text).group(1) not in ("boy", "girl")) == (  # type: ignore[union-attr]
                one.answer == "Yes"
            )
        elif one.topic == "is she":
            assert one.answer in ("Yes", "No")
        elif one.topic == "is kind":
            name, kind = re.fullmatch(r"Was (\w+) a (\w+)\? \[\[answer\]\]\.", one.text).groups()  # type: ignore[union-attr]
            assert has(text, name) and has(text, kind), "the word alone does not tell"
        elif one.topic == "count":
            name = one.text.split()[3]
            assert len(re.findall(name, text)) == int(one.answer) <= 9
        else:
            assert one.topic.endswith("kind") or one.answer in text, one


def test_claims_are_as_often_false(asked: list[tuple[str, StoryQuestion]]) -> None:
    said = Counter((one.topic, one.answer) for _, one in asked if one.kind == "yesno")
    for topic in {topic for topic, _ in said}:
        total = said[topic, "Yes"] + said[topic, "No"]
        assert total > 200 and 0.4 < said[topic, "Yes"] / total < 0.6, topic
    assert {one.kind for _, one in asked} == {"yesno", "choice", "score"}


def test_no_word_tells_its_answer() -> None:
    """Presence: the share of yes among all questions with one word is a half, whatever the word, within the noise."""
    said: dict[str, Counter[str]] = {}
    for seed in range(6_000_000, 6_002_000):
        for one in story_questions(make_story(seed), seed):
            if one.topic.endswith("there"):
                said.setdefault(one.text, Counter())[one.answer] += 1
    deviations = [(of["Yes"] - of["No"]) / of.total() ** 0.5 for of in said.values() if of.total() > 20]
    assert len(deviations) > 60 and max(map(abs, deviations)) < 4.5
    assert sum(z * z for z in deviations) / len(deviations) < 1.6, "a half of each word's answers is yes"


def test_parts_are_the_story_and_its_questions() -> None:
    parts, questions = question_parts(7), story_questions(make_story(7), 7)
    text, _, lines = "".join(asked + answer for asked, answer in parts).rpartition("\n\n")
    assert text == make_story(7).text and HOLE not in lines
    assert lines.split("\n") == [one.told for one in questions]
    assert all(answer.startswith(f" {one.answer}") for (_, answer), one in zip(parts, questions, strict=True))
    assert question_parts(7) == parts != question_parts(8)
    assert question_parts(7, whole=False)[0][0].startswith(opening(make_story(7), 4).text)


def test_facts_are_written_as_an_answer_of_their_schema_is() -> None:
    kinds = Counter()
    for seed in SEEDS:
        facts, row = story_facts(make_story(seed)), facts_row(seed)
        told = json.loads(row["completion"])
        assert row["prompt"] == make_story(seed).text + "\n" and told.items() <= facts.items()
        assert row["completion"] == "{" + ", ".join(f'"{name}": "{value}"' for name, value in told.items()) + "}"
        whole = len(told) == len(facts)
        kinds["in order" if list(told) == list(facts) else "shuffled" if whole else "some"] += 1
        assert list(facts) == [name for name in FACTS if name in facts]
    assert kinds["in order"] > 150 and min(kinds["shuffled"], kinds["some"]) > 30


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
