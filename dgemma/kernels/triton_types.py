"""What kernels share: GELU, and rounding to bfloat16 and e4m3 that is the same on a device and in the interpreter.

The interpreter cuts bits off where it should round to bfloat16, and loses a carry on the way to e4m3; and it has no
product of bfloat16, because numpy has none. `WIDE` says that the interpreter runs: kernels take it as a constexpr.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


def interpreted() -> bool:
    """Whether kernels run in the interpreter (TRITON_INTERPRET=1 before the first import of triton)."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def narrow(value, kind: tl.constexpr, WIDE: tl.constexpr):
    """Float32 `value` in the type `kind`, to nearest, ties to even."""
    if WIDE and kind == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        # Under the interpreter a bfloat16 is the upper half of a float32, cut off.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(kind)


@triton.jit
def narrow_e4m3(value, WIDE: tl.constexpr):
    """Float32 `value` within the range of e4m3 as its nearest code, ties to even."""
    if WIDE:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        # Below 2^-6 codes are 2^-9 apart: adding 1.5 * 2^23 of such steps leaves whole ones.
        small = (value + 24576.0) - 24576.0
        value = tl.where(tl.abs(value) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return value.to(tl.float8e4nv)


@triton.jit
def activated(x):
    """GELU, tanh form, by the logistic function: 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z))."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
