"""Figures about generated texts that need no model: variety, copies of training text, agreement with the grammar."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dgemma.train.stories import check, consistency

_CHUNK = 2_000_000  # words hashed at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_DIVIDE = bytes(c if c >= 128 or chr(c).isalnum() or c == ord("'") else 32 for c in range(256))


def words(text: str) -> list[bytes]:
    """Lower-case words as UTF-8; ASCII punctuation and white space only divide them."""
    return text.lower().encode().translate(_DIVIDE).split()


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams as a share of all, over the texts together (distinct-n, Li et al. 2016); 0 for no text.

    Falls with the amount of text: compare equal amounts only.
    """
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(items: list[bytes], n: int) -> Iterator[tuple[bytes, ...]]:
    return zip(*(items[at:] for at in range(n)), strict=False)


class CopyIndex:
    """Which word n-grams occur in a collection: 8 bytes each (sorted 64-bit hashes), so no text is kept.

    Two different n-grams share a hash with a chance of about 1 in 10^12 for 10^7 n-grams.
    """

    def __init__(self, n: int, hashes: np.ndarray) -> None:
        self.n, self._hashes = n, hashes

    @staticmethod
    def build(texts: Iterable[str], n: int = 12) -> CopyIndex:
        """Reads every text once."""
        parts = [_unique(hashes) for hashes in _hashed(texts, n)]
        return CopyIndex(n, _unique(np.concatenate(parts)))

    def __len__(self) -> int:
        return len(self._hashes)

    def copied(self, texts: Iterable[str]) -> tuple[int, int]:
        """How many n-grams of `texts` occur in the collection, and how many there are."""
        found = total = 0
        for hashes in _hashed(texts, self.n):
            at = np.searchsorted(self._hashes, hashes)
            inside = at < len(self._hashes)
            found += int((self._hashes[at[inside]] == hashes[inside]).sum())
            total += len(hashes)
        return found, total

    def share(self, texts: Iterable[str]) -> float:
        """Copied n-grams as a share of all; 0 if the texts have none."""
        found, total = self.copied(texts)
        return found / max(1, total)


class _Codes(dict[bytes, int]):
    """Word -> 64-bit hash, computed once."""

    def __missing__(self, word: bytes) -> int:
        self[word] = code = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")
        return code


def _hashed(texts: Iterable[str], n: int) -> Iterator[np.ndarray]:
    """Hashes of all n-grams inside the texts, in parts."""
    codes = _Codes()
    waiting: list[bytes] = []
    lengths: list[int] = []
    for text in texts:
        found = words(text)
        waiting += found
        lengths.append(len(found))
        if len(waiting) > _CHUNK:
            yield _roll(np.fromiter(map(codes.__getitem__, waiting), np.uint64, len(waiting)), lengths, n)
            waiting, lengths = [], []
    yield _roll(np.fromiter(map(codes.__getitem__, waiting), np.uint64, len(waiting)), lengths, n)


def _roll(codes: np.ndarray, lengths: Sequence[int], n: int) -> np.ndarray:
    """A polynomial hash (modulo 2^64) of every n consecutive codes of the same text."""
    count = len(codes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for at in range(n):
        hashes *= _FACTOR
        hashes += codes[at : at + count]
    text = np.repeat(np.arange(len(lengths)), lengths)
    return hashes[text[:count] == text[n - 1 :]]


def _unique(hashes: np.ndarray) -> np.ndarray:
    """`np.unique` by sorting in place, which is several times faster here than its hash table."""
    hashes.sort()
    return hashes[np.append(True, hashes[1:] != hashes[:-1])] if len(hashes) else hashes


@dataclass(frozen=True)
class StoryScore:
    """Agreement of stories with the grammar: mean share of faultless sentences, its standard error over stories,
    and the share of stories that are complete and without any fault."""

    consistency: float
    consistency_se: float
    faultless: float
    stories: int


def story_score(texts: Sequence[str]) -> StoryScore:
    """Reads whole stories (prompt and continuation); see `train.stories.reader`."""
    shares = np.array([consistency(text) for text in texts])
    error = float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else 0.0
    clean = sum(not check(text) for text in texts) / max(1, len(texts))
    return StoryScore(float(shares.mean()) if len(shares) else 0.0, error, clean, len(shares))
