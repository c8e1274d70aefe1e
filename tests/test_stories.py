"""Laws of the story grammar: what it tells is clean, what is corrupted is caught, and chats honour their
requests."""

import random
import re

import pytest

from dgemma.train.stories import Story, check, consistency, make_chat, make_story, words
from dgemma.train.stories.grammar import gender_of, plots, split_sentences

STORIES = [make_story(seed) for seed in range(1000)]
ALL_NAMES = words.BOYS + words.GIRLS + words.HE_ANIMALS + words.SHE_ANIMALS


def test_every_story_is_clean():
    wrong = {story.text: faults for story in STORIES if (faults := check(story.text))}
    assert not wrong, next(iter(wrong.items()))


def test_every_plot_is_told_and_half_begin_once_upon_a_time():
    assert {story.plot for story in STORIES} == {plot.name for plot in plots()}
    assert 0.3 < sum(story.text.startswith("Once upon a time") for story in STORIES) / len(STORIES) < 0.6


def test_same_seed_same_story():
    assert [make_story(seed) for seed in range(50)] == STORIES[:50]
    assert len({story.text for story in STORIES}) == len(STORIES)
    assert make_chat(7) == make_chat(7)


def test_no_slot_is_left_open():
    for story in STORIES:
        assert not re.search(r"[{}\[\]|]|  ", story.text), story.text


def test_choice_is_small_and_length_is_bounded():
    tokens = [len(re.findall(r"\w+|[^\w\s]+|\n", story.text)) for story in STORIES]
    assert 0.2 < sum(story.nats for story in STORIES) / sum(tokens) < 0.45
    assert min(tokens) > 100 and max(tokens) < 240


def test_stories_agree_with_their_facts():
    for story in STORIES:
        assert gender_of(story.hero) == story.gender != gender_of(story.companion)
        for fact in (story.hero, story.companion, story.thing, story.lesson, story.place, story.colour):
            assert fact in story.text


def _swap(text: str, word: str, other: str, rng: random.Random) -> str:
    at = rng.choice([match.span() for match in re.finditer(rf"\b{re.escape(word)}\b", text)])
    return text[: at[0]] + other + text[at[1] :]


def _corrupt(story: Story, kind: str, rng: random.Random) -> str | None:
    """One small damage; None when the story offers no place for it."""
    text = story.text
    if kind == "name":
        return _swap(
            text,
            story.hero,
            rng.choice([n for n in ALL_NAMES if n not in (story.hero, story.companion)]),
            rng,
        )
    if kind == "pronoun":
        pairs = {
            "he": "she",
            "she": "he",
            "He": "She",
            "She": "He",
            "his": "her",
            "himself": "herself",
            "His": "Her",
            "Her": "His",
        }
        present = [word for word in pairs if re.search(rf"\b{word}\b", text)]
        word = rng.choice(present) if present else ""
        return _swap(text, word, pairs[word], rng) if word else None
    if kind == "colour":
        if not story.colour or len(re.findall(rf"\b{story.colour}\b", text)) < 2:
            return None
        return _swap(text, story.colour, rng.choice([c for c in words.COLOURS if c != story.colour]), rng)
    if kind == "place":
        if len(re.findall(rf"\b{story.place}\b", text)) < 2 or not story.place:
            return None
        return _swap(text, story.place, rng.choice([p for p in words.PLACES if p != story.place]), rng)
    sentences = split_sentences(text)
    at = rng.randrange(len(sentences))
    if kind == "drop":
        return " ".join(sentences[:at] + sentences[at + 1 :])
    if kind == "cut":
        return text[: rng.randrange(20, len(text) - 2)]
    if kind == "order":
        at = rng.randrange(len(sentences) - 1)
        return " ".join([*sentences[:at], sentences[at + 1], sentences[at], *sentences[at + 2 :]])
    return _swap(text, rng.choice(re.findall(r"\b[a-z]{4,}\b", text)), "purplish", rng)


@pytest.mark.parametrize("kind", ["name", "pronoun", "colour", "place", "drop", "cut", "order", "word"])
def test_corruptions_are_caught(kind: str):
    rng = random.Random(kind)
    damaged = [text for story in STORIES[:200] if (text := _corrupt(story, kind, rng))]
    assert len(damaged) > 50
    assert sum(bool(check(text)) for text in damaged) / len(damaged) >= 0.95


def test_consistency_grades():
    text = STORIES[0].text
    assert consistency(text) == 1.0
    assert consistency(text[: len(text) // 2]) == 1.0
    assert consistency("The engine was compiled. It failed at once.") == 0.0
    assert consistency("") == 0.0
    sentences = split_sentences(text)
    half = " ".join(s if i % 2 else "Nothing here is known." for i, s in enumerate(sentences))
    assert 0.2 < consistency(half) < 0.7


def test_the_fault_is_named():
    story = next(s for s in STORIES if s.colour == "red" and s.text.count(" red ") > 2)
    head, _, tail = story.text.rpartition(" red ")
    assert any("colour: 'red' became 'blue'" in fault for fault in check(f"{head} blue {tail}"))
    assert (
        check(story.text.rsplit(".", 2)[0] + ".") == ["the ending is missing"]
        or "ending" in check(story.text[:200])[-1]
    )


def test_chats_honour_the_request():
    kinds = "|".join((*words.ANIMALS, "boy", "girl"))
    stories = 0
    for seed in range(400):
        request, answer = make_chat(seed)
        if len(answer) < 200:
            continue
        stories += 1
        assert check(answer) == []
        for name in re.findall(rf"\b({'|'.join(ALL_NAMES)})\b", request):
            assert name in answer, request
        for kind in re.findall(rf"\ba ({kinds})\b", request):
            assert re.search(rf"\b{kind}\b", answer), request
        for colour, thing in re.findall(rf"\ba ({'|'.join(words.COLOURS)}) ([a-z ]+?)(?:[.?,]|$)", request):
            assert f"{colour} {thing}" in answer, request
        for place, phrase in words.PLACES.items():
            assert phrase not in request or place in answer, request
    assert stories > 300
