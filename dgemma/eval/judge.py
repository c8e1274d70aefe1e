"""An independent judge of samples: an n-gram model, interpolated modified Kneser-Ney, of the training tokens.

It shares no weights with the model that it judges and knows nothing beyond a few tokens: it tells fluent from
broken, not true from false, and it likes copies of the training text. Counts are exact: an n-gram is packed into
one 64-bit number. Source: Chen and Goodman (1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dgemma.errors import DataError


@dataclass(frozen=True)
class _Level:
    """n-grams of one length: sorted keys with counts, and per context its total and the mass left for shorter ones."""

    keys: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    left: np.ndarray

    @staticmethod
    def of(keys: np.ndarray, counts: np.ndarray, bits: int) -> _Level:
        discounts = _discounts(counts)
        prefix = keys >> np.uint64(bits)
        starts = np.flatnonzero(np.append(True, prefix[1:] != prefix[:-1]))
        taken = np.minimum(discounts[np.minimum(counts, 3)], counts)
        totals, left = np.add.reduceat(counts, starts), np.add.reduceat(taken, starts)
        return _Level(keys, counts, discounts, prefix[starts], totals.astype(np.float64), left)

    def smooth(self, keys: np.ndarray, shorter: np.ndarray, bits: int) -> np.ndarray:
        """P(last token | the others) of `keys`, given the same of the n-grams that are one token shorter."""
        place, seen = _find(self.contexts, keys >> np.uint64(bits))
        at, known = _find(self.keys, keys)
        counts = np.where(known, self.counts[at], 0)
        kept = np.maximum(counts - self.discounts[np.minimum(counts, 3)], 0.0)
        return np.where(seen, (kept + self.left[place] * shorter) / self.totals[place], shorter)


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in sorted `keys`, and whether the wanted one is there (a place is valid in any case)."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken off a count of 0, 1, 2, 3 or more; the usual estimates, held in a sane range on tiny data."""
    n1, n2, n3, n4 = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    raw = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    low = np.clip(raw, 0.1, (0.95, 1.9, 2.8))
    return np.array([0.0, *low])


class NgramJudge:
    """P(token | up to `order - 1` tokens before it), over `vocab` tokens; never zero."""

    def __init__(self, levels: Sequence[_Level], vocab: int, bits: int, bos: int) -> None:
        self._levels, self._vocab, self._bits, self._bos = levels, vocab, bits, bos

    @property
    def order(self) -> int:
        return len(self._levels)

    @staticmethod
    def fit(
        sources: Sequence[tuple[np.ndarray, np.ndarray]], vocab: int, *, bos: int, eos: int, order: int = 5
    ) -> NgramJudge:
        """Counts documents that begin with `bos`; a source is `ids` and `offsets` as in `train.data`.

        The order falls to what fits into 64 bits: 5 for 4,096 tokens, 3 for 262,144.
        """
        bits = max(1, (vocab - 1).bit_length())
        order = min(order, 64 // bits)
        parts = []
        for ids, offsets in sources:
            stream = _padded(ids, offsets, order - 2, bos, eos)
            parts.append(_keys(stream, order, bits)[stream[order - 1 :] != bos])
        if not sum(map(len, parts)):
            raise DataError("the judge has nothing to learn from: its sources hold no tokens")
        packed = np.concatenate(parts)
        packed.sort()
        keys, counts = _count(packed)
        levels = [_Level.of(keys, counts, bits)]
        for size in range(order - 1, 0, -1):
            # A shorter n-gram counts the different tokens seen before it.
            shorter = keys & np.uint64((1 << bits * size) - 1)
            shorter.sort()
            keys, counts = _count(shorter)
            levels.append(_Level.of(keys, counts, bits))
        return NgramJudge(levels[::-1], vocab, bits, bos)

    def nats(self, ids: Sequence[int], start: int = 1) -> np.ndarray:
        """Minus the log-probability of each of `ids[start:]`, a document that begins with `bos`."""
        pad = self.order - 2
        stream = np.array([*([self._bos] * pad), *ids], dtype=np.uint64)
        keys = _keys(stream, self.order, self._bits)[start - 1 :]
        chance = np.full(len(keys), 1 / self._vocab)
        for size, level in enumerate(self._levels, start=1):
            part = keys & np.uint64((1 << self._bits * size) - 1)
            chance = level.smooth(part, chance, self._bits)
        return -np.log(chance)


def _padded(ids: np.ndarray, offsets: np.ndarray, pad: int, bos: int, eos: int) -> np.ndarray:
    """All documents in one stream, each behind `pad` more tokens `bos` and before one `eos`."""
    number = np.arange(len(offsets) - 1)
    moved = (number + 1) * pad + number
    stream = np.full(len(ids) + len(number) * (pad + 1), bos, dtype=np.uint64)
    stream[np.arange(len(ids)) + np.repeat(moved, np.diff(offsets))] = ids
    stream[offsets[1:] + moved] = eos
    return stream


def _keys(stream: np.ndarray, order: int, bits: int) -> np.ndarray:
    """Every `order` consecutive tokens as one number, the last token in the lowest bits."""
    count = len(stream) - order + 1
    keys = np.zeros(max(0, count), dtype=np.uint64)
    for at in range(order):
        keys <<= np.uint64(bits)
        keys |= stream[at : at + count]
    return keys


def _count(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    return ordered[starts], np.diff(np.append(starts, len(ordered)))
