"""The vocabulary op on a GPU: no `rows x vocabulary` tensor. The embedding is read twice; all sums are float32 or more.

The vocabulary goes by in chunks, and each chunk in tiles of `TILE` tokens. Of a tile, `_score` keeps a few numbers a
row (highest logit, sums, lowest id of the highest) and its exponentials relative to that highest logit, in a scratch of
one chunk. `_mix` multiplies those with the embedding's rows, with a running maximum for each share of the tiles. At the
end `_finish` joins a row's tiles in order: entropy, argmax, and the draw. Which block and tile are drawn from follows
from sums of tiles; only the logits of that tile are computed once more to find the token. `_join` adds up the shares.

Nothing depends on how many rows there are. Rows with top-k have a second look at all their logits, in torch (and the
host must know whether there are any: give `top_k=None` where a launch must not wait). A quantised head takes `shaped`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgemma.kernels import reference, shaped, tuning
from dgemma.kernels.cpu_vocab import PackedHead, draw_top
from dgemma.kernels.reference import DRAW_BLOCK, VocabStats
from dgemma.kernels.triton_types import interpreted, narrow

TILE = 128
_TILES = DRAW_BLOCK // TILE
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_VARYING = ["rows", "first", "there", "number", "each"]  # no variant of a kernel for their sake
_PIECE = 8 * DRAW_BLOCK  # tokens whose logits torch computes at once for top-k


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the work is cut: `rows` a program, `inputs` of a logit at a time, `columns` of the soft embedding a program;
    `chunk` tokens share the scratch, `shares` programs share a chunk's tiles, and no more than `most` rows go at once.

    By the formulas only `inputs`, `chunk` and `shares` have a part in the order of sums.
    """

    rows: int = 64
    inputs: int = 64
    columns: int = 128
    chunk: int = 32 * DRAW_BLOCK
    shares: int = 4
    most: int = 512
    warps: int = 8
    stages: int = 3


def shipped_blocks(dtype: torch.dtype) -> Blocks:
    """Not tuned; what fits shared memory and registers of an H100 (`tests/test_triton_compile.py`)."""
    return Blocks(inputs=32, columns=64) if dtype is torch.float32 else Blocks()


def blocks_of(embed: Tensor) -> Blocks:
    """What was tuned here, or the shipped ones."""
    return tuning.blocks("vocab", (*embed.shape, str(embed.dtype)), shipped_blocks(embed.dtype))


def vocab(
    hidden: Tensor,
    embed: Tensor | PackedHead,
    cap: float,
    temperature: Tensor,
    uniforms: Tensor,
    draw_temperature: Tensor | None = None,
    top_k: Tensor | None = None,
) -> VocabStats:
    """`reference.vocab`; the same draw unless a uniform is within about 1e-6 of a boundary."""
    rest = cap, temperature, uniforms, draw_temperature, top_k
    if isinstance(embed, PackedHead):
        return shaped.vocab(hidden, embed, *rest)
    if hidden.dtype not in _TYPES or embed.dtype is not hidden.dtype:
        return reference.vocab(hidden, embed, *rest)
    blocks = blocks_of(embed)
    # Weights may be parameters; nothing here is differentiable.
    hidden, embed = _dense(hidden.detach()), _dense(embed.detach())
    own = None if draw_temperature is None else draw_temperature.float().contiguous()
    parts = []
    for first in range(0, max(1, len(hidden)), blocks.most):
        some = slice(first, first + blocks.most)
        mine = None if own is None else own[some]
        parts.append(_rows(hidden[some], embed, cap, temperature[some].float(), uniforms[some].double(), mine, blocks))
    stats = parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if top_k is not None and bool((top_k > 0).any()):
        pieces = [partial(_logits, part) for part in embed.split(_PIECE)]
        draw_top(hidden, pieces, cap, temperature, uniforms, own, top_k, stats)
    return VocabStats(**stats)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _logits(embed: Tensor, hidden: Tensor) -> Tensor:
    return reference.linear(hidden.float(), embed.float())


