"""K/V memory of clean tokens: one cache per request, and a store of finished ones. Knows no network."""

from dgemma.cache.kv import KVCache
from dgemma.cache.prefix import PrefixStore

__all__ = ["KVCache", "PrefixStore"]
