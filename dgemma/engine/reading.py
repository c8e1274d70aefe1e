"""Reads canvases without answering: one denoising pass, and the log-probabilities of chosen tokens at chosen positions.

Uses caches of its own and may run beside the engine's ticks. Denoising only reads a cache, so all canvases behind the
same text share one. Knows ids; what they mean, and how reads become a decision, is `control`'s matter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dgemma.cache import KVCache
from dgemma.diffusion.noise import first_canvas
from dgemma.engine.loop import Engine
from dgemma.engine.request import max_canvas, put
from dgemma.engine.scheduler import cut, whole_chunk
from dgemma.errors import RequestError

T = TypeVar("T")

_ROWS = 32  # rows of full logits held at a time
_CACHES = 32  # caches held at a time


@dataclass(frozen=True)
class Look:
    """A canvas of `width` behind the tokens of `lead`, and what to read of it: `tokens` at `position`.

    `pins` are pairs of position and token; everything else is noise.
    """

    lead: tuple[int, ...]
    width: int
    pins: tuple[tuple[int, int], ...]
    position: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """A canvas of a batch: the number of its cache, what is in it, and the noise draw."""

    cache: int
    width: int
    pins: tuple[tuple[int, int], ...]
    draw: int


def narrowest(engine: Engine, reach: int, asked: int | None = None) -> int:
    """The least width that the checkpoint was trained with and that holds `reach` positions; or the one asked for."""
    model = engine.model_config
    if asked is not None and not 1 <= asked <= max_canvas(model):
        raise RequestError(f"canvas_length must be 1..{max_canvas(model)} for this model, got {asked}")
    widest = asked or model.trained_widths[-1]
    if reach > widest:
        raise RequestError(
            f"the answer and the text after it take {reach} positions; a canvas has {widest}. "
            "Let less text follow the answer" + ("" if asked is None else ", or ask for a wider canvas_length")
        )
    return asked or next(width for width in model.trained_widths if width >= reach)


@torch.inference_mode()
def read(engine: Engine, looks: Sequence[Look], *, draws: int, seed: int) -> list[list[list[float]]]:
    """Log-probabilities in nats, at temperature 1: of each look, for each draw of the noise, of each of its tokens.

    Noise is keyed by (seed, draw, position), so a read depends on nothing else that is asked. Looks that differ in
    nothing but position and tokens share a row of the batch.
    """
    found: list[list[list[float]]] = [[[] for _ in range(draws)] for _ in looks]
    for look in looks:
        _check(engine, look.lead, look.width)
    leads, places = _unlike([look.lead for look in looks])
    behind: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        behind.setdefault(place, []).append(number)
    for start, caches in _behind(engine, leads):
        rows: dict[_Row, list[int]] = {}
        for place in range(start, start + len(caches)):
            for number in behind[place]:
                for draw in range(draws):
                    row = _Row(place - start, looks[number].width, looks[number].pins, draw)
                    rows.setdefault(row, []).append(number)
        for part in _filled([*rows], [row.width for row in rows], engine.config.max_batch_tokens):
            states = engine.runner.look([(caches[row.cache][0], _canvas(engine, row, seed)) for row in part])
            asked = [(number, at) for at, row in enumerate(part) for number in rows[row]]
            hidden = [states[at][looks[number].position] for number, at in asked]
            values = _chosen(engine, hidden, [looks[number].tokens for number, _ in asked])
            for (number, at), told in zip(asked, values, strict=True):
                found[number][part[at].draw] = told
    return found


@torch.inference_mode()
def continuations(engine: Engine, lead: Sequence[int], tails: Sequence[Sequence[int]]) -> list[float]:
    """The encoder's log-probability in nats of each whole tail behind `lead`; both have at least 1 token."""
    _check(engine, lead, max(map(len, tails)))
    ((_, ((cache, last),)),) = _behind(engine, [lead])
    firsts = torch.log_softmax(engine.runner.logits(last[None])[0], dim=-1)
    totals = [float(firsts[tail[0]]) for tail in tails]
    longer = [number for number, tail in enumerate(tails) if len(tail) > 1]
    copies: list[KVCache] = []
    for part in _filled(longer, [len(tails[number]) for number in longer], engine.config.max_batch_tokens, _CACHES):
        copies += [copy.deepcopy(cache) for _ in part[len(copies) :]]
        states = engine.runner.encode([(own, tails[number][:-1]) for own, number in zip(copies, part, strict=False)])
        for own in copies:
            own.truncate(len(lead))
        rows = [row for state in states for row in state]
        values = iter(_chosen(engine, rows, [(token,) for number in part for token in tails[number][1:]]))
        for number in part:
            totals[number] += sum(next(values)[0] for _ in tails[number][1:])
    return totals


