"""What a model thinks of given text: the encoder's likelihood, the canvas cross-entropy, and the diffusion bound.

Works on a `DiffusionGemma` (float32, for numbers to report) and token documents; knows no engine and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgemma.diffusion.noise import corrupt
from dgemma.eval.documents import Document, Estimate, Window, cut, estimate
from dgemma.eval.nelbo import noise_level, token_nelbo
from dgemma.model import DiffusionGemma
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.head import soft_signal

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
BINS = 10
GRID = tuple(float(step) for step in range(-15, 2))
_ROWS = 256  # rows of full logits held at a time


@dataclass(frozen=True)
class Canvas:
    """How noisy blocks are laid out: their `width`, how much of a document is denoised at once (`region`) after how
    much `context`, the token that `fill`s a document's last canvas (None: incomplete canvases are left out), and
    whether the prediction of a first pass over the same noise is given as the self-conditioning `signal`."""

    width: int
    region: int
    context: int
    fill: int | None = None
    signal: bool = False

    def windows(self, documents: Sequence[Document]) -> list[Window]:
        return cut(documents, region=self.region, context=self.context, block=self.width, fill=self.fill)


EVERY_TOKEN = Canvas(width=1, region=256, context=256)


@dataclass(frozen=True)
class Bound:
    """The diffusion bound of a set of documents in two readings of one network.

    `raw` takes the network's prediction as it is. `calibrated` adds one number per tenth of the noise level to the
    logit of the token that stands at the position (see `nelbo` for why), fitted on the other half of the documents:
    `shifts [2][BINS]` are those that even and odd documents are scored with. `blocks` canvases were scored,
    `rounds` times each.
    """

    raw: Estimate
    calibrated: Estimate
    shifts: tuple[tuple[float, ...], ...]
    blocks: int
    rounds: int


@dataclass(frozen=True)
class CanvasLoss:
    """Nats a token at one noise level: over `every` position (the training loss), over the `replaced` ones, and the
    share of replaced tokens that the prediction gets right."""

    level: float
    every: float
    every_se: float
    replaced: float
    accuracy: float


@torch.no_grad()
def autoregressive(
    model: DiffusionGemma, documents: Sequence[Document], canvas: Canvas = EVERY_TOKEN, *, batch_tokens: int = 4096
) -> Estimate:
    """The encoder's likelihood of the documents, in windows; a token has the window's context, where there is so much.

    With the `canvas` of a bound exactly the tokens of that bound are scored.
    """
    windows = canvas.windows(documents)
    nats = np.zeros(len(documents))
    for part in _batches(windows, batch_tokens):
        ids, _ = _pack(part, 1)
        layout = Layout(torch.ones(len(part), dtype=torch.int64), ids.shape[1], 1, 1)
        hidden, _ = _encode(model, ids, layout)
        scored = torch.zeros(ids.shape, dtype=torch.bool)
        for row, window in enumerate(part):
            scored[row, window.start : window.start + window.tokens] = True
        losses, _ = _cross_entropy(model, hidden[:, :-1][scored[:, 1:]], ids[scored])
        rows = torch.nonzero(scored)[:, 0]
        _add(nats, part, rows, losses)
    return _estimate(documents, windows, nats)


@torch.no_grad()
def canvas_cross_entropy(
    model: DiffusionGemma,
    documents: Sequence[Document],
    canvas: Canvas,
    *,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    batch_tokens: int = 4096,
) -> list[CanvasLoss]:
    """The denoiser's loss at given noise levels, every canvas of every document once per level.

    Filling tokens after the end of a document are seen by the network but not counted.
    """
    windows = canvas.windows(documents)
    generator = torch.Generator().manual_seed(seed)
    sums = np.zeros((len(levels), 3, len(documents)))  # loss of all, loss of replaced, right of replaced
    tokens, replaced_tokens = np.zeros(len(documents)), np.zeros(len(levels))
    for part in _batches(windows, batch_tokens):
        ids, layout = _pack(part, canvas.width)
        _, attend = _encode(model, ids, layout)
        clean = ids.gather(1, layout.canvas_positions())
        real = torch.arange(layout.region) < torch.tensor([window.tokens for window in part])[:, None]
        rows = torch.nonzero(real)[:, 0]
        _add(tokens, part, rows, torch.ones(len(rows)))
        for at, level in enumerate(levels):
            noisy, replaced = corrupt(clean, level, model.config.vocab_size, generator)
            hidden = _denoise(model, noisy, layout, attend, canvas.signal)[real]
            hit = replaced[real]
            losses, right = _cross_entropy(model, hidden, clean[real])
            for kind, values in enumerate((losses, losses * hit, right * hit)):
                _add(sums[at, kind], part, rows, values)
            replaced_tokens[at] += int(hit.sum())
    sizes = np.ones(len(documents))
    results = []
    for at, level in enumerate(levels):
        mean = estimate(sums[at, 0], tokens, sizes)
        count = max(1.0, float(replaced_tokens[at]))
        results.append(
            CanvasLoss(
                level,
                mean.nats_per_token,
                mean.nats_per_token_se,
                float(sums[at, 1].sum()) / count,
                float(sums[at, 2].sum()) / count,
            )
        )
    return results


@torch.no_grad()
def diffusion_bound(
    model: DiffusionGemma,
    documents: Sequence[Document],
    canvas: Canvas,
    *,
    rounds: int = 1,
    seed: int = 0,
    batch_tokens: int = 4096,
    grid: Sequence[float] = GRID,
) -> Bound:
    """An upper bound on -log p of the documents, canvas after canvas, each given the clean text before it.

    Noise levels are stratified over all canvases and `rounds`. Tokens after the end that fill the last canvas are
    predicted too, and so part of the bound. Needs two documents or more (each half calibrates the other).
    """
    windows = canvas.windows(documents)
    table = _nelbo_table(
        model, windows, len(documents), canvas, rounds=rounds, seed=seed, batch_tokens=batch_tokens, grid=grid
    )
    half = np.arange(len(documents)) % 2
    shifts = []
    fitted = np.zeros(len(documents))
    for side in (0, 1):
        best = table[half != side].sum(axis=0)[:, 1:].argmin(axis=1)
        shifts.append(tuple(float(grid[at]) for at in best))
        fitted[half == side] = table[half == side][:, np.arange(BINS), 1 + best].sum(axis=1)
    return Bound(
        raw=_estimate(documents, windows, table[:, :, 0].sum(axis=1)),
        calibrated=_estimate(documents, windows, fitted),
        shifts=tuple(shifts),
        blocks=sum(_blocks(window, canvas.width) for window in windows),
        rounds=rounds,
    )


def _nelbo_table(
    model: DiffusionGemma,
    windows: Sequence[Window],
    documents: int,
    canvas: Canvas,
    *,
    rounds: int,
    seed: int,
    batch_tokens: int,
    grid: Sequence[float],
) -> np.ndarray:
    """Nats `[documents, BINS, 1 + grid]` by noise bin and shift; the first shift is none at all."""
    generator = torch.Generator().manual_seed(seed)
    counts = [_blocks(window, canvas.width) for window in windows]
    total = sum(counts)
    strata = (torch.randperm(total, generator=generator) + torch.rand(total, generator=generator)) / max(1, total)
    first = dict(zip(map(id, windows), np.cumsum([0, *counts[:-1]]), strict=True))
    table = np.zeros((documents, BINS, 1 + len(grid)))
    vocab = model.config.vocab_size
    for part in _batches(windows, batch_tokens):
        ids, layout = _pack(part, canvas.width)
        _, attend = _encode(model, ids, layout)
        clean = ids.gather(1, layout.canvas_positions())
        blocks = torch.tensor([_blocks(window, canvas.width) for window in part])
        real = torch.arange(layout.region) < (blocks * canvas.width)[:, None]
        u = torch.zeros(len(part), layout.region // canvas.width)
        for row, window in enumerate(part):
            u[row, : blocks[row]] = strata[first[id(window)] :][: blocks[row]]
        rows = torch.tensor([window.document for window in part])[torch.nonzero(real)[:, 0]]
        for turn in range(rounds):
            level = ((u + turn / rounds) % 1).repeat_interleave(canvas.width, dim=1)
            t = noise_level(level)
            noisy, _ = corrupt(clean, t, vocab, generator)
            hidden = _denoise(model, noisy, layout, attend, canvas.signal)[real]
            values = _nelbo(model, hidden, noisy[real], clean[real], t[real], grid)
            values = values * (2 * level[real].double() / rounds)[:, None]
            cells = rows * BINS + (t[real] * BINS).long().clamp(max=BINS - 1)
            flat = torch.zeros(documents * BINS, values.shape[1], dtype=torch.float64).index_add_(0, cells, values)
            table += flat.view(table.shape).numpy()
    return table


def _blocks(window: Window, width: int) -> int:
    return (len(window.ids) - window.start) // width


def _nelbo(
    model: DiffusionGemma, hidden: Tensor, noisy: Tensor, clean: Tensor, t: Tensor, grid: Sequence[float]
) -> Tensor:
    return torch.cat(
        [
            token_nelbo(model.logits(hidden[rows]), noisy[rows], clean[rows], t[rows], (0.0, *grid))
            for rows in torch.arange(len(hidden)).split(_ROWS)
        ]
    )


def _batches(windows: Sequence[Window], budget: int) -> Iterator[list[Window]]:
    """Windows of similar shape together, at most `budget` tokens with padding, at least one window."""
    part: list[Window] = []
    length = region = 0
    for window in sorted(windows, key=lambda w: (len(w.ids) - w.start, len(w.ids))):
        wide = max(region, len(window.ids) - window.start)
        longest = max(length, window.start + wide)
        if part and (longest + wide) * (len(part) + 1) > budget:
            yield part
            part, wide = [], len(window.ids) - window.start
            longest = len(window.ids)
        part.append(window)
        length, region = longest, wide
    if part:
        yield part


def _pack(part: Sequence[Window], width: int) -> tuple[Tensor, Layout]:
    """Ids `[B, L]` and the layout of their canvases; what lies behind a shorter window is padding."""
    region = -(-max(len(window.ids) - window.start for window in part) // width) * width
    length = max(window.start for window in part) + region
    ids = np.zeros((len(part), length), dtype=np.int64)
    for row, window in enumerate(part):
        ids[row, : len(window.ids)] = window.ids
    return torch.from_numpy(ids), Layout(torch.tensor([window.start for window in part]), length, region, width)


def _encode(model: DiffusionGemma, ids: Tensor, layout: Layout) -> tuple[Tensor, BlockAttend]:
    attend = BlockAttend(model.config, layout, model.embed.weight.dtype)
    return model.encode(ids, torch.arange(ids.shape[1]).expand_as(ids), attend.encode), attend


def _denoise(model: DiffusionGemma, noisy: Tensor, layout: Layout, attend: BlockAttend, signal: bool) -> Tensor:
    where = layout.canvas_positions()
    places = (torch.arange(layout.region) % layout.width).expand_as(noisy)
    soft = None
    if signal:
        soft = soft_signal(model, model.denoise(noisy, where, attend.denoise, None, places))
    return model.denoise(noisy, where, attend.denoise, soft, places)


def _cross_entropy(model: DiffusionGemma, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nats per position, and whether the target has the highest logit."""
    losses, right = [], []
    for rows in torch.arange(len(hidden)).split(_ROWS):
        logits = model.logits(hidden[rows])
        losses.append(torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none"))
        right.append(logits.argmax(dim=-1) == targets[rows])
    return torch.cat(losses), torch.cat(right)


def _add(totals: np.ndarray, part: Sequence[Window], rows: Tensor, values: Tensor) -> None:
    """Adds `values [n]` of batch rows `rows [n]` to the totals of their documents."""
    documents = np.array([window.document for window in part])[rows.numpy()]
    np.add.at(totals, documents, values.double().numpy())


def _estimate(documents: Sequence[Document], windows: Sequence[Window], nats: np.ndarray) -> Estimate:
    tokens, sizes = np.zeros(len(documents)), np.zeros(len(documents))
    for window in windows:
        tokens[window.document] += window.tokens
        sizes[window.document] += window.bytes
    return estimate(nats, tokens, sizes)
