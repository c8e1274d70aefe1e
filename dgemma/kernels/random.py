"""Counter-based randomness: a draw is a pure function of its key, on every device.

A key is (stream, seed, choice, canvas, step, position, block). So an answer does not depend on who shared the
batch, and a preempted canvas resumes exactly. The mixer is the finaliser of SplitMix64 (Steele et al., OOPSLA 2014),
chained over the key's words; integers wrap in int64, which torch does identically everywhere.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a draw is for; keeps independent draws of one position apart."""

    FIRST = 1
    RENOISE = 2
    DRAW = 3
    AR = 4
    CORRUPT = 5
    PATH = 6
    PROPOSE = 7
    VERIFY = 8


_WORD = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """Any whole number as the int64 that a key takes it for."""
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * signed(_MIX_2)
    return x ^ _shift(x, 31)


def _mix_number(x: int) -> int:
    x = (x ^ x >> 30) * _MIX_1 & _WORD
    x = (x ^ x >> 27) * _MIX_2 & _WORD
    return x ^ x >> 31


def hash_key(*words: Tensor | int) -> Tensor:
    """64 mixed bits (int64) of a key; words broadcast against each other."""
    state: Tensor | int = 0
    for word in words:
        if isinstance(state, int) and not isinstance(word, Tensor):
            # Most words of a key are plain numbers: no tensor, and no copy to a device, for them.
            state = _mix_number((state ^ word & _WORD) + _GOLDEN & _WORD)
            continue
        left = signed(state) if isinstance(state, int) else state
        right = word.to(torch.int64) if isinstance(word, Tensor) else signed(word)
        mixed = left ^ right
        assert isinstance(mixed, Tensor)
        state = _mix(mixed + signed(_GOLDEN))
    return torch.tensor(signed(state)) if isinstance(state, int) else state


def uniform(*words: Tensor | int) -> Tensor:
    """Float64 in [0, 1) with 53 random bits."""
    return _shift(hash_key(*words), 11).double() * 2.0**-53


def uniform_tokens(vocab: int, *words: Tensor | int) -> Tensor:
    """A token id in 0..vocab-1."""
    return (uniform(*words) * vocab).to(torch.int64)
