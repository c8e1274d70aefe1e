"""The vocabulary op in one pass over chunks of the vocabulary: no `rows x vocabulary` tensor, in either direction.

Each chunk's logits become running sums (rescaled when the highest logit rises) and unnormalised probabilities, whose
product with the same chunk of the embedding adds to the soft embedding. Against `reference.vocab`: entropies and
log-probabilities within 1e-5 nats; the same draw unless its uniform falls within about 1e-6 of a boundary. Rows with
top-k need a second look at all their logits for the draw, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dgemma.kernels import native, reference
from dgemma.kernels.matrix import Matrix
from dgemma.kernels.packed import Packed
from dgemma.kernels.reference import DRAW_BLOCK, Matmul, VocabStats, draw_tokens, softcap

CHUNK = 8 * DRAW_BLOCK
_LOGITS_AT_ONCE = 16 * 262_144
Product = Callable[[Tensor], Tensor]


class PackedHead:
    """An embedding `[V, H]`, and for each chunk of it the product to logits: given, or the chunk itself, packed."""

    def __init__(self, embed: Tensor, to_logits: Sequence[Matrix] | None = None) -> None:
        self.embed, self.dtype = embed.detach(), embed.dtype
        self.to_logits: Sequence[Matrix] = to_logits or [Packed(part) for part in self.embed.split(CHUNK)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits `[T, V]`, all of them at once."""
        return torch.cat([product(hidden) for product in self.to_logits], dim=-1)