def _rows(
    hidden: Tensor, embed: Tensor, cap: float, heat: Tensor, uniforms: Tensor, own: Tensor | None, blocks: Blocks
) -> dict[str, Tensor]:
    """The statistics of rows that go at once."""
    (rows, size), vocab, device = hidden.shape, embed.shape[0], hidden.device
    draws = triton.cdiv(vocab, DRAW_BLOCK)
    tiles, chunk = draws * _TILES, min(blocks.chunk, draws * DRAW_BLOCK)
    chunks = triton.cdiv(vocab, chunk)
    make: Callable[..., Tensor] = partial(torch.empty, device=device, dtype=torch.float32)
    stats = {name: make(rows) for name in ("entropy", "top_logprob", "draw_logprob")}
    stats |= {name: make(rows, dtype=torch.int64) for name in ("argmax", "draw")}
    soft = make(rows, size, dtype=embed.dtype)
    if not rows:
        return {**stats, "soft": soft}
    heat, uniforms = heat.contiguous(), uniforms.contiguous()
    probs = make(rows, chunk, dtype=hidden.dtype)
    tile_stats = make(4, rows, tiles)  # highest logit, sum, moment, mass of the draw
    firsts = make(rows, tiles, dtype=torch.int32)
    sums = make(blocks.shares, rows, size)
    # A program reads the maximum that the chunk before left, while another may already write this chunk's.
    tops = make(chunks, blocks.shares, rows)
    whole = make(2, rows)  # highest logit, and the sum of exp(z - it)
    strides, wide = (hidden.stride(0), embed.stride(0)), interpreted()
    launch = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    row_blocks = triton.cdiv(rows, blocks.rows)
    for number in range(chunks):
        first = number * chunk // TILE
        there = min(chunk // TILE, triton.cdiv(vocab, TILE) - first)
        _score[(row_blocks, there)](
            hidden, embed, heat, heat if own is None else own, probs, tile_stats, firsts,
            rows, vocab, size, *strides, cap, first, tiles, chunk,
            OWN=own is not None, ROWS=blocks.rows, TILE=TILE, INPUTS=blocks.inputs, WIDE=wide, **launch,
        )  # fmt: skip
        _mix[(row_blocks, triton.cdiv(size, blocks.columns), blocks.shares)](
            probs, embed, tile_stats, sums, tops, rows, vocab, size, strides[1], first, there, tiles, chunk, number,
            triton.cdiv(there, blocks.shares),
            ROWS=blocks.rows, COLUMNS=blocks.columns, TILE=TILE, WIDE=wide, **launch,
        )  # fmt: skip
    _finish[(rows,)](
        hidden, embed, heat, heat if own is None else own, uniforms, tile_stats, firsts, whole,
        *(stats[name] for name in ("entropy", "argmax", "top_logprob", "draw", "draw_logprob")),
        rows, vocab, size, *strides, cap, draws,
        OWN=own is not None, DRAWS=triton.next_power_of_2(draws), TILES=_TILES, TILE=TILE, INPUTS=blocks.inputs,
        num_warps=8 if draws > 64 else 4,
    )  # fmt: skip
    _join[(rows, triton.cdiv(size, 1024))](
        sums, tops, whole, soft, rows, size, chunks, SHARES=blocks.shares, BLOCK=1024, WIDE=wide
    )
    return {**stats, "soft": soft}


@triton.jit
def _tanh(x):
    """A power series near zero, where the quotient would lose digits; elsewhere 1 - 2 / (exp(2x) + 1)."""
    square = x * x
    series = -0.001455834387051 + square * 0.000590027440946
    series = 0.003592128036572 + square * series
    series = -0.008863235529902 + square * series
    series = 0.021869488536155 + square * series
    series = -0.053968253968254 + square * series
    series = 0.133333333333333 + square * series
    series = x + x * square * (-0.333333333333333 + square * series)
    return tl.where(square < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _capped(raw, cap, heat):
    return _tanh(raw / cap) * cap / heat


@triton.jit(do_not_specialize=_VARYING)
def _score(
    hidden, embed, heat, own, probs, tile_stats, firsts, rows, vocab, size, hidden_stride, embed_stride, cap, first,
    tiles, chunk,
    OWN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, INPUTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits of a block of rows and one tile. Programs of one tile run side by side: its weights are read once."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = first + tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    live, there = row < rows, token < vocab
    left = hidden + row[:, None] * hidden_stride
    right = embed + token.to(tl.int64)[:, None] * embed_stride
    raw = tl.zeros((ROWS, TILE), tl.float32)
    for at in range(0, size, INPUTS):
        inputs = at + tl.arange(0, INPUTS)
        states = tl.load(left + inputs[None, :], mask=live[:, None] & (inputs < size)[None, :], other=0.0)
        weights = tl.load(right + inputs[None, :], mask=there[:, None] & (inputs < size)[None, :], other=0.0)
        if WIDE:
            states, weights = states.to(tl.float32), weights.to(tl.float32)
        raw = tl.dot(states, tl.trans(weights), raw, input_precision="ieee")
    z = _capped(raw, cap, tl.load(heat + row, mask=live, other=1.0)[:, None])
    z = tl.where(there[None, :], z, float("-inf"))
    top = tl.max(z, axis=1)
    below = tl.where(there[None, :], z - tl.where(top == float("-inf"), 0.0, top)[:, None], float("-inf"))
    share = tl.exp(below)
    place, behind = row * tiles + tile, tl.cast(rows, tl.int64) * tiles
    tl.store(tile_stats + place, top, mask=live)
    tl.store(tile_stats + behind + place, tl.sum(share, axis=1), mask=live)
    moment = tl.sum(tl.where(share > 0, share * below, 0.0), axis=1)
    tl.store(tile_stats + 2 * behind + place, moment, mask=live)
    if OWN:
        power = _power(tl.load(own + row, mask=live, other=1.0))
        tl.store(tile_stats + 3 * behind + place, tl.sum(tl.exp(below * power[:, None]), axis=1), mask=live)
    highest = (z == top[:, None]) & there[None, :]
    tl.store(firsts + place, tl.min(tl.where(highest, token[None, :], vocab - 1), axis=1), mask=live)
    column = (token - first * TILE)[None, :]
    tl.store(probs + row[:, None] * chunk + column, narrow(share, probs.dtype.element_ty, WIDE), mask=live[:, None])


@triton.jit
def _power(own):
    """What the draw's temperature makes of a difference of logits. 0 draws the argmax, and sums anything."""
    return tl.where(own > 0, 1.0 / tl.where(own > 0, own, 1.0), 1.0)


@triton.jit(do_not_specialize=_VARYING)
def _mix(
    probs, embed, tile_stats, sums, tops, rows, vocab, size, embed_stride, first, there, tiles, chunk, number, each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the share of a chunk's tiles to its sums of exp(z - top) x embedding."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.program_id(2)
    live, inside = row < rows, column < size
    keep = live[:, None] & inside[None, :]
    place = sums + (share * tl.cast(rows, tl.int64) + row)[:, None] * size + column[None, :]
    top_of = tops + share * rows + row
    step = tl.num_programs(2) * rows
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    mixed = tl.zeros((ROWS, COLUMNS), tl.float32)
    if number > 0:
        top = tl.load(top_of + (number - 1) * step, mask=live, other=0.0)
        mixed = tl.load(place, mask=keep, other=0.0)
    for tile in range(share * each, tl.minimum(share * each + each, there)):
        token = (first + tile) * TILE + tl.arange(0, TILE)
        its = tl.load(tile_stats + row * tiles + first + tile, mask=live, other=0.0)
        higher = tl.maximum(top, its)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        known = live[:, None] & (token < vocab)[None, :]
        part = tl.load(probs + row[:, None] * chunk + tile * TILE + tl.arange(0, TILE)[None, :], mask=known, other=0.0)
        weights = tl.load(
            embed + token.to(tl.int64)[:, None] * embed_stride + column[None, :],
            mask=(token < vocab)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        if WIDE:
            weights = weights.to(tl.float32)
        part = (part.to(tl.float32) * tl.exp(its - base)[:, None]).to(weights.dtype)
        mixed = tl.dot(part, weights, mixed * tl.exp(top - base)[:, None], input_precision="ieee")
        top = higher
    tl.store(place, mixed, mask=keep)
    if tl.program_id(1) == 0:
        tl.store(top_of + number * step, top, mask=live)


@triton.jit(do_not_specialize=_VARYING)
def _finish(
    hidden, embed, heat, own, uniforms, tile_stats, firsts, whole, entropy, argmax, top_logprob, draw, draw_logprob,
    rows, vocab, size, hidden_stride, embed_stride, cap, draws,
    OWN: tl.constexpr, DRAWS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """One row: join its tiles `[draw block, tile of the block]` in float64, draw, and say what there is to say."""
    row = tl.program_id(0).to(tl.int64)
    block, tile = tl.arange(0, DRAWS), tl.arange(0, TILES)
    there = block[:, None] * TILES + tile[None, :] < tl.cdiv(vocab, TILE)
    behind = tl.cast(rows, tl.int64) * draws * TILES
    place = row * draws * TILES + block[:, None] * TILES + tile[None, :]
    tops = tl.load(tile_stats + place, mask=there, other=float("-inf"))
    top = tl.max(tl.max(tops, axis=1), axis=0)
    first = tl.load(firsts + place, mask=there, other=0)
    first = tl.min(tl.min(tl.where((tops == top) & there, first, vocab - 1), axis=1), axis=0)
    down = tl.where(tops == float("-inf"), -1e30, tops - top).to(tl.float64)
    scale = tl.exp(down)
    part = tl.load(tile_stats + behind + place, mask=there, other=0.0).to(tl.float64)
    moment = tl.load(tile_stats + 2 * behind + place, mask=there, other=0.0).to(tl.float64)
    total = tl.sum(tl.sum(part * scale, axis=1), axis=0)
    # The entropy in its shifted form: log S - sum e (z - top) / S.
    moment = tl.sum(tl.sum(scale * (moment + part * tl.where(part > 0, down, 0.0)), axis=1), axis=0)
    log_total = tl.log(total)
    tl.store(whole + row, top)
    tl.store(whole + rows + row, total.to(tl.float32))
    tl.store(entropy + row, (log_total - moment / total).to(tl.float32))
    tl.store(argmax + row, first.to(tl.int64))
    tl.store(top_logprob + row, (-log_total).to(tl.float32))

    # Blocks compete in order; the uniform of the one that stays is stretched to find the tile and the token in it.
    power = 1.0
    if OWN:
        power = _power(tl.load(own + row))
        part = tl.load(tile_stats + 3 * behind + place, mask=there, other=0.0).to(tl.float64)
        scale = tl.exp(down * power)
    part = part * scale
    mass = tl.sum(part, axis=1)
    running = tl.cumsum(mass, axis=0)
    chance = mass / tl.where(running > 0, running, 1.0)
    uniform = tl.load(uniforms + row * draws + block, mask=block < draws, other=2.0)
    taken = tl.maximum(tl.max(tl.where((uniform < chance) & (mass > 0), block, -1), axis=0), 0)
    mine = block == taken
    stretched = tl.sum(tl.where(mine, uniform / tl.where(mine & (chance > 0), chance, 1.0), 0.0), axis=0)
    target = tl.minimum(stretched, 1.0) * tl.sum(tl.where(mine, mass, 0.0), axis=0)
    inner = tl.sum(tl.where(mine[:, None], part, 0.0), axis=0)
    chosen = _where(tl.cumsum(inner, axis=0), target)
    before = tl.sum(tl.where(tile < chosen, inner, 0.0), axis=0)
    of = tl.sum(tl.where(tile == chosen, inner, 0.0), axis=0)
    fraction = tl.minimum(tl.maximum((target - before) / tl.where(of > 0, of, 1.0), 0.0), 1.0)

    token = (taken * TILES + chosen) * TILE + tl.arange(0, TILE)
    known = token < vocab
    raw = tl.zeros((TILE,), tl.float32)
    for at in range(0, size, INPUTS):
        inputs = at + tl.arange(0, INPUTS)
        states = tl.load(hidden + row * hidden_stride + inputs, mask=inputs < size, other=0.0).to(tl.float32)
        weights = tl.load(
            embed + token.to(tl.int64)[:, None] * embed_stride + inputs[None, :],
            mask=known[:, None] & (inputs < size)[None, :], other=0.0,
        )  # fmt: skip
        raw += tl.sum(weights.to(tl.float32) * states[None, :], axis=1)
    z = tl.where(known, _capped(raw, cap, tl.load(heat + row)), float("-inf"))
    below = (z - tl.max(z, axis=0)) * power
    curve = tl.cumsum(tl.exp(below.to(tl.float64)), axis=0)
    found = _where(curve, fraction * tl.max(curve, axis=0))
    drawn = (taken * TILES + chosen) * TILE + found
    logit = tl.sum(tl.where(token == drawn, z, 0.0), axis=0)
    logprob = ((logit - top).to(tl.float64) - log_total).to(tl.float32)
    if OWN:
        greedy = tl.load(own + row) == 0
        drawn = tl.where(greedy, first, drawn)
        logprob = tl.where(greedy, (-log_total).to(tl.float32), logprob)
    tl.store(draw + row, drawn.to(tl.int64))
    tl.store(draw_logprob + row, logprob)


@triton.jit
def _where(curve, target):
    """Index of the first sum above the target; of the last that rises where rounding leaves none."""
    passed = tl.sum((curve <= target).to(tl.int32), axis=0)
    return tl.minimum(passed, tl.sum((curve < tl.max(curve, axis=0)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=_VARYING)
def _join(
    sums, tops, whole, soft, rows, size, chunks, SHARES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The soft embedding of one row: its shares, in order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    top, mixed = tl.load(whole + row), tl.zeros((BLOCK,), tl.float32)
    for share in range(SHARES):
        scale = tl.exp(tl.load(tops + ((chunks - 1) * SHARES + share) * rows + row) - top)
        mixed += scale * tl.load(sums + (share * rows + row) * size + column, mask=inside, other=0.0)
    mixed /= tl.load(whole + rows + row)
    tl.store(soft + row * size + column, narrow(mixed, soft.dtype.element_ty, WIDE), mask=inside)
