"""`Attend` for caches whose lengths only the device knows: what `attend` has, for steps that are recorded (`graphs`).

A cache that stays where it is (`KVCache.reserve`) is a *lane*. Where its tokens lie is a tensor; how many there may be
at most is a number of the recording.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.config import ModelConfig
from dgemma.engine.attend import causal


class LaneDenoise:
    """`DenoiseAttend` of one canvas a lane, behind prefixes of lengths `prefix [R]`, none of them above `most`."""

    def __init__(self, lanes: Sequence[KVCache], config: ModelConfig, prefix: Tensor, most: int) -> None:
        self._lanes, self._kinds = lanes, [layer.kind for layer in config.layers]
        seen = config.sliding_window - 1
        first = (prefix - seen).clamp(min=0)
        self._where = {
            "full": (torch.stack([torch.zeros_like(first), prefix], dim=-1), most),
            "sliding": (torch.stack([first % lanes[0].ring, prefix - first], dim=-1), min(seen, most)),
        }

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        where, most = self._where[self._kinds[layer]]
        out = []
        rows = zip(self._lanes, *(x.chunk(len(self._lanes)) for x in (q, k, v)), where, strict=True)
        for lane, own_q, own_k, own_v, place in rows:
            old_k, old_v, scales = lane.slots(layer)
            out.append(kernels.canvas_attention(own_q, own_k, own_v, old_k, old_v, 0, most, scales=scales, where=place))
        return torch.cat(out)


class LaneEncode:
    """`EncodeAttend` of the `count` tokens that follow the first `length [1]` of a lane; with them at most `most`."""

    def __init__(self, lane: KVCache, config: ModelConfig, length: Tensor, count: int, most: int) -> None:
        self._lane, self._kinds = lane, [layer.kind for layer in config.layers]
        places, window = length + torch.arange(count, device=length.device), config.sliding_window
        first = (length - (window - 1)).clamp(min=0)
        full = torch.cat([torch.zeros_like(length), length + count])
        sliding = torch.cat([first % lane.ring, length + count - first])
        # By kind: slots of the new tokens, what they see, where that lies, how many tokens there may be.
        self._views = {
            "full": (places, causal(places, None), full, most),
            "sliding": (places % lane.ring, causal(places - first, window), sliding, min(window - 1 + count, most)),
        }

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, seen, where, most = self._views[self._kinds[layer]]
        self._lane.put(layer, slots, k, v)
        *store, scales = self._lane.slots(layer)
        attended: Tensor = kernels.stored_attention(q, *store, 0, most, seen, scales, where)
        return attended
