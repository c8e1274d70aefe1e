"""Figures of generated texts: variety, planted copies, the grammar's verdict, and the n-gram judge."""

import math
import random

import numpy as np
import pytest

from dgemma.errors import DataError
from dgemma.eval.judge import NgramJudge
from dgemma.eval.samples import CopyIndex, distinct, story_score, words
from dgemma.train.stories import make_story

BOS, EOS, FIRST = 2, 1, 3
TEXTS = [make_story(seed).text for seed in range(400)]


def test_words_ignore_case_and_punctuation() -> None:
    assert words('"Don\'t," said Ünal-Ben.\n\nOK') == [w.encode() for w in ("don't", "said", "ünal", "ben", "ok")]


def test_distinct_counts_over_all_texts() -> None:
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "a b"], 2) == 0.5
    assert distinct(["a"], 2) == distinct([], 1) == 0


def test_a_planted_copy_is_found_and_nothing_else() -> None:
    index = CopyIndex.build(TEXTS)
    sentence = " ".join(TEXTS[7].split()[20:40])  # 20 words hold 9 runs of 12
    assert index.copied([f"unheard {sentence} of"]) == (9, 11)
    assert index.copied([f"UNHEARD, {sentence.upper()}! of"]) == (9, 11)
    changed = sentence.split()
    changed[10] = "xylophone"
    assert index.copied([" ".join(changed)]) == (0, 9)
    assert index.copied(["one two three", ""]) == (0, 0) and index.share([""]) == 0


def test_copies_do_not_run_across_texts() -> None:
    numbers = [f"w{n}" for n in range(24)]
    index = CopyIndex.build([" ".join(numbers[:12]), " ".join(numbers[12:])])
    assert len(index) == 2
    assert index.copied([" ".join(numbers)]) == (2, 13)
    assert CopyIndex.build([]).share(TEXTS[:1]) == 0


def test_index_in_parts_equals_the_index_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CopyIndex.build(TEXTS[:50])
    monkeypatch.setattr("dgemma.eval.samples._CHUNK", 500)
    parts = CopyIndex.build(TEXTS[:50])
    np.testing.assert_array_equal(whole._hashes, parts._hashes)


def test_story_score_separates_real_from_broken() -> None:
    real = TEXTS[:10]
    broken = [" ".join(random.Random(1).sample(text.split(), len(text.split()))) for text in real]
    good, bad = story_score(real), story_score(broken)
    assert good.consistency == good.faultless == 1 and good.consistency_se == 0
    assert bad.consistency < 0.2 and bad.faultless == 0
    assert story_score([]).stories == 0


def as_tokens(texts: list[str]) -> tuple[list[list[int]], int]:
    """Documents of word ids, and the vocabulary size."""
    known: dict[str, int] = {}
    ids = [[BOS, *(known.setdefault(word, FIRST + len(known)) for word in text.split())] for text in texts]
    return ids, FIRST + len(known)


def fit(ids: list[list[int]], vocab: int, order: int = 5) -> NgramJudge:
    flat = np.array([token for document in ids for token in document], dtype=np.uint16)
    source = (flat, np.cumsum([0, *map(len, ids)]))
    return NgramJudge.fit([source], vocab, bos=BOS, eos=EOS, order=order)


def test_judge_prefers_real_stories_to_shuffled_ones() -> None:
    ids, vocab = as_tokens(TEXTS)
    judge = fit(ids[:350], vocab)
    rng = random.Random(0)
    real = np.concatenate([judge.nats(one) for one in ids[350:]])
    mixed = np.concatenate([judge.nats([BOS, *rng.sample(one[1:], len(one) - 1)]) for one in ids[350:]])
    assert real.mean() < 2 < 5 < mixed.mean() < math.log(vocab) + 2


def test_judge_is_a_distribution() -> None:
    ids, vocab = as_tokens(TEXTS[:60])
    judge = fit(ids, vocab)
    for length in (1, 2, 3, 4, 9):
        chances = [math.exp(-judge.nats([*ids[0][:length], token], length)[0]) for token in range(vocab)]
        assert sum(chances) == pytest.approx(1)
        assert min(chances) > 0
    unseen = [BOS, 5, 5, 5, 5]  # the chain of contexts ends early, the mass stays
    assert sum(math.exp(-judge.nats([*unseen, token], 5)[0]) for token in range(vocab)) == pytest.approx(1)


def test_judge_counts_by_hand() -> None:
    """Two tokens, order 2: a b a b a b -> after a always b, so its chance is what the discount leaves and more."""
    judge = fit([[BOS, 3, 4, 3, 4, 3, 4]], 5, order=2)
    level = judge._levels[1]
    kept = (3 - level.discounts[3]) / 3
    after, before = (np.exp(-judge.nats([BOS, 3, token], 2))[0] for token in (4, 3))
    assert kept < after < 1
    assert before < level.discounts[3] / 3
    assert judge.nats([BOS, 3, 4, 3], 1).shape == (3,)


def test_judge_shortens_its_memory_for_large_vocabularies() -> None:
    assert fit([[BOS, 3, 4, 3]], 4096).order == 5
    assert fit([[BOS, 3, 4, 3]], 262_144).order == 3
    with pytest.raises(DataError, match="nothing to learn"):
        NgramJudge.fit([(np.array([], dtype=np.uint16), np.array([0]))], 9, bos=BOS, eos=EOS)
