"""Laws of the samplers: what every one promises, and the acceptance rules against slow obvious loops.

The exactness of `ancestral` has its own file, the comparison with transformers another.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from diffusion_rows import random_batch, take
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.diffusion.protocol import Noise, Rows, Stats, Step
from dgemma.diffusion.samplers import SAMPLERS, get_sampler
from dgemma.errors import RequestError

EVERY = pytest.mark.parametrize("name", list(SAMPLERS))
WIDTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
SEEDS = st.integers(0, 1 << 30)


def bounded(entropies: list[float], bound: float) -> list[bool]:
    """The entropy-bound acceptance of one canvas; draws are 1, noise is 2, the canvas was 0."""
    entropy = torch.tensor([entropies])
    step = SAMPLERS["entropy_bound"](*plain(entropy, entropy_bound=bound))
    assert torch.equal(step.canvas, torch.where(step.accepted, 1, 2))
    return step.accepted[0].tolist()


def plain(entropy: Tensor, top_logprob: Tensor | None = None, **config: float) -> tuple[Stats, Rows, Noise]:
    ones = torch.ones_like(entropy, dtype=torch.int64)
    top = torch.zeros_like(entropy) if top_logprob is None else top_logprob
    stats = Stats(entropy=entropy, argmax=ones, top_logprob=top, draw=ones, draw_logprob=top)
    rows = Rows.single(ones * 0, GenerationConfig(**config), step=5, vocab=3)
    return stats, rows, Noise(ones * 2, torch.full_like(entropy, 0.5, dtype=torch.float64))


# -- every sampler -------------------------------------------------------------------


def test_the_registry() -> None:
    assert set(SAMPLERS) == {"entropy_bound", "confidence", "ancestral"}
    for name, sampler in SAMPLERS.items():
        assert sampler.name == name and get_sampler(name) is sampler
        with pytest.raises(FrozenInstanceError):
            sampler.state = 1  # type: ignore[attr-defined]
    assert GenerationConfig().sampler in SAMPLERS
    with pytest.raises(TypeError):
        SAMPLERS["mine"] = SAMPLERS["confidence"]  # type: ignore[index]
    with pytest.raises(RequestError, match=r"'greedy'.*entropy_bound, confidence, ancestral"):
        get_sampler("greedy")


@EVERY
@given(widths=WIDTHS, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_ragged_batch_equals_its_singles(name: str, widths: list[int], seed: int) -> None:
    stats, rows, noise = random_batch(widths, seed)
    step = SAMPLERS[name](stats, rows, noise)
    for row, width in enumerate(widths):
        single = SAMPLERS[name](*(take(value, row, width) for value in (stats, rows, noise)))
        assert torch.equal(step.canvas[row : row + 1, :width], single.canvas)
        assert torch.equal(step.accepted[row : row + 1, :width], single.accepted)


@EVERY
@given(widths=WIDTHS, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_what_every_step_promises(name: str, widths: list[int], seed: int) -> None:
    stats, rows, noise = random_batch(widths, seed)
    step = SAMPLERS[name](stats, rows, noise)
    again = SAMPLERS[name](stats, rows, noise)
    assert torch.equal(step.canvas, again.canvas) and torch.equal(step.accepted, again.accepted)
    assert step.canvas.dtype == torch.int64 and step.accepted.dtype == torch.bool
    assert not step.accepted[~rows.valid].any(), "padding is never accepted"
    assert torch.equal(step.canvas[~rows.valid], rows.canvas[~rows.valid]), "nor touched"
    assert torch.equal(step.canvas[step.accepted], stats.draw[step.accepted]), "accepted positions take the draw"
    rest = rows.valid & ~step.accepted
    sources = [noise.tokens[rest]] + ([rows.canvas[rest]] if name == "ancestral" else [])
    assert torch.stack([step.canvas[rest] == source for source in sources]).any(0).all()


@EVERY
def test_nothing_is_permanent(name: str) -> None:
    """What was accepted has no privilege: a step that reads it is the same as one that reads it as noise."""
    stats, rows, noise = random_batch([8, 8], 3, levels=1000)
    rows = replace(rows, entropy_bound=torch.full((2,), 0.1), accept_confidence=torch.full((2,), 0.5))
    before = SAMPLERS[name](stats, rows, noise)
    rows = replace(rows, canvas=before.canvas, step=torch.ones(2, dtype=torch.int64), steps=torch.full((2,), 4))
    flat = replace(stats, entropy=stats.entropy.flip(1), top_logprob=stats.top_logprob.flip(1))
    after = SAMPLERS[name](flat, rows, noise)
    if name == "ancestral":
        assert after.accepted.all(), "its last step is x_0"
    else:
        assert (before.accepted & ~after.accepted).any()


# -- entropy bound -------------------------------------------------------------------


def slow_accept(entropy: list[float], bound: float) -> list[bool]:
    """The rule in a loop, in the reference's precision (CPU: double sums, float32 results)."""
    accepted, total = [False] * len(entropy), np.float64(0)
    for _, position in sorted((value, position) for position, value in enumerate(entropy)):
        own = np.float32(entropy[position])
        total += np.float64(own)
        accepted[position] = bool(np.float32(total) - own <= np.float32(bound))
    return accepted


