"""Batches of `[clean | noisy blocks]` drawn from token documents.

Everything is a function of (seed, step), so a resumed run sees the same batches. Knows no files and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dgemma.errors import ConfigError
from dgemma.train.attend import Layout
from dgemma.train.data.documents import Source
from dgemma.train.objective import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """Shares of the sources and of the canvas widths from `first_step` on."""

    first_step: int
    weights: Sequence[float]
    width_weights: Sequence[float]


@dataclass(frozen=True)
class Example:
    """Clean tokens `ids [n]` whose blocks begin at `start`, and which tokens are targets.

    `valid [n]` counts for the canvas, `answers [n]` for the encoder (None: the same).
    """

    ids: np.ndarray
    start: int
    valid: np.ndarray
    answers: np.ndarray | None = None

    def blocks(self, width: int) -> int:
        return max(1, -(-(len(self.ids) - self.start) // width))


@dataclass(frozen=True)
class Mixture:
    """How batches are drawn: shares per phase, tokens per batch, longest stretches.

    A text begins with a prefix of at most `max_prefix` tokens; an answer follows all that precedes it, of which the
    last `max_context` tokens are kept. Of longer texts and answers a random stretch of whole blocks is trained, at
    most `max_region` tokens. `blocks`: "all" of an example at once, or "one" at random as the official code does.
    A source with `pack` shares rows among documents, which do not see each other.
    """

    sources: Sequence[Source]
    widths: Sequence[int]
    phases: Sequence[Phase]
    tokens: int
    max_prefix: int
    eos: int
    pad: int
    seed: int
    max_context: int = 1024
    max_region: int = 1024
    blocks: str = "all"

    def __post_init__(self) -> None:
        if self.blocks not in ("all", "one"):
            raise ConfigError(f"data blocks must be all or one, got {self.blocks!r}")

    def batch(self, step: int) -> Batch:
        """The batch of one micro-step: examples of one source and one width, of similar length."""
        rng, source = self._source(step)
        width = int(_pick(rng, self.widths, self._phase(step).width_weights))
        if not source.whole:
            region = max(width, 128)
            return self._rows(self._windows(source, region, rng), width, region, rng)
        if source.pack:
            return self._packed(self._any_length(source, width, rng), width, rng)
        examples = self._like_length(source, width, rng)
        return self._rows(examples, width, max(e.blocks(width) for e in examples) * width, rng)

    def source_name(self, step: int) -> str:
        """Which source the batch of a step is drawn from (for the log)."""
        return self._source(step)[1].name

    def _source(self, step: int) -> tuple[np.random.Generator, Source]:
        rng = np.random.default_rng((self.seed, step))
        return rng, _pick(rng, self.sources, self._phase(step).weights)

    def _phase(self, step: int) -> Phase:
        return max((phase for phase in self.phases if phase.first_step <= step), key=lambda phase: phase.first_step)

    # -- examples ---------------------------------------------------------------------

    def _like_length(self, source: Source, width: int, rng: np.random.Generator) -> list[Example]:
        """Whole documents of similar length, so that little is padding; which length is random."""
        pool = rng.integers(len(source), size=4 * max(1, self.tokens // 128))
        order = np.argsort(source.offsets[pool + 1] - source.offsets[pool], kind="stable")
        begin = int(rng.integers(len(order)))
        picked: list[Example] = []
        region = excess = 0
        for at in range(len(order)):
            example = self._example(source, int(pool[order[(begin + at) % len(order)]]), width, rng)
            wider, further = max(region, example.blocks(width) * width), max(excess, self._excess(example))
            if picked and (wider + further) * (len(picked) + 1) > self.tokens:
                break
            if begin + at == len(order) and picked:
                break  # wrapped from the longest to the shortest
            region, excess = wider, further
            picked.append(example)
        return picked

    def _any_length(self, source: Source, width: int, rng: np.random.Generator) -> list[Example]:
        picked: list[Example] = []
        used = 0
        while True:
            example = self._example(source, int(rng.integers(len(source))), width, rng)
            used += example.blocks(width) * width + self._excess(example)
            if picked and used > self.tokens:
                return picked
            picked.append(example)

    def _excess(self, example: Example) -> int:
        """Context that counts towards the tokens of a batch: short prefixes never did, long conversations must."""
        return max(0, example.start - self.max_prefix)

    def _example(self, source: Source, index: int, width: int, rng: np.random.Generator) -> Example:
        """A document up to the end of one of its targets."""
        tokens, spans = source.document(index), source.targets(index)
        if spans is not None:
            start, end = spans[rng.integers(len(spans)) if len(spans) > 1 else 0].tolist()
            tokens = tokens[:end]
        if source.end_token is not None and tokens[-1] != source.end_token:
            tokens = np.append(tokens, source.end_token)
        if spans is None:
            start = 1 + int(rng.integers(max(1, min(self.max_prefix, len(tokens) - 1))) * rng.integers(2))
        answers: np.ndarray | None = None
        if source.answer_only and spans is not None:
            answers = np.zeros(len(tokens), dtype=bool)
            for begin, end in spans:
                answers[begin:end] = True
        return self._cut(tokens, start, answers, width, rng)

    def _cut(
        self, tokens: np.ndarray, start: int, answers: np.ndarray | None, width: int, rng: np.random.Generator
    ) -> Example:
        """Of too long a target a random stretch of blocks, of too long a context its end.

        The canvas that holds the end of the target is filled up with EOS.
        """
        blocks, most = -(-(len(tokens) - start) // width), max(1, self.max_region // width)
        if blocks > most:
            start += int(rng.integers(blocks - most + 1)) * width
            blocks = most
        begin, end = max(0, start - self.max_context), start + blocks * width
        tokens = tokens[begin:end]
        ids = np.full(end - begin, self.eos, dtype=np.int64)
        ids[: len(tokens)] = tokens
        valid = np.ones(len(ids), dtype=bool)
        if answers is not None:
            valid[: start - begin] = False
            answers = np.append(answers[begin:end], np.zeros(len(ids) - len(tokens), dtype=bool))
        return Example(ids, start - begin, valid, answers)

    def _windows(self, source: Source, region: int, rng: np.random.Generator) -> list[Example]:
        """Stretches of prose at random places; each token is as likely as any other."""
        picked = []
        for _ in range(max(1, self.tokens // region)):
            start = 1 + int(rng.integers(self.max_prefix))
            offset = int(rng.integers(len(source.ids)))
            document = source.document(int(np.searchsorted(source.offsets, offset, side="right")) - 1)
            at = int(rng.integers(max(1, len(document) - region - start + 1)))
            ids = document[at : at + start + region]
            picked.append(Example(ids, min(start, max(1, len(ids) - region)), np.ones(len(ids), dtype=bool)))
        return picked

    # -- layouts ----------------------------------------------------------------------

    def _rows(self, examples: Sequence[Example], width: int, region: int, rng: np.random.Generator) -> Batch:
        """Each example in a row of its own. Canvases behind the one that holds an end are not supervised."""
        length = max(example.start for example in examples) + region
        starts = np.array([example.start for example in examples])
        if self.blocks == "one":
            starts += width * rng.integers([example.blocks(width) for example in examples])
            region = width
        layout = Layout(torch.from_numpy(starts), length, region, width)
        return self._batch([[example] for example in examples], layout)

    def _packed(self, examples: Sequence[Example], width: int, rng: np.random.Generator) -> Batch:
        """As few rows of the longest example's length as first fit, longest first, finds."""
        longest = max(len(example.ids) for example in examples)
        rows: list[list[Example]] = []
        for example in sorted(examples, key=lambda example: -len(example.ids)):
            fits = (row for row in rows if sum(len(other.ids) for other in row) + len(example.ids) <= longest)
            row = next(fits, None)
            rows.append([example]) if row is None else row.append(example)
        begins = [self._begins(row, width, rng) for row in rows]
        most, fewest = max(map(len, begins)), min(map(len, begins))
        # A row with fewer blocks than others gets unsupervised ones, in padding that no document owns.
        length = longest + (width if fewest < most else 0)
        starts, segments = np.full((len(rows), most), length - width), np.full((len(rows), length), -1)
        for number, row in enumerate(rows):
            starts[number, : len(begins[number])] = begins[number]
            owners = np.repeat(np.arange(len(row)), [len(example.ids) for example in row])
            segments[number, : len(owners)] = owners
        layout = Layout(torch.from_numpy(starts), length, most * width, width, segments=torch.from_numpy(segments))
        return self._batch(rows, layout)

    def _begins(self, row: Sequence[Example], width: int, rng: np.random.Generator) -> list[int]:
        """Where in a packed row the blocks of its documents begin."""
        begins: list[int] = []
        at = 0
        for example in row:
            blocks = np.arange(example.blocks(width))
            chosen = blocks if self.blocks == "all" else rng.choice(blocks, 1)
            begins += (at + example.start + width * chosen).tolist()
            at += len(example.ids)
        return begins

    def _batch(self, rows: Sequence[Sequence[Example]], layout: Layout) -> Batch:
        shape = len(rows), layout.length
        ids, valid, answers = np.full(shape, self.pad, dtype=np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
        for number, row in enumerate(rows):
            at = 0
            for example in row:
                part = slice(at, at := at + len(example.ids))
                ids[number, part], valid[number, part] = example.ids, example.valid
                answers[number, part] = example.valid if example.answers is None else example.answers
                answers[number, part.start] = False  # its only context would be another document
        apart = any(example.answers is not None for row in rows for example in row) or layout.segments is not None
        return Batch(
            torch.from_numpy(ids), torch.from_numpy(valid), layout, torch.from_numpy(answers) if apart else None
        )


def _pick(rng: np.random.Generator, items: Sequence[T], weights: Sequence[float]) -> T:
    return items[rng.choice(len(items), p=np.asarray(weights) / sum(weights))]
