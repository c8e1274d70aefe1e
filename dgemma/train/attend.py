"""Explicit masks for training: a batch of `[clean tokens | noisy blocks]`, every block in one pass.

A noisy block sees itself and the clean tokens strictly before it (sliding layers: the last W-1 of them); a clean token
sees clean tokens causally. Seeing the block's own clean tokens would leak the answer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgemma.config import LayerKind, ModelConfig


@dataclass(frozen=True)
class Layout:
    """One batch: B examples, of which R positions each are denoised in blocks of `width`.

    `start [B]` is where an example's region begins, its blocks follow each other; or `[B, R / width]`, where each
    block begins. `length` is how many clean tokens the encoder reads. With `draws` > 1 every example is corrupted
    that many times, so a long prompt is encoded once: noisy rows are `N = B * draws`.
    `segments [B, >= length]` tells documents packed into one row apart: nothing sees another segment.
    """

    start: Tensor
    length: int
    region: int
    width: int
    draws: int = 1
    segments: Tensor | None = None

    def begins(self) -> Tensor:
        """Where the block of every noisy position begins `[B, R]`."""
        block = torch.arange(self.region) // self.width
        return self.start[:, block] if self.start.dim() == 2 else self.start[:, None] + block * self.width

    def canvas_positions(self) -> Tensor:
        """Position in the row of every noisy token `[N, R]`."""
        where = self.begins() + torch.arange(self.region) % self.width
        return where.repeat_interleave(self.draws, dim=0)

    def without_targets(self) -> Layout:
        """The same blocks with the shortest encoder input: the last block's clean tokens are nobody's context."""
        return replace(self, length=min(self.length, int(self.begins().max())))

    def examples(self, rows: slice | Tensor) -> Layout:
        """The layout of some of the examples."""
        segments = None if self.segments is None else self.segments[rows]
        return replace(self, start=self.start[rows], segments=segments)

    def to(self, place: torch.device) -> Layout:
        segments = None if self.segments is None else self.segments.to(place)
        return replace(self, start=self.start.to(place), segments=segments)

    def clean_mask(self, window: int | None) -> Tensor:
        """`[1 or B, L, L]`: clean query sees clean key."""
        q, k = torch.arange(self.length)[:, None], torch.arange(self.length)
        mask = (k <= q if window is None else (k <= q) & (k > q - window))[None]
        if self.segments is None:
            return mask
        segments = self.segments[:, : self.length]
        return mask & (segments[:, :, None] == segments[:, None])

    def canvas_mask(self, window: int | None) -> Tensor:
        """`[N, R, L + R]`: noisy query sees clean keys before its block, and its own block."""
        begins, keys = self.begins(), torch.arange(self.length)
        clean = keys < begins[:, :, None]
        if window is not None:
            clean = clean & (keys >= begins[:, :, None] - (window - 1))
        if self.segments is not None:
            clean = clean & (self.segments[:, None, : self.length] == self.segments.gather(1, begins)[:, :, None])
        block = torch.arange(self.region) // self.width
        own = (block[:, None] == block).expand(len(begins), -1, -1)
        return torch.cat([clean, own], dim=-1).repeat_interleave(self.draws, dim=0)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`kernels.attention` for a padded batch: `q [B, T, Q, D]`, `k, v [B, S, K, D]`, additive `bias [B, T, S]`.

    Query heads of one key head are folded into the rows, so keys are never repeated; written out because its
    backward is several times faster on a CPU in bfloat16 than the fused op's.
    """
    batch, rows, heads, dim = q.shape
    groups = k.shape[2]
    fold = q.view(batch, rows, groups, heads // groups, dim).permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, dim)
    scores = fold @ k.permute(0, 2, 3, 1)
    scores = scores.view(batch, groups, heads // groups, rows, -1) + bias[:, None, None]
    weights = torch.softmax(scores, dim=-1).view(batch, groups, heads // groups * rows, -1)
    out = (weights @ v.permute(0, 2, 1, 3)).view(batch, groups, heads // groups, rows, dim)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, dim)


class BlockAttend:
    """`Attend` of one training batch: `encode` keeps K and V (with their gradients), `denoise` reads them."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: torch.dtype) -> None:
        self._draws = layout.draws
        self._kinds: list[LayerKind] = [layer.kind for layer in config.layers]
        windows: dict[LayerKind, int | None] = {"full": None, "sliding": config.sliding_window}
        used = {kind: windows[kind] for kind in self._kinds}
        self._clean = {kind: _bias(layout.clean_mask(window), dtype) for kind, window in used.items()}
        self._canvas = {kind: _bias(layout.canvas_mask(window), dtype) for kind, window in used.items()}
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._rows: Tensor | slice = slice(None)

    def encode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == len(self._kept):  # not when activation checkpointing computes a layer again
            self._kept.append((k, v))
        return dense_attention(q, k, v, self._clean[self._kinds[layer]])

    def denoise(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = self._rows
        old_k, old_v = (old.repeat_interleave(self._draws, dim=0)[rows] for old in self._kept[layer])
        k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        return dense_attention(q, k, v, self._canvas[self._kinds[layer]][rows])

    def only(self, rows: Tensor) -> BlockAttend:
        """The same memory for a subset of the noisy rows (indices `[r]`)."""
        part = copy.copy(self)
        part._rows = rows
        return part


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