class Pass(Protocol):
    """The running values of T rows."""

    def take(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Raw logits `[T, n]` of tokens from `first` on, consumed: exp(z - top) `[T, n]`, and the factor `[T]` that
        brings what earlier chunks gave to the new top."""

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of exp(z - top) `[T]`, and the statistics."""


def vocab(
    hidden: Tensor,
    embed: Tensor | PackedHead,
    cap: float,
    temperature: Tensor,
    uniforms: Tensor,
    draw_temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    matmul: Matmul = reference.linear,
) -> VocabStats:
    """`reference.vocab`; a row's bits do not depend on the other rows."""
    rows = hidden.shape[0]
    if rows == 1:  # products and sums take other ways for one row
        own, limit = (None if x is None else x.expand(2) for x in (draw_temperature, top_k))
        both = vocab(
            hidden.expand(2, -1), embed, cap, temperature.expand(2), uniforms.expand(2, -1), own, limit, matmul
        )
        return VocabStats(**{name: value[:1] for name, value in vars(both).items()})
    if isinstance(embed, Tensor) and (hidden.dtype not in (torch.float32, torch.bfloat16) or not rows):
        return reference.vocab(hidden, embed, cap, temperature, uniforms, draw_temperature, top_k, matmul)
    own = None if draw_temperature is None or bool((draw_temperature == 1).all()) else draw_temperature
    compiled = native.load()
    run: Pass = (
        TorchPass(cap, temperature, own, uniforms)
        if compiled is None
        else NativePass(compiled, cap, temperature, own, uniforms)
    )
    soft = torch.zeros(hidden.shape, dtype=torch.float32)
    pieces = _pieces(embed, matmul)
    for number, (to_logits, to_soft) in enumerate(pieces):
        probs, rescale = run.take(to_logits(hidden), number * CHUNK)
        soft.mul_(rescale[:, None]).add_(to_soft(probs.to(embed.dtype)))
    total, stats = run.result()
    if top_k is not None and bool((top_k > 0).any()):
        every = [to_logits for to_logits, _ in pieces]
        draw_top(hidden, every, cap, temperature, uniforms, draw_temperature, top_k, stats)
    return VocabStats(**stats, soft=soft.div_(total[:, None]).to(embed.dtype))


def _pieces(embed: Tensor | PackedHead, matmul: Matmul) -> Sequence[tuple[Product, Product]]:
    """Of each chunk of the vocabulary, the products to its logits and to its share of the soft embedding."""
    plain, packed = (embed.embed, embed.to_logits) if isinstance(embed, PackedHead) else (embed, None)
    parts = plain.split(CHUNK)
    to_logits: Sequence[Product] = packed or [partial(_times, part, matmul) for part in parts]
    return list(zip(to_logits, [partial(_times, part.t(), matmul) for part in parts], strict=True))


def _times(weight: Tensor, matmul: Matmul, x: Tensor) -> Tensor:
    return matmul(x, weight)


def draw_top(
    hidden: Tensor,
    to_logits: Sequence[Product],
    cap: float,
    temperature: Tensor,
    uniforms: Tensor,
    own: Tensor | None,
    top_k: Tensor,
    stats: dict[str, Tensor],
) -> None:
    """Replace the draws of rows with top-k, in place."""
    found = (top_k > 0).nonzero().flatten()
    for rows in found.split(max(2, _LOGITS_AT_ONCE // (len(to_logits) * CHUNK))):
        two = rows if len(rows) > 1 else rows.expand(2)
        raw = torch.cat([product(hidden[two]) for product in to_logits], dim=-1)
        logits = softcap(raw, cap) / temperature[two, None]
        mine = None if own is None else own[two]
        draw = draw_tokens(logits, stats["argmax"][two], uniforms[two], mine, top_k[two])
        stats["draw"][two] = draw
        stats["draw_logprob"][two] = torch.log_softmax(logits, dim=-1).gather(1, draw[:, None]).squeeze(1)


class NativePass:
    """The compiled pass."""

    def __init__(
        self, compiled: native.Native, cap: float, temperature: Tensor, own: Tensor | None, uniforms: Tensor
    ) -> None:
        self._compiled, self._cap = compiled, cap
        self._temperature, self._uniforms = temperature.contiguous(), uniforms.contiguous()
        self._own = None if own is None else own.float().contiguous()
        self._state = compiled.vocab_state(temperature.shape[0])

    def take(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        probs = self._compiled.vocab(
            logits, first, self._cap, self._temperature, self._own, self._uniforms, self._state
        )
        return probs, self._state.view(torch.float32)[:, 7]

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        total, moment = self._state[:, 0], self._state[:, 1]
        whole, floats = self._state.view(torch.int64), self._state.view(torch.float32)
        return _finish(total, moment, whole[:, 5], whole[:, 6], floats[:, 6], floats[:, 8], self._own)


class TorchPass:
    """The same in torch ops, where nothing could be compiled."""

    def __init__(self, cap: float, temperature: Tensor, own: Tensor | None, uniforms: Tensor) -> None:
        self._cap, self._temperature, self._own, self._uniforms = cap, temperature, own, uniforms
        rows = temperature.shape[0]
        self._total, self._moment, self._mass = torch.zeros(3, rows, dtype=torch.float64)
        self._top, self._drawn = torch.full((2, rows), -torch.inf)
        self._argmax, self._draw = torch.zeros(2, rows, dtype=torch.int64)

    def take(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor]:
        z = softcap(logits, self._cap) / self._temperature[:, None]
        highest = z.amax(dim=-1)
        place = (z == highest[:, None]).to(torch.uint8).argmax(dim=-1)
        self._argmax = torch.where(highest > self._top, first + place, self._argmax)
        top = torch.maximum(highest, self._top)
        down = (self._top - top).double() if first else torch.zeros_like(self._total)
        factor = down.exp()
        self._moment = (self._moment + self._total * down) * factor
        self._total, self._top = self._total * factor, top
        power = torch.ones(()) if self._own is None else torch.where(self._own > 0, 1 / self._own, 1.0)
        self._mass = self._mass * (down * power).exp()
        below = z.sub_(top[:, None])
        probs = below.exp()
        self._total = self._total + probs.sum(dim=-1)
        self._moment = self._moment + (probs * below).sum(dim=-1)
        self._choose(probs if self._own is None else (below * power[:, None]).exp(), below, first)
        return probs, factor.float()

    def _choose(self, weights: Tensor, below: Tensor, first: int) -> None:
        """Let the blocks of a chunk compete for the draw: see `reference.categorical`."""
        rows, size = weights.shape
        blocks = -(-size // DRAW_BLOCK)
        inner = torch.nn.functional.pad(weights, (0, blocks * DRAW_BLOCK - size)).view(rows, blocks, DRAW_BLOCK)
        mass = inner.double().sum(dim=-1)
        running = self._mass[:, None] + mass.cumsum(dim=-1)
        share = mass / running
        begin = first // DRAW_BLOCK
        uniforms = self._uniforms[:, begin : begin + blocks]
        taken = torch.where((uniforms < share) & (mass > 0), torch.arange(blocks), -1).amax(dim=-1)
        self._mass = running[:, -1]
        at = taken.clamp(min=0)[:, None]
        curve = inner.gather(1, at[:, :, None].expand(rows, 1, DRAW_BLOCK)).squeeze(1).double().cumsum(dim=-1)
        target = (uniforms / share).gather(1, at) * curve[:, -1:]
        last = (curve < curve[:, -1:]).sum(dim=-1, keepdim=True)
        token = at * DRAW_BLOCK + torch.searchsorted(curve, target, right=True).minimum(last)
        mine = taken >= 0
        self._draw = torch.where(mine, first + token.squeeze(1), self._draw)
        drawn = below.gather(1, token.clamp(max=size - 1)).squeeze(1) + self._top
        self._drawn = torch.where(mine, drawn, self._drawn)

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        return _finish(self._total, self._moment, self._argmax, self._draw, self._top, self._drawn, self._own)


def _finish(
    total: Tensor, moment: Tensor, argmax: Tensor, draw: Tensor, top: Tensor, drawn: Tensor, own: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    log_total = total.log()
    if own is not None:  # a temperature of 0 draws the most likely token
        draw, drawn = torch.where(own == 0, argmax, draw), torch.where(own == 0, top, drawn)
    return total, {
        "entropy": (log_total - moment / total).float(),
        "argmax": argmax.clone(),
        "top_logprob": (-log_total).float(),
        "draw": draw.clone(),
        "draw_logprob": ((drawn - top).double() - log_total).float(),
    }
