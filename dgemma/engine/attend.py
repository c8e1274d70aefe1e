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
        self._views: dict[tuple[int, int, bool], tuple[Tensor | None, ...]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sliding = self._config.layers[layer].kind == "sliding"
        out = []
        for cache, span in self._segments:
            keys, values = cache.append(layer, k[span], v[span])
            view = self._view(span.stop - span.start, keys.shape[0], sliding, q.device)
            out.append(kernels.attention(q[span], keys, values, *view))
        return torch.cat(out)

    def _view(self, queries: int, keys: int, sliding: bool, device: torch.device) -> tuple[Tensor | None, ...]:
        """What the last `queries` of `keys` positions see, as spans; on a CPU, whose op wants both, also as a mask.

        Nothing where the one query sees every key. All layers of a kind share it.
        """
        key = (queries, keys, sliding)
        if queries > 1 and key not in self._views:
            q, k = torch.arange(keys - queries, keys, device=device), torch.arange(keys, device=device)
            first = (q + 1 - self._config.sliding_window).clamp(min=0) if sliding else torch.zeros_like(q)
            mask = (first[:, None] <= k) & (k <= q[:, None]) if device.type == "cpu" else None
            self._views[key] = (mask, torch.stack([first, q + 1], dim=1))
        return self._views.get(key, ())


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

    def __init__(self, encode: EncodeAttend, denoise: DenoiseAttend, clean: int) -> None:
        self._encode, self._denoise, self._clean = encode, denoise, clean

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        clean, noisy = slice(self._clean), slice(self._clean, None)
        stored = self._encode(layer, q[clean], k[clean], v[clean])
        return torch.cat([stored, self._denoise(layer, q[noisy], k[noisy], v[noisy])])
