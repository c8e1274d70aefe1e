"""Token documents, in memory and on disk: one flat array of ids, where each document lies, what in it is a target.

A token file is an `.npz` with `ids` (unsigned), `offsets` (int64, one more than documents) and, where only parts of a
document are targets, `spans` (int64 `[S, 2]`, begin and end in `ids`) or `prompt_len` (one span, to the end).
Knows no tokenizer and no batches.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from dgemma.errors import DataError

PIECE = 512
"""Tokens of a stretch of prose that is held out, or not, as one."""


@dataclass(frozen=True)
class Source:
    """Documents of one kind.

    `whole`: an example is a document and ends with it (stories, chats); otherwise windows are cut out of long
    documents (prose). `spans [S, 2]`, sorted, are the targets, None where all of a document is one. `end_token` is
    appended to what is trained to its end and lacks it (None: the documents carry their ends).
    `answer_only`: what precedes a span is context and no target of the encoder either. `pack`: see `Mixture`.
    """

    name: str
    ids: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray | None
    whole: bool
    end_token: int | None
    answer_only: bool = False
    pack: bool = False

    def __post_init__(self) -> None:
        if fault := self._fault():
            raise DataError(f"{self.name}: {fault}")

    def _fault(self) -> str | None:
        offsets, spans = self.offsets, self.spans
        if self.ids.ndim != 1 or self.ids.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
            return "there are no documents"
        if offsets[0] != 0 or offsets[-1] != len(self.ids) or (np.diff(offsets) < 1).any():
            return f"offsets must rise from 0 to the number of ids, {len(self.ids)}"
        if spans is None:
            return None
        if spans.ndim != 2 or spans.shape[1] != 2 or (np.diff(spans.flatten()) < 0).any():
            return "spans must be pairs (begin, end) in order"
        inside = np.searchsorted(offsets, spans[:, 0], side="right") - 1
        counts = np.bincount(inside.clip(0), minlength=len(self))
        if (counts < 1).any() or (spans[:, 0] >= spans[:, 1]).any() or (spans[:, 1] > offsets[inside + 1]).any():
            return "every document needs a span, and every span tokens inside one document"
        return "a span needs a token before it" if np.isin(spans[:, 0], offsets).any() else None

    @staticmethod
    def load(path: Path, *, whole: bool, end_token: int | None) -> Source:
        """Read a token file. Raises DataError naming it if it is missing or damaged."""
        if not path.is_file():
            raise DataError(f"{path}: no such file; build it first (recipes/default/build_data.py)")
        try:
            with np.load(path) as data:
                ids, offsets, spans = data["ids"], data["offsets"], data.get("spans")
                prompt_len = data.get("prompt_len")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a token file: {error}") from None
        if spans is None and prompt_len is not None:
            if len(prompt_len) != len(offsets) - 1:
                raise DataError(f"{path}: {len(prompt_len)} prompt lengths for {len(offsets) - 1} documents")
            spans = np.stack([offsets[:-1] + prompt_len, offsets[1:]], axis=1)
        return Source(path.stem, ids, offsets, spans, whole, end_token)

    def save(self, path: Path, **more: np.ndarray) -> None:
        """Write a token file that appears whole or not at all; `more` arrays lie beside."""
        arrays = {"ids": self.ids, "offsets": self.offsets, **more}
        if self.spans is not None:
            arrays["spans"] = self.spans
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        with beside.open("wb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]
        os.replace(beside, path)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def targets(self, index: int) -> np.ndarray | None:
        """The spans `[S, 2]` of a document, counted from its beginning."""
        if self.spans is None:
            return None
        begin, end = np.searchsorted(self.spans[:, 0], self.offsets[index : index + 2])
        return self.spans[begin:end] - self.offsets[index]

    def split(self, share: float) -> tuple[Source, Source | None]:
        """(to train on, held out): about `share` of the documents, chosen by a hash of their tokens.

        So equal documents fall on the same side and the choice survives new rows. Prose (not `whole`) is chosen in
        stretches of 512 tokens, so that one long file can be split. If the hash holds out nothing, the first in its
        order is held out; None when there is only one document, or `share` is 0.
        """
        if not 0 <= share < 1:
            raise DataError(f"the share held out must be at least 0 and less than 1, got {share!r}")
        cuts = self.offsets if self.whole else self._pieces()
        if share == 0 or len(cuts) < 3:
            return self, None
        bounds = list(pairwise(cuts.tolist()))
        keys = np.array([_hash(self.ids[begin:end]) for begin, end in bounds])
        held = keys < share
        if not held.any():
            held = keys == keys.min()
        if held.all():
            held = keys < keys.max()
        if not held.any():  # all documents are equal
            return self, None
        left = [(begin, end) for (begin, end), out in zip(bounds, held, strict=True) if not out]
        if not self.whole:
            left = _joined(left, set(self.offsets.tolist()))
        out = [bound for bound, is_out in zip(bounds, held, strict=True) if is_out]
        return self._take(left), self._take(out)

    def _pieces(self) -> np.ndarray:
        """The borders of stretches: those of the documents, and every `PIECE` tokens inside them."""
        return np.unique(
            np.concatenate([[len(self.ids)], *(np.arange(a, b, PIECE) for a, b in pairwise(self.offsets))])
        )

    def _take(self, bounds: Sequence[tuple[int, int]]) -> Source:
        """The documents at these bounds in `ids`."""
        ids = np.concatenate([self.ids[begin:end] for begin, end in bounds])
        offsets = np.cumsum([0, *(end - begin for begin, end in bounds)], dtype=np.int64)
        spans = self.spans
        if spans is not None:
            begins = np.array([begin for begin, _ in bounds])
            at = np.searchsorted(begins, spans[:, 0], side="right") - 1
            kept = (at >= 0) & (spans[:, 0] < begins[at] + np.diff(offsets)[at])
            spans = spans[kept] + (offsets[:-1] - begins)[at[kept], None]
        return replace(self, ids=ids, offsets=offsets, spans=spans)


def _hash(ids: np.ndarray) -> float:
    """A number in [0, 1) that depends on the tokens only, not on how wide they are stored."""
    return int.from_bytes(blake2b(ids.astype("<u4").tobytes(), digest_size=6).digest()) / 2**48


def _joined(bounds: Sequence[tuple[int, int]], borders: set[int]) -> list[tuple[int, int]]:
    """Stretches that follow each other inside one document become one again."""
    joined: list[tuple[int, int]] = []
    for begin, end in bounds:
        if joined and joined[-1][1] == begin and begin not in borders:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
