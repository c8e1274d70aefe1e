"""Keys and values of one request's clean tokens. Knows positions and windows, no masks, no ids, no network.

Full layers keep everything; sliding layers keep a ring of `W - 1 + slack` slots. The slack is what makes
roll-back and chunked encoding possible: while up to `slack` new tokens are written, the W - 1 tokens before
them stay readable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.config import ModelConfig

_FIRST = 64  # slots of a fresh buffer; doubled when full


class KVCache:
    """One request's cache. Tensors are `[S, K, D]`: S tokens by position, K key/value heads, D head dim.

    Encoding n tokens is `append(layer, ...)` for every layer, then `advance(n)`. Until `advance`, nothing has
    happened: an interrupted pass may be run again. Denoising only calls `prefix`.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, slack: int) -> None:
        assert slack >= 1
        self.length = 0
        self.slack = slack
        self._window = config.sliding_window
        self._written = 0  # one past the highest position ever stored: tells what the rings still hold
        self._layers = [
            _Layer(
                self._window - 1 + slack if layer.kind == "sliding" else None,
                torch.empty(0, layer.num_kv_heads, layer.head_dim, device=device, dtype=dtype),
            )
            for layer in config.layers
        ]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store fresh `k, v [n, K, D]` at positions length .. length + n - 1 of one layer, n <= slack.

        Returns every key and value that some of the n queries may see, in position order, the fresh ones
        last: all of them in a full layer, the last `W - 1 + n` in a sliding one.
        """
        count = k.shape[0]
        assert 1 <= count <= self.slack
        self._written = max(self._written, self.length + count)
        store = self._layers[layer]
        store.write(self.length, k, v)
        return store.read(self._first(store), self.length + count)

    def advance(self, count: int) -> None:
        """Make the `count` tokens that were just appended to every layer part of the prefix."""
        self.length += count

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values every canvas position may see: all (full), or the last W - 1 (sliding)."""
        store = self._layers[layer]
        return store.read(self._first(store), self.length)

    def can_truncate(self, length: int) -> bool:
        """Whether the rings still hold the W - 1 tokens before `length`."""
        rings = [store.slots for store in self._layers if store.slots is not None]
        oldest = max((self._written - slots for slots in rings), default=0)
        return 0 <= length <= self.length and (oldest <= 0 or length - (self._window - 1) >= oldest)

    def truncate(self, length: int) -> None:
        """Roll back to `length`. Allowed where `can_truncate` says so: always for up to `slack` tokens."""
        assert self.can_truncate(length)
        self.length = length

    def clone(self) -> KVCache:
        """An independent copy, no larger than its tokens need."""
        twin = object.__new__(KVCache)
        twin.__dict__.update(self.__dict__)
        twin._layers = [layer.clone(self._written) for layer in self._layers]
        return twin

    def _first(self, store: _Layer) -> int:
        return 0 if store.slots is None else max(0, self.length - (self._window - 1))


class _Layer:
    """Position p lives in slot p (`slots` None) or p mod slots. Grows by doubling up to `slots`."""

    def __init__(self, slots: int | None, empty: Tensor) -> None:
        self.slots = slots
        self._k = self._v = empty

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        self._reserve(start + k.shape[0])
        done = 0
        for part in self._parts(start, start + k.shape[0]):
            count = part.stop - part.start
            self._k[part], self._v[part] = k[done : done + count], v[done : done + count]
            done += count

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        parts = self._parts(start, stop)
        if len(parts) == 1:
            return self._k[parts[0]], self._v[parts[0]]
        return torch.cat([self._k[part] for part in parts]), torch.cat([self._v[part] for part in parts])

    def clone(self, tokens: int) -> _Layer:
        used = tokens if self.slots is None else min(tokens, self.slots)
        twin = _Layer(self.slots, self._k[:used].clone())
        twin._v = self._v[:used].clone()
        return twin

    def _parts(self, start: int, stop: int) -> list[slice]:
        """Slots of positions start .. stop - 1 in order: one slice, or two where the ring wraps."""
        if self.slots is None:
            return [slice(start, stop)]
        first, count = start % self.slots, stop - start
        rest = first + count - self.slots
        return [slice(first, first + count)] if rest <= 0 else [slice(first, self.slots), slice(0, rest)]

    def _reserve(self, tokens: int) -> None:
        have = self._k.shape[0]
        need = tokens if self.slots is None else min(tokens, self.slots)
        if need <= have:
            return
        size = max(need, 2 * have, _FIRST)
        size = size if self.slots is None else min(size, self.slots)
        self._k, self._v = _grown(self._k, size), _grown(self._v, size)


def _grown(old: Tensor, size: int) -> Tensor:
    new = old.new_empty(size, *old.shape[1:])
    new[: old.shape[0]] = old
    return new
