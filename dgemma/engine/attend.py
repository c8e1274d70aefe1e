"""`Attend` over packed segments: each request sees its own keys only, so nothing is padded or masked out.

T tokens of all requests lie end to end; `spans` cut them. One request's numbers never depend on who shares
the pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.config import ModelConfig


def spans(counts: Sequence[int]) -> list[slice]:
    """Where segments of `counts` tokens lie when packed end to end."""
    out, start = [], 0
    for count in counts:
        out.append(slice(start, start + count))
        start += count
    return out


class EncodeAttend:
    """Causal attention that stores K and V: position q sees k <= q, in sliding layers also k > q - W."""

    def __init__(self, config: ModelConfig, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        self._config = config
        self._segments = list(zip(caches, spans(counts), strict=True))
        self._masks: dict[tuple[int, int, bool], Tensor | None] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sliding = self._config.layers[layer].kind == "sliding"
        out = []
        for cache, span in self._segments:
            keys, values = cache.append(layer, k[span], v[span])
            mask = self._mask(span.stop - span.start, keys.shape[0], sliding, q.device)
            out.append(kernels.attention(q[span], keys, values, mask))
        return torch.cat(out)

    def _mask(self, queries: int, keys: int, sliding: bool, device: torch.device) -> Tensor | None:
        """The last `queries` of `keys` positions ask; None where every one may see every key."""
        key = (queries, keys, sliding)
        if queries > 1 and key not in self._masks:
            q = torch.arange(keys - queries, keys, device=device)[:, None]
            k = torch.arange(keys, device=device)
            mask = k <= q
            self._masks[key] = mask & (k > q - self._config.sliding_window) if sliding else mask
        return self._masks.get(key)


class DenoiseAttend:
    """Bidirectional attention that stores nothing: a canvas sees its request's prefix and all of itself.

    In sliding layers the prefix is its last W - 1 tokens, the same for every canvas position, as in HF.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        self._segments = list(zip(caches, spans(counts), strict=True))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for cache, span in self._segments:
            old_k, old_v = cache.prefix(layer)
            out.append(kernels.attention(q[span], torch.cat([old_k, k[span]]), torch.cat([old_v, v[span]])))
        return torch.cat(out)
