"""The temperature of a denoising step: the only thing that knows the time (the network is not told it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Number = Tensor | Sequence[float] | float


def temperature(
    step: Tensor | Sequence[int] | int, steps: Tensor | Sequence[int] | int, t_min: Number, t_max: Number
) -> Tensor:
    """`t_min + (t_max - t_min) * step / steps`, float32, in the reference's order of rounding.

    `step` counts down N..1, so the first temperature is t_max and the last is t_min + (t_max - t_min) / N.
    Arguments broadcast (one number for all rows or one per row `[R]`). Tensors of `t_min` and `t_max` must be
    float64, because HF forms the range in double precision and everything after it in float32.
    """
    step = torch.as_tensor(step)
    low, high = (_double(x, step.device) for x in (t_min, t_max))
    fraction = step.float() / torch.as_tensor(steps, device=step.device).float()
    return low.float() + (high - low).float() * fraction


def _double(value: Number, device: torch.device) -> Tensor:
    assert not isinstance(value, Tensor) or value.dtype is torch.float64, "float32 has lost the range's bits"
    return torch.as_tensor(value, dtype=torch.float64, device=device)
