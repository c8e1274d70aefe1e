"""A vocabulary as a tree of bytes, for the compilation of automata. Knows bytes, no tokenizer and no automaton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Level:
    """The distinct beginnings of one length: `parent` is a beginning's place in the level before, `byte` its last byte.

    `tokens` are the ids of the tokens that end here, and `at` where each of them does.
    """

    parent: Ints
    byte: Ints
    tokens: Ints
    at: Ints


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """`size` ids, of which those with bytes are in `levels`, shortest first. Made once for a tokenizer."""

    size: int
    levels: tuple[Level, ...]

    @staticmethod
    def of(pieces: Sequence[bytes | None], size: int | None = None) -> Vocabulary:
        """From the bytes of each id (None: none). `size` is the model's number of rows, if it has more."""
        known = [(number, piece) for number, piece in enumerate(pieces[:size]) if piece]
        tokens = np.array([number for number, _ in known], dtype=np.int64)
        lengths = np.array([len(piece) for _, piece in known], dtype=np.int64)
        flat = np.frombuffer(b"".join(piece for _, piece in known), dtype=np.uint8).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        node = np.zeros(len(known), dtype=np.int64)
        levels = []
        rest = np.arange(len(known))
        for depth in range(int(lengths.max(initial=0))):
            rest = rest[lengths[rest] > depth]
            keys, place = np.unique(node[rest] * 256 + flat[starts[rest] + depth], return_inverse=True)
            node[rest] = place
            ends = rest[lengths[rest] == depth + 1]
            levels.append(Level(keys // 256, keys % 256, tokens[ends], node[ends]))
        return Vocabulary(len(pieces) if size is None else size, tuple(levels))
