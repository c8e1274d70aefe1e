"""K/V memory of clean tokens: one cache per request, and a store of what requests share. Knows no network."""

from dgemma.cache.kv import KVCache, kv_bytes
from dgemma.cache.prefix import PrefixCounters, PrefixStore

__all__ = ["KVCache", "PrefixCounters", "PrefixStore", "kv_bytes"]
