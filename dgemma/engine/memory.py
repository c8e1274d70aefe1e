"""The caches of an engine's requests: how many bytes they may need, how they are made, and what of them is kept for
requests that begin with the same tokens.
"""

from __future__ import annotations

import os
from hashlib import blake2b

from dgemma.cache import KVCache, PrefixStore, kv_bytes
from dgemma.config import EngineConfig
from dgemma.engine.request import Request, State, max_canvas
from dgemma.engine.runner import Runner
from dgemma.errors import ConfigError


class Memory:
    """Of one engine. `identity` says which weights these are, to who shares `prefixes`."""

    def __init__(
        self, runner: Runner, drafter: Runner, config: EngineConfig, prefixes: PrefixStore | None, identity: str
    ) -> None:
        self._runner, self._drafter, self._config = runner, drafter, config
        self.reserved = 0
        """Bytes that are set aside for running requests."""
        self.prefixes = prefixes or PrefixStore(config.prefix_cache_tokens, config.block)
        if self.prefixes.block != config.block:
            raise ConfigError(f"the engine needs a prefix store of blocks of {config.block}, got {self.prefixes.block}")
        which = identity.encode() or os.urandom(16)
        named = f"{runner.model.config} {runner.dtype} {runner.device} {config.block} {config.kv_cache_dtype}".encode()
        self._root = blake2b(which + b"\0" + named, digest_size=16).digest()
        self._fp8 = config.kv_cache_dtype == "fp8"
        # The widest canvas, and the longest chunk.
        self._slack = max(config.encode_chunk, max_canvas(runner.model.config), max_canvas(drafter.model.config))

    def need(self, request: Request) -> int:
        """Bytes of keys and values that a request may need at most: its prompt and its whole budget."""
        keepers = {self._runner, self._drafter} if request.config.mode == "verified" else {self._runner}
        return sum(
            kv_bytes(keeper.model.config, keeper.dtype, self._slack, most_tokens(request), self._fp8)
            for keeper in keepers
        )

    def fits(self, request: Request) -> bool:
        """Whether there is room now."""
        limit = self._config.kv_bytes
        return not limit or self.reserved + self.need(request) <= limit

    def new_cache(self, most: int | None = None, runner: Runner | None = None) -> KVCache:
        """An empty cache for the model of `runner` (the engine's own) and, if given, at `most` that many tokens."""
        own = runner or self._runner
        return KVCache(own.model.config, own.device, own.dtype, self._slack, most, self._fp8)

    def admit(self, number: int, request: Request, turn: int, cache: KVCache | None) -> State:
        """The state of a new request, its `cache` (None: a new one) filled with what others encoded of its prompt."""
        most, size = most_tokens(request), self.need(request)
        state = State(number, request, cache or self.new_cache(most), list(request.prompt), turn, size)
        if request.reuse and self._config.prefix_cache_tokens:
            # The next token's distribution comes from encoding the last one: who needs it must leave that to do.
            usable = request.prompt[: len(request.prompt) - request.starts_from_last]
            state.cached_tokens = state.whole = self.prefixes.take(self._root, usable, state.cache)
        if request.config.mode == "verified" and self._drafter is not self._runner:
            state.draft_cache = self.new_cache(most, self._drafter)
        self.reserved += size
        return state

    def release(self, state: State) -> None:
        """A request is over."""
        self.reserved -= state.kv_bytes

    def advance(self, state: State, count: int) -> None:
        """Make the `count` tokens that a pass encoded part of the cache; keep its whole blocks for others."""
        aligned = state.whole == state.cache.length and not state.drafted
        state.cache.advance(count)
        fresh = count - count % self._config.block if aligned else 0
        state.whole += fresh
        if fresh and state.request.reuse:
            self.prefixes.put(self._root, state.ids[: state.whole], state.cache)


def most_tokens(request: Request) -> int:
    """Tokens that its cache may hold: no canvas is encoded before it is cut to the budget."""
    return len(request.prompt) + request.config.max_new_tokens
