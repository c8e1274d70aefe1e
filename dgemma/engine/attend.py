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
from dgemma.model.attention import Attend


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
        self._spans: dict[tuple[int, int, bool], Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sliding = self._config.layers[layer].kind == "sliding"
        out = []
        for cache, span in self._segments:
            cache.append(layer, k[span], v[span])
            *store, count, scales = cache.stored(layer, span.stop - span.start)
            seen = self._seen(span.stop - span.start, count, sliding, q.device)
            out.append(kernels.stored_attention(q[span], *store, count, seen, scales))
        return torch.cat(out)

    def _seen(self, queries: int, keys: int, sliding: bool, device: torch.device) -> Tensor | None:
        """Spans of what the last `queries` of `keys` positions see; None where the one query sees every key.

        All layers of a kind share them.
        """
        if queries == 1:
            return None
        key = (queries, keys, sliding)
        if key not in self._spans:
            window = self._config.sliding_window if sliding else None
            self._spans[key] = causal(torch.arange(keys - queries, keys, device=device), window)
        return self._spans[key]


def causal(places: Tensor, window: int | None) -> Tensor:
    """Spans `[n, 2]` of what queries at `places [n]` of a sequence see: all up to themselves, or the last `window`."""
    first = torch.zeros_like(places) if window is None else (places + 1 - window).clamp(min=0)
    return torch.stack([first, places + 1], dim=1)


class DenoiseAttend:
    """Bidirectional attention that stores nothing: a canvas sees its request's prefix and all of itself.

    In sliding layers the prefix is its last W - 1 tokens, the same for every canvas position, as in HF.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        self._segments = list(zip(caches, spans(counts), strict=True))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for cache, span in self._segments:
            out.append(kernels.canvas_attention(q[span], k[span], v[span], *cache.stored(layer)))
        return torch.cat(out)


class SharedAttend:
    """The first `clean` rows as `encode` says, then the others as `denoise` does.

    So a canvas may see the keys and values that the same pass has just stored (`KVCache.ahead`).
    """

    def __init__(self, encode: Attend, denoise: Attend, clean: int) -> None:
        self._encode, self._denoise, self._clean = encode, denoise, clean

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        clean, noisy = slice(self._clean), slice(self._clean, None)
        stored = self._encode(layer, q[clean], k[clean], v[clean])
        return torch.cat([stored, self._denoise(layer, q[noisy], k[noisy], v[noisy])])
