"""Keys and values as FP8: e4m3 codes `[..., D]` and a float32 scale a vector. Knows no cache and no model."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.kernels.scaled import LARGEST, to_codes


def round_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of `x [..., D]` and scales `[...]`: a vector's largest entry becomes 448, one of zeros has scale 1.

    A vector's codes depend on nothing but itself.
    """
    scale = x.abs().amax(-1).float() / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    return to_codes(x.float() / scale[..., None]), scale


def restore(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """code * scale, multiplied in float32, in `dtype`."""
    return codes.float().mul_(scale[..., None]).to(dtype)
