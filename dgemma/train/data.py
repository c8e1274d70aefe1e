"""Token documents on disk, and batches of `[clean | noisy blocks]` made from them.

A source file is an `.npz` with `ids` (uint16, all documents joined), `offsets` (int64, one more than documents)
and, for chats, `prompt_len`. Everything is a function of (seed, step), so a resumed run sees the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dgemma.errors import DataError
from dgemma.train.attend import Layout
from dgemma.train.objective import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Documents of one kind. `whole`: a document ends with `end_token` and is trained to its end (stories, chats);
    otherwise windows are cut out of long documents (prose)."""

    name: str
    ids: np.ndarray
    offsets: np.ndarray
    prompt_len: np.ndarray | None
    whole: bool
    end_token: int

    @staticmethod
    def load(path: Path, *, whole: bool, end_token: int) -> Source:
        if not path.is_file():
            raise DataError(f"{path}: no such file; build it first (recipes/default/build_data.py)")
        with np.load(path) as data:
            prompt_len = data.get("prompt_len")
            return Source(path.stem, data["ids"], data["offsets"], prompt_len, whole, end_token)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Phase:
    """Shares of the sources and of the canvas widths from `first_step` on."""

    first_step: int
    weights: Sequence[float]
    width_weights: Sequence[float]


@dataclass(frozen=True)
class Mixture:
    """How batches are drawn: shares per phase, tokens per batch, longest prefix."""

    sources: Sequence[Source]
    widths: Sequence[int]
    phases: Sequence[Phase]
    tokens: int
    max_prefix: int
    eos: int
    pad: int
    seed: int

    def batch(self, step: int) -> Batch:
        """The batch of one micro-step: examples of one source and one width, of similar length."""
        rng, source = self._source(step)
        width = int(_pick(rng, self.widths, self._phase(step).width_weights))
        return self._whole(source, width, rng) if source.whole else self._windows(source, width, rng)

    def source_name(self, step: int) -> str:
        """Which source the batch of a step is drawn from (for the log)."""
        return self._source(step)[1].name

    def _source(self, step: int) -> tuple[np.random.Generator, Source]:
        rng = np.random.default_rng((self.seed, step))
        return rng, _pick(rng, self.sources, self._phase(step).weights)

    def _phase(self, step: int) -> Phase:
        return max((phase for phase in self.phases if phase.first_step <= step), key=lambda phase: phase.first_step)

    def _whole(self, source: Source, width: int, rng: np.random.Generator) -> Batch:
        pool = rng.integers(len(source), size=4 * max(1, self.tokens // 128))
        lengths = source.offsets[pool + 1] - source.offsets[pool]
        # Examples of similar length share a batch, so little is padding; the window into the sorted pool is random.
        order = np.argsort(lengths, kind="stable")
        begin = int(rng.integers(len(order)))
        picked: list[tuple[np.ndarray, int]] = []
        region = 0
        for at in range(len(order)):
            index = int(pool[order[(begin + at) % len(order)]])
            tokens = source.document(index)
            if tokens[-1] != source.end_token:
                tokens = np.append(tokens, source.end_token)
            start = self._start(source, index, len(tokens), rng)
            need = -(-(len(tokens) - start) // width) * width
            if picked and max(region, need) * (len(picked) + 1) > self.tokens:
                break
            if begin + at == len(order) and picked:
                break  # wrapped from the longest to the shortest
            region = max(region, need)
            picked.append((tokens, start))
        return self._pack(picked, region, width, fill=self.eos)

    def _start(self, source: Source, index: int, length: int, rng: np.random.Generator) -> int:
        if source.prompt_len is not None:
            return int(source.prompt_len[index])
        return 1 + int(rng.integers(min(self.max_prefix, length - 1)) * rng.integers(2))

    def _windows(self, source: Source, width: int, rng: np.random.Generator) -> Batch:
        region = max(width, 128)
        picked = []
        for _ in range(max(1, self.tokens // region)):
            start = 1 + int(rng.integers(self.max_prefix))
            offset = int(rng.integers(len(source.ids)))
            index = int(np.searchsorted(source.offsets, offset, side="right")) - 1
            document = source.document(index)
            at = int(rng.integers(max(1, len(document) - region - start + 1)))
            tokens = document[at : at + start + region]
            picked.append((tokens, min(start, max(1, len(tokens) - region))))
        return self._pack(picked, region, width, fill=None)

    def _pack(self, picked: list[tuple[np.ndarray, int]], region: int, width: int, fill: int | None) -> Batch:
        length = max(start for _, start in picked) + region
        ids = np.full((len(picked), length), self.pad, dtype=np.int64)
        valid = np.zeros((len(picked), length), dtype=bool)
        for row, (tokens, start) in enumerate(picked):
            ids[row, : len(tokens)] = tokens
            valid[row, : len(tokens)] = True
            if fill is not None:
                # The canvas that holds the end is filled with EOS and supervised; later canvases are not.
                end = start + -(-(len(tokens) - start) // width) * width
                ids[row, len(tokens) : end] = fill
                valid[row, len(tokens) : end] = True
        layout = Layout(torch.tensor([start for _, start in picked]), length, region, width)
        return Batch(torch.from_numpy(ids), torch.from_numpy(valid), layout)


def _pick(rng: np.random.Generator, items: Sequence[T], weights: Sequence[float]) -> T:
    return items[rng.choice(len(items), p=np.asarray(weights) / sum(weights))]
