"""Documents to be scored: their tokens, how many bytes each token writes, and how long ones are cut into windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from dgemma.errors import DataError


@dataclass(frozen=True)
class Document:
    """Token ids, UTF-8 bytes written by each, and how many leading tokens are given and not scored."""

    ids: np.ndarray
    bytes: np.ndarray
    given: int = 1


@dataclass(frozen=True)
class Window:
    """A part of document number `document`: `ids[start:]` are scored, what lies before is context.

    `tokens` and `bytes` count the scored part of the document; tokens after it only fill the last canvas.
    """

    document: int
    ids: np.ndarray
    start: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """A mean over documents in nats, with standard errors over documents (a ratio estimator's)."""

    nats: float
    tokens: int
    bytes: int
    documents: int
    bits_per_byte: float
    bits_per_byte_se: float
    nats_per_token: float
    nats_per_token_se: float


def estimate(nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> Estimate:
    """From totals per document `[D]`; documents without scored tokens are left out."""
    used = tokens > 0
    nats, tokens, sizes = nats[used], tokens[used], sizes[used]
    if not len(nats):
        raise DataError("nothing to score: every document is shorter than one block")
    per_byte, byte_se = _ratio(nats / math.log(2), sizes)
    per_token, token_se = _ratio(nats, tokens)
    return Estimate(
        float(nats.sum()), int(tokens.sum()), int(sizes.sum()), len(nats), per_byte, byte_se, per_token, token_se
    )


def _ratio(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float]:
    ratio, count = float(top.sum() / bottom.sum()), len(top)
    left = top - ratio * bottom
    return ratio, math.sqrt(count / max(1, count - 1) * float(left @ left)) / float(bottom.sum())


def byte_lengths(decode: Callable[[list[int]], str], vocab: int) -> np.ndarray:
    """Bytes that each of `vocab` ids writes, `[V]`: exact where a token is whole characters; special tokens write none.

    `decode` gives the text of ids inside a text, special tokens left out (`Tokenizer.decode_after`). A lone part of
    a character counts as one byte.
    """
    return np.array([len(decode([i]).replace("\ufffd", "?").encode()) for i in range(vocab)], dtype=np.int64)


def load_documents(path: Path, lengths: np.ndarray, *, end_token: int | None = None) -> list[Document]:
    """The documents of a token file (see `train.data`): `ids`, `offsets`, and for chats `prompt_len`.

    With `end_token` the end is scored too, as a token of no bytes.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; build it first (recipes/default/build_data.py)")
    with np.load(path) as data:
        ids, offsets = data["ids"].astype(np.int64), data["offsets"]
        given = data["prompt_len"] if "prompt_len" in data else np.ones(len(offsets) - 1, dtype=np.int64)
    tail = [] if end_token is None else [end_token]
    whole = (np.append(ids[a:b], tail).astype(np.int64) for a, b in pairwise(offsets))
    return [Document(one, lengths[one], int(g)) for one, g in zip(whole, given, strict=True)]


def cut(
    documents: Sequence[Document], *, region: int, context: int, block: int = 1, fill: int | None = None
) -> list[Window]:
    """Windows of at most `region` scored tokens after at most `context` tokens of context, covering every document.

    Whole blocks only: the rest of a document that is shorter than `block` is left out, or, with `fill`, completed
    with that token and scored with it. The first window of a document has only its given tokens as context.
    """
    if region % block:
        raise DataError(f"region must be a multiple of the block width {block}, got {region}")
    if context < 1:
        raise DataError(f"context must be at least 1 token, got {context}")
    windows = []
    for number, document in enumerate(documents):
        ids = document.ids
        for at in range(document.given, len(ids), region):
            end = min(at + region, len(ids))
            if fill is None:
                end = at + (end - at) // block * block
            if end == at:
                continue
            begin = max(0, at - context) if at > document.given else 0
            lack = -(end - at) % block
            part = np.append(ids[begin:end], [fill] * lack).astype(np.int64) if lack else ids[begin:end]
            windows.append(Window(number, part, at - begin, end - at, int(document.bytes[at:end].sum())))
    return windows
