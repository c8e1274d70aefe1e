"""The clean tokens of an encode pass: the next chunk of each request, cut into parts. What `batch` is for canvases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from dgemma.cache import KVCache
from dgemma.config import EngineConfig
from dgemma.engine.request import State
from dgemma.engine.scheduler import parts


class Chunks:
    """The chunks of `states`: `jobs` for the pass, `finish` after it."""

    def __init__(self, states: Sequence[State], config: EngineConfig, invariant: bool) -> None:
        self._states = states
        self._cuts = [parts(state, config, invariant) for state in states]
        self.jobs: list[tuple[KVCache, Sequence[int]]] = []
        for state, counts in zip(states, self._cuts, strict=True):
            state.encode_passes += state.cache.length >= len(state.request.prompt)
            tokens = [*state.ids[state.cache.length :], *state.drafted]
            for cache, size in zip(state.cache.segments(counts), counts, strict=True):
                begin = cache.length - state.cache.length
                self.jobs.append((cache, tokens[begin : begin + size]))

    def finish(self, hidden: Sequence[Tensor]) -> Iterator[tuple[State, Sequence[int], Sequence[Tensor]]]:
        """Each request with the sizes of its parts, and the hidden states `[n, H]` of each of them."""
        rest = iter(hidden)
        for state, counts in zip(self._states, self._cuts, strict=True):
            yield state, counts, [next(rest) for _ in counts]