def _check(engine: Engine, lead: Sequence[int], width: int) -> None:
    model = engine.model_config
    if len(lead) + width > model.max_positions:
        raise RequestError(
            f"the text before the answer ({len(lead)} tokens) and the canvas ({width}) need {len(lead) + width} "
            f"positions; the model has {model.max_positions}"
        )


def _canvas(engine: Engine, row: _Row, seed: int) -> Tensor:
    """Noise with the pins in it."""
    ids = first_canvas(seed, row.draw, 0, row.width, engine.model_config.vocab_size, engine.runner.device)
    put(ids, dict(row.pins))
    return ids


def _chosen(engine: Engine, rows: Sequence[Tensor], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities of each hidden state's tokens."""
    out = []
    for start in range(0, len(rows), _ROWS):
        logp = torch.log_softmax(engine.runner.logits(torch.stack(list(rows[start : start + _ROWS]))), dim=-1)
        for row, wanted in zip(logp, tokens[start : start + _ROWS], strict=False):
            out.append(row[torch.tensor(wanted, device=row.device)].tolist())
    return out


def _unlike(leads: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The leads that differ, and the place of each lead among them. Those that are one object are looked at once."""
    by_id: dict[int, int] = {}
    by_value: dict[tuple[int, ...], int] = {}
    for lead in leads:
        if id(lead) not in by_id:
            by_id[id(lead)] = by_value.setdefault(tuple(lead), len(by_value))
    return [*by_value], [by_id[id(lead)] for lead in leads]


def _behind(engine: Engine, leads: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[tuple[KVCache, Tensor]]]]:
    """Some of the (unlike) leads at a time: the place of the first, and each one's cache and last hidden state.

    What all begin with is encoded once. It ends with a whole block, so that the parts of passes, and with them the
    last bits, are those that each lead would have alone.
    """
    low, high = min(leads, key=list), max(leads, key=list)
    shared = next((at for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    shared = min(shared, min(map(len, leads)) - 1)
    shared -= shared % engine.config.block
    base = engine.new_cache()
    if shared:
        _encode(engine, [(base, low[:shared])])
    for start in range(0, len(leads), _CACHES):
        some = leads[start : start + _CACHES]
        caches = [base] if len(leads) == 1 else [copy.deepcopy(base) for _ in some]
        lasts = _encode(engine, [(cache, lead[shared:]) for cache, lead in zip(caches, some, strict=True)])
        yield start, list(zip(caches, lasts, strict=True))


def _encode(engine: Engine, jobs: Sequence[tuple[KVCache, Sequence[int]]]) -> list[Tensor]:
    """Append each job's ids to its cache, cut as the engine cuts a prompt; the last hidden state `[H]` of each."""
    lasts: dict[int, Tensor] = {}
    chunk = whole_chunk(engine.config)
    for start in range(0, max(len(ids) for _, ids in jobs), chunk):
        open_jobs = [number for number, (_, ids) in enumerate(jobs) if len(ids) > start]
        sizes = [min(chunk, len(jobs[number][1]) - start) for number in open_jobs]
        for part in _filled(open_jobs, sizes, engine.config.max_batch_tokens):
            pieces: list[tuple[KVCache, Sequence[int]]] = []
            ends = []
            for number in part:
                cache, ids = jobs[number]
                piece = ids[start : start + chunk]
                counts = cut(len(piece), engine.config.block)
                for view, count in zip(cache.segments(counts), counts, strict=True):
                    pieces.append((view, piece[:count]))
                    piece = piece[count:]
                ends.append(len(pieces) - 1)
            states = engine.runner.encode(pieces)
            for number, end in zip(part, ends, strict=True):
                cache, ids = jobs[number]
                cache.advance(min(chunk, len(ids) - start))
                lasts[number] = states[end][-1]
    return [lasts[number] for number in range(len(jobs))]


def _filled(items: Sequence[T], sizes: Sequence[int], most: int, count: int | None = None) -> Iterator[list[T]]:
    """The items in order, as many at a time as `most` allows (one at least), and `count`."""
    part: list[T] = []
    room = most
    for item, size in zip(items, sizes, strict=True):
        if part and (size > room or len(part) == count):
            yield part
            part, room = [], most
        part.append(item)
        room -= size
    if part:
        yield part
