"""Reuse between requests: what one has encoded, another that begins with the same tokens need not encode again.

Kept are *blocks*: the keys and values of `block` consecutive tokens in every layer, sliding ones too. A block is
filed under a hash that is chained over its own tokens and all before it, down to a root that names the model, its
adapters and the type; so requests that share a beginning share its blocks, and nothing is held twice. A copied ring
at each boundary would be larger: W - 1 tokens of sliding keys where a block has `block`, and hits would exist at those
boundaries only. With blocks any multiple of `block` is one, however long ago the ring of its request moved on.

Knows ids and tensors, no requests. Which blocks hold exactly what a fresh run would compute is for its caller to say.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from threading import Lock

from dgemma.cache.kv import Block, KVCache


@dataclass(frozen=True)
class PrefixCounters:
    """Since the store began: how many requests found a block and how many none, and tokens in all of them."""

    hits: int = 0
    misses: int = 0
    reused_tokens: int = 0
    """Tokens that did not have to be encoded."""
    kept_tokens: int = 0
    evicted_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    root: bytes
    parent: _Node | None
    ids: tuple[int, ...]
    key: bytes
    kv: Block


class PrefixStore:
    """At most `max_tokens` tokens in blocks of `block`; the least recently used block goes first.

    May be shared: a lock guards it, and `root` keeps apart what must not be mixed.
    """

    def __init__(self, max_tokens: int, block: int) -> None:
        assert block >= 1
        self.block = block
        self.counters = PrefixCounters()
        self._room = max_tokens // block
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()
        self._lock = Lock()

    @property
    def tokens(self) -> int:
        """Tokens held now."""
        return len(self._nodes) * self.block

    def put(self, root: bytes, ids: Sequence[int], cache: KVCache) -> None:
        """Keep the whole blocks of `ids`, the first tokens of `cache`; nothing is copied that is here already.

        Ends at the first block that the rings of `cache` no longer hold. A prompt longer than the store keeps its
        beginning.
        """
        with self._lock:
            chain = self._chain(root, ids)
            kept = 0
            for start in range(len(chain) * self.block, len(ids) - self.block + 1, self.block):
                parent, part = chain[-1] if chain else None, tuple(ids[start : start + self.block])
                key = _key(root, parent, part)
                # A taken key is a collision: `_chain` would have found this block.
                if len(chain) == self._room or key in self._nodes:
                    break
                kv = cache.copy(start, start + self.block)
                if kv is None:
                    break
                self._nodes[key] = _Node(root, parent, part, key, kv)
                chain.append(self._nodes[key])
                kept += self.block
            self._touch(chain)
            evicted = 0
            while len(self._nodes) > self._room:
                self._nodes.popitem(last=False)
                evicted += self.block
            self._count(kept_tokens=kept, evicted_tokens=evicted)

    def take(self, root: bytes, ids: Sequence[int], cache: KVCache) -> int:
        """Fill the empty `cache` with the longest kept beginning of `ids`; how many tokens that were."""
        with self._lock:
            chain = self._chain(root, ids)
            self._touch(chain)
            tokens = len(chain) * self.block
            self._count(hits=bool(chain), misses=not chain, reused_tokens=tokens)
        # Blocks are never written again, so they may be read without the lock.
        cache.load([node.kv for node in chain])
        return tokens

    def _chain(self, root: bytes, ids: Sequence[int]) -> list[_Node]:
        chain: list[_Node] = []
        for start in range(0, len(ids) - self.block + 1, self.block):
            parent, part = chain[-1] if chain else None, tuple(ids[start : start + self.block])
            node = self._nodes.get(_key(root, parent, part))
            # The hash finds, the tokens decide: by the parent's identity all tokens before are equal, too.
            if node is None or node.parent is not parent or node.ids != part or node.root != root:
                break
            chain.append(node)
        return chain

    def _touch(self, chain: Sequence[_Node]) -> None:
        """Make a chain the latest used, its beginning last: so a block never goes before those that follow it."""
        for node in reversed(chain):
            self._nodes.move_to_end(node.key)

    def _count(self, **added: int) -> None:
        now = vars(self.counters)
        self.counters = replace(self.counters, **{name: now[name] + more for name, more in added.items()})


def _key(root: bytes, parent: _Node | None, ids: Sequence[int]) -> bytes:
    return blake2b((parent.key if parent else root) + array("q", ids).tobytes(), digest_size=16).digest()
