"""The slow obvious way to run the model: every K and V kept, explicit masks, one sequence at a time.

The engine's caches must give the same numbers. `NaiveCache` has small methods so that tests can plant mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.config import LayerKind, ModelConfig
from dgemma.model import Attend, DiffusionGemma


class NaiveCache:
    """All keys and values of one sequence, `[S, K, D]` per layer, never dropped."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def length(self, layer: int = 0) -> int:
        return self.keys[layer].shape[0] if layer in self.keys else 0

    def sees(self, kind: LayerKind, query: Tensor, key: Tensor) -> Tensor:
        """Encoder mask for query positions `[T, 1]` and key positions `[1, S]`."""
        causal = key <= query
        return causal if kind == "full" else causal & (key > query - self.config.sliding_window)

    def prefix_start(self, kind: LayerKind, length: int) -> int:
        """First cached position that a canvas sees: all of it, or the last W - 1 (the same for every row)."""
        return 0 if kind == "full" else max(0, length - (self.config.sliding_window - 1))

    def canvas_mask(self, kind: LayerKind, query: Tensor, key: Tensor, prefix: int) -> Tensor | None:
        """Restriction of a canvas on what `prefix_start` leaves: none, it looks both ways at any distance."""
        return None

    def encoding(self) -> Attend:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            start = self.length(layer)
            if start:
                k, v = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
            self.keys[layer], self.values[layer] = k, v
            place = torch.arange(k.shape[0])
            mask = self.sees(self.config.layers[layer].kind, place[start:, None], place[None, :])
            return kernels.attention(q, k, v, mask)

        return attend

    def denoising(self) -> Attend:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kind, length = self.config.layers[layer].kind, self.length(layer)
            first = self.prefix_start(kind, length)
            if length:
                k = torch.cat([self.keys[layer][first:], k])
                v = torch.cat([self.values[layer][first:], v])
            place = torch.arange(first, first + k.shape[0])
            mask = self.canvas_mask(kind, place[-q.shape[0] :, None], place[None, :], length)
            return kernels.attention(q, k, v, mask)

        return attend


def packed(attends: Sequence[Attend], lengths: Sequence[int]) -> Attend:
    """One `Attend` for several sequences whose tokens lie one after another."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(attends, *(x.split(list(lengths)) for x in (q, k, v)), strict=True)
        return torch.cat([one(layer, *qkv) for one, *qkv in parts])

    return attend


def encode(model: DiffusionGemma, cache: NaiveCache, ids: Tensor) -> Tensor:
    """Read `ids [T]` into the cache -> hidden `[T, H]`."""
    positions = torch.arange(len(ids)) + cache.length()
    return model.encode(ids, positions, cache.encoding())


def denoise(model: DiffusionGemma, cache: NaiveCache, canvas: Tensor, soft: Tensor | None = None) -> Tensor:
    """One denoising pass over `canvas [C]` -> hidden `[C, H]`."""
    places = torch.arange(len(canvas))
    return model.denoise(canvas, places + cache.length(), cache.denoising(), soft, places)
