"""Reuse of finished caches: what a conversation has already encoded, its next turn need not encode again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dgemma.cache.kv import KVCache


class PrefixStore:
    """Finished caches by their token ids: at most `max_tokens` in all, the least recently used goes first.

    Keys are ids and nothing else, so a store serves one model in one type. A turn whose text was tokenised
    differently the second time still reuses the cache up to the first difference, as far as the sliding rings
    can be rolled back.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens held now."""
        return sum(map(len, self._entries))

    def put(self, ids: Sequence[int], cache: KVCache) -> None:
        """Keep `cache`, which holds exactly `ids`. The caller must not use it afterwards."""
        key = tuple(ids)
        assert len(key) == cache.length
        if not key or len(key) > self._max_tokens:
            return
        self._entries[key] = cache
        self._entries.move_to_end(key)
        while self.tokens > self._max_tokens:
            self._entries.popitem(last=False)

    def take(self, ids: Sequence[int], limit: int) -> KVCache | None:
        """A copy of the cache with the longest common beginning with `ids`, cut to `limit`; None without one."""
        best, length = None, 0
        for key, cache in self._entries.items():
            shared = min(_shared(key, ids), limit)
            if shared > length and cache.can_truncate(shared):
                best, length = key, shared
        if best is None:
            return None
        self._entries.move_to_end(best)
        copy = self._entries[best].clone()
        copy.truncate(length)
        return copy


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are equal."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
