"""Products of FP8 (e4m3) codes: weights with a scale an output, rows with a scale each. Knows no model and no file."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number that e4m3 has."""
_TINY = 1e-30
_STEP = 16  # `_scaled_mm` asks for multiples of it in both dimensions of a weight


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [T, in]` as codes and each row's scale `[T]` float32: x = code * scale, the largest code is 448."""
    scale = (x.abs().amax(-1).float() / LARGEST).clamp_min(_TINY)
    return to_codes(x.float() / scale[:, None]), scale


def to_codes(values: Tensor) -> Tensor:
    """Nearest codes of float32 `values`, those beyond the largest cut off to it."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


def product(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor]) -> Tensor:
    """torch's own product of rows and a weight `[out, in]`, both as codes and scales: `[T, out]` in bfloat16."""
    (rows, row_scale), (codes, scale) = x, weight
    # The fast way of adding keeps fewer bits than float32 has; this one does not.
    return torch._scaled_mm(
        rows, codes.t(), row_scale[:, None], scale[None], out_dtype=torch.bfloat16, use_fast_accum=False
    )


def has_products(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether `product` serves a weight of that shape and rows of that type (NVIDIA, compute capability 9 or more)."""
    if device.type != "cuda" or dtype is not torch.bfloat16 or shape[0] % _STEP or shape[1] % _STEP:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
