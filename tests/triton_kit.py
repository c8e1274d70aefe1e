"""What the tests of Triton kernels share: on a device where there is one, else under Triton's interpreter.

Import it before anything of `dgemma.kernels.triton_*`: the interpreter is chosen when triton is first imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton_races
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
if not torch.cuda.is_available():
    triton_races.watch()

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
# Largest difference, as a share of the largest number that should be there.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16]


class Random:
    """Fresh numbers of one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self._dtype).to(DEVICE)

    def gaps(self, *shape: int) -> Tensor:
        """Numbers with NaN around them: each row ends in what must not be read, and begins after it."""
        wide = torch.full((*shape[:-1], shape[-1] + 5), NAN, dtype=self._dtype, device=DEVICE)
        wide[..., 2 : shape[-1] + 2] = self(*shape)
        return wide[..., 2 : shape[-1] + 2]


def wide(x: Tensor | None) -> Tensor | None:
    """float64 on the CPU."""
    return None if x is None else x.detach().cpu().double()


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference from float64 numbers, as a share of the largest of those. NaN counts as infinite."""
    difference = (got.cpu().double() - exact).abs().amax() if exact.numel() else torch.zeros(())
    assert got.shape == exact.shape
    bottom = exact.abs().amax() if exact.numel() else torch.ones(())
    return float("inf") if bool(difference.isnan()) else float(difference / bottom)


def norm_error(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference, as a share of that of what should be there."""
    assert got.shape == exact.shape and bool(got.isfinite().all())
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def same_row(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit on a device. The interpreter multiplies with numpy, where a row's last bits may hang on its place."""
    near = 1e-5 if got.dtype is not torch.bfloat16 else 1e-2
    return torch.equal(got, expected) if DEVICE.type == "cuda" else torch.allclose(got, expected, atol=near, rtol=near)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN (integers: of a large negative number), so what a kernel leaves out is seen."""

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(NAN if tensor.is_floating_point() else -(1 << 20))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            made = getattr(torch, name)
            patch.setattr(torch, name, lambda *args, made=made, **kwargs: fill(made(*args, **kwargs)))
        yield