@given(widths=WIDTHS, seed=SEEDS, levels=st.sampled_from([2, 6, 1000]))
@settings(max_examples=150, deadline=None)
def test_entropy_bound_equals_a_slow_loop(widths: list[int], seed: int, levels: int) -> None:
    stats, rows, noise = random_batch(widths, seed, levels)
    step = SAMPLERS["entropy_bound"](stats, rows, noise)
    for row, width in enumerate(widths):
        slow = slow_accept(stats.entropy[row, :width].tolist(), float(rows.entropy_bound[row]))
        assert step.accepted[row, :width].tolist() == slow


def test_the_budget_is_a_total_over_the_accepted_set_without_the_largest() -> None:
    quarter = [0.25] * 5
    assert bounded(quarter, 0.5) == [True, True, True, False, False], "0, 0.25 and 0.5 <= 0.5: not <"
    assert bounded(quarter, 0.4999) == [True, True, False, False, False]
    assert bounded([3.0, 0.1, 2.0, 0.05], 0.1) == [False, True, False, True]
    assert bounded([3.0, 0.1, 2.0, 0.05], 0.1501) == [False, True, True, True], "its own entropy does not count"
    assert bounded([0.0625] * 20, 0.125) == [True] * 3 + [False] * 17, "a total, not a bound for each"


def test_the_bound_is_compared_in_float32() -> None:
    """As in the reference: float32(0.1) is above 0.1 but within the bound, and 1.1 - 1.0 is above both."""
    tenth = float(np.float32(0.1))
    assert tenth > 0.1
    assert bounded([tenth, tenth, 2.0], 0.1) == [True, True, False]
    assert bounded([tenth, 1.0], 0.1) == [True, False], "the subtraction cancels, and its rounding counts"


def test_at_least_one_position_is_accepted() -> None:
    assert bounded([5.0, 4.0, 6.0], 1e-9) == [False, True, False]
    assert bounded([7.0], 1e-9) == [True]


def test_ties_go_to_the_earlier_position() -> None:
    assert bounded([2.0, 1.0, 1.0, 1.0], 0.5) == [False, True, False, False]
    assert bounded([0.0] * 4 + [1.0] * 60, 1.0) == [True] * 6 + [False] * 58


@given(seed=SEEDS, low=st.floats(1e-3, 1.0), high=st.floats(1e-3, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_larger_bound_accepts_no_less(seed: int, low: float, high: float) -> None:
    stats, rows, noise = random_batch([12], seed)
    steps: list[Step] = []
    for bound in sorted((low, high)):
        steps.append(SAMPLERS["entropy_bound"](stats, replace(rows, entropy_bound=torch.tensor([bound])), noise))
    assert not (steps[0].accepted & ~steps[1].accepted).any()


def test_padding_is_not_counted() -> None:
    """Zero entropies on the padding would come first in the order and be accepted for nothing."""
    stats, rows, noise = plain(torch.tensor([[0.3, 0.2, 0.0, 0.0]]), entropy_bound=0.2)
    rows = replace(rows, valid=torch.tensor([[True, True, False, False]]), width=torch.tensor([2]))
    step = SAMPLERS["entropy_bound"](stats, rows, noise)
    assert step.accepted.tolist() == [[True, True, False, False]]


# -- confidence ----------------------------------------------------------------------


def test_confidence_accepts_what_reaches_the_threshold() -> None:
    top = torch.tensor([[0.5, 0.875, 0.25, 0.75]])
    for threshold, accepted in ((0.75, [0, 1, 0, 1]), (0.7501, [0, 1, 0, 0]), (0.25, [1, 1, 1, 1])):
        arguments = plain(top * 0, top.double().log().float(), accept_confidence=threshold - 1e-6)
        step = SAMPLERS["confidence"](*arguments)
        assert step.accepted.int().tolist() == [accepted]
        assert torch.equal(step.canvas, torch.where(step.accepted, 1, 2))


def test_confidence_always_accepts_the_most_confident_and_ties_go_to_the_first() -> None:
    top = torch.tensor([[0.5, 0.6, 0.6], [0.2, 0.1, 0.1]]).log()
    step = SAMPLERS["confidence"](*plain(top * 0, top, accept_confidence=0.9))
    assert step.accepted.tolist() == [[False, True, False], [True, False, False]]


def test_confidence_one_needs_certainty() -> None:
    top = torch.tensor([[0.0, -1e-6, -0.0]])
    step = SAMPLERS["confidence"](*plain(top * 0, top, accept_confidence=1.0))
    assert step.accepted.tolist() == [[True, False, True]]
