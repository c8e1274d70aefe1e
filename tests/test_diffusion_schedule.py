"""The temperature schedule equals the reference's float32 arithmetic bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    LinearTemperatureScheduleLogitsProcessor as Reference,
)

from dgemma.diffusion.schedule import temperature

RANGES = [(0.4, 0.8), (0.0, 1.0), (0.1, 0.3), (1 / 3, 2 / 3), (0.7, 0.9), (0.05, 5.5), (1e-3, 0.0123)]
STEPS = [1, 2, 3, 7, 16, 32, 48, 64, 96, 100, 256]


def reference(step: int, steps: int, t_min: float, t_max: float) -> torch.Tensor:
    """What HF divides the logits by: 1 / its temperature would round, so feed the arithmetic itself."""
    processor = Reference(t_min=t_min, t_max=t_max, max_denoising_steps=steps)

    class Spy:
        def __truediv__(self, other: torch.Tensor) -> torch.Tensor:
            return other

    # HF hands the step over as an int32 tensor; with a Python int everything would be double.
    return processor(None, Spy(), cur_step=torch.tensor(step, dtype=torch.int32))  # type: ignore[arg-type]


@pytest.mark.parametrize(("t_min", "t_max"), RANGES)
def test_every_step_has_the_reference_bits(t_min: float, t_max: float) -> None:
    for steps in STEPS:
        counted = torch.arange(1, steps + 1)
        ours = temperature(counted, steps, t_min, t_max)
        assert ours.dtype == torch.float32
        theirs = torch.stack([reference(step, steps, t_min, t_max) for step in range(1, steps + 1)])
        assert theirs.dtype == torch.float32
        assert torch.equal(ours, theirs), (steps, t_min, t_max)
        assert torch.equal(temperature(steps, steps, t_min, t_max), theirs[-1])


def test_double_arithmetic_would_differ() -> None:
    """So the test above can fail: float64 is an ulp away at some steps."""
    double = torch.tensor([0.4 + (0.8 - 0.4) * (step / 48) for step in range(1, 49)]).float()
    assert not torch.equal(double, temperature(torch.arange(1, 49), 48, 0.4, 0.8))


def test_rows_bring_their_own_numbers() -> None:
    step, steps = [48, 1, 3, 16], [48, 48, 7, 16]
    low, high = [0.4, 0.4, 1 / 3, 0.05], [0.8, 0.8, 2 / 3, 5.5]
    rows = temperature(torch.tensor(step), torch.tensor(steps), low, high)
    doubles = temperature(step, steps, *(torch.tensor(x, dtype=torch.float64) for x in (low, high)))
    singles = [temperature(*row) for row in zip(step, steps, low, high, strict=True)]
    assert torch.equal(rows, torch.stack(singles)) and torch.equal(rows, doubles)


def test_a_float32_range_is_refused() -> None:
    with pytest.raises(AssertionError, match="bits"):
        temperature(1, 48, torch.tensor([0.4]), 0.8)


def test_steps_count_down_from_n_to_one() -> None:
    """The reference's numbers: 0.8 first, 0.40833 last of 48; t_min itself is never reached."""
    assert float(temperature(48, 48, 0.4, 0.8)) == pytest.approx(0.8)
    assert float(temperature(1, 48, 0.4, 0.8)) == pytest.approx(0.408333, abs=1e-6)


def test_a_lower_cap_compresses_the_schedule() -> None:
    """It starts at t_max all the same, and falls faster; it is no shorter stretch of the long one."""
    long, short = (temperature(torch.arange(n, 0, -1), n, 0.4, 0.8) for n in (48, 16))
    assert float(long[0]) == float(short[0])
    assert float(short[8]) == float(long[24]) < float(long[8])
