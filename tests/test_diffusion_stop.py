"""Stop rules: both conventions at their edges, against a slow memory of whole canvases, and row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusion_rows import random_batch, take
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.diffusion.protocol import Rows, Stats
from dgemma.diffusion.stop import History, StopRule, mean_entropy, push_history, should_stop

SEEDS = st.integers(0, 1 << 30)


def config(convention: str = "hf", stability: int | None = 1, confidence: float | None = 0.005) -> GenerationConfig:
    return GenerationConfig().with_(
        convention=convention, stability_threshold=stability, confidence_threshold=confidence
    )


def stats(argmax: list[int], entropy: float = 0.0) -> Stats:
    tokens = torch.tensor([argmax])
    level = torch.full(tokens.shape, entropy)
    return Stats(entropy=level, argmax=tokens, top_logprob=-level, draw=tokens, draw_logprob=-level)


def stops(
    rule: GenerationConfig,
    predictions: list[list[int]],
    read: list[list[int]] | None = None,
    entropy: float = 0.0,
) -> list[bool]:
    """Whether the rule fires after each of these steps of one canvas; it reads noise unless `read` says what."""
    history = History.start(torch.tensor(predictions[:1]))
    fired = []
    for number, prediction in enumerate(predictions):
        canvas = torch.tensor([read[number]]) if read else torch.full((1, len(prediction)), 77)
        rows = Rows.single(canvas, rule, step=9, vocab=99)
        done, history = should_stop(stats(prediction, entropy), rows, history, StopRule.of([rule]))
        fired.append(bool(done))
    return fired


A, B = [1, 2, 3], [1, 2, 4]


@pytest.mark.parametrize(
    ("stability", "fired"),
    [(0, [1, 1, 1, 1, 1, 1]), (1, [0, 0, 1, 1, 1, 0]), (2, [0, 0, 0, 1, 1, 0]), (3, [0, 0, 0, 0, 1, 0])],
)
def test_k_needs_k_plus_one_equal_predictions(stability: int, fired: list[int]) -> None:
    assert stops(config(stability=stability), [A, B, B, B, B, A]) == [bool(x) for x in fired]


def test_going_back_and_forth_is_not_stable() -> None:
    assert not any(stops(config(), [A, B, A, B, A]))


def test_a_new_canvas_starts_a_new_history() -> None:
    assert stops(config(), [A, A]) == [False, True]
    assert stops(config(), [A]) == [False], "the history of the canvas before is gone"


def test_the_conventions_differ() -> None:
    """hf: argmax against the argmax before. jax: argmax against the canvas that was read."""
    noise = [7, 8, 9]
    assert stops(config("hf"), [A, A], read=[noise, noise]) == [False, True]
    assert stops(config("jax"), [A, A], read=[noise, noise]) == [False, False]
    assert stops(config("hf"), [A, B], read=[A, B]) == [False, False]
    assert stops(config("jax"), [A, B], read=[A, B]) == [True, True]


@pytest.mark.parametrize("stability", [1, 2, 3])
def test_jax_asks_for_one_step_whatever_k(stability: int) -> None:
    assert stops(config("jax", stability=stability), [A], read=[A]) == [True]
    assert stops(config("jax", stability=0), [A], read=[B]) == [True]


def test_less_in_hf_and_at_most_in_jax() -> None:
    for entropy, hf, jax in ((0.124, True, True), (0.125, False, True), (0.126, False, False)):
        assert stops(config("hf", 0, 0.125), [A], entropy=entropy) == [hf]
        assert stops(config("jax", 0, 0.125), [A], entropy=entropy) == [jax]


def test_stable_and_confident_are_both_needed() -> None:
    assert stops(config(), [A, A], entropy=0.006) == [False, False]
    assert stops(config(), [A, B], entropy=0.004) == [False, False]
    assert stops(config(), [A, A], entropy=0.004) == [False, True]


@pytest.mark.parametrize("convention", ["hf", "jax"])
@pytest.mark.parametrize(("stability", "confidence"), [(None, 0.005), (1, None), (None, None)])
def test_a_missing_threshold_never_stops(convention: str, stability: int | None, confidence: float | None) -> None:
    assert not any(stops(config(convention, stability, confidence), [A] * 9, read=[A] * 9))


def test_the_history_of_k_canvases_and_the_run_say_the_same() -> None:
    """Against HF's way of remembering, a stack of the last k predictions that starts as -1."""
    random = torch.Generator().manual_seed(0)
    for trial in range(50):
        k = 1 + trial % 3
        stack = [[-1, -1]] * k
        history = History.start(torch.zeros(1, 2, dtype=torch.int64))
        for _ in range(30):
            prediction = (torch.rand(1, 2, generator=random) < 0.2).long()
            history = push_history(prediction, history, torch.ones(1, 2, dtype=torch.bool))
            assert bool(history.run > k) == all(old == prediction[0].tolist() for old in stack)
            stack = [*stack[1:], prediction[0].tolist()]


# -- rows ----------------------------------------------------------------------------


@given(
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=SEEDS,
    choices=st.lists(
        st.tuples(
            st.sampled_from(["hf", "jax"]),
            st.sampled_from([None, 0, 1, 2]),
            st.sampled_from([None, 0.08, 5.0]),
        ),
        min_size=6,
        max_size=6,
    ),
)
@settings(max_examples=100, deadline=None)
def test_a_ragged_batch_with_mixed_rules_equals_its_singles(
    widths: list[int], seed: int, choices: list[tuple[str, int | None, float | None]]
) -> None:
    batch = [config(*choice) for choice in choices[: len(widths)]]
    together: History | None = None
    apart = [History.start(torch.zeros(1, width, dtype=torch.int64)) for width in widths]
    for step in range(4):
        made, rows, _ = random_batch(widths, seed + step // 2)  # steps 0 and 1 are alike, 2 and 3 again
        if step == 1:
            rows = replace(rows, canvas=made.argmax)
        together = together or History.start(rows.canvas)
        done, together = should_stop(made, rows, together, StopRule.of(batch))
        for row, width in enumerate(widths):
            one, apart[row] = should_stop(
                take(made, row, width), take(rows, row, width), apart[row], StopRule.of([batch[row]])
            )
            assert bool(one) == bool(done[row])
            assert torch.equal(together.argmax[row : row + 1, :width], apart[row].argmax)
            assert int(together.run[row]) == int(apart[row].run)


@given(width=st.integers(1, 300), padding=st.integers(0, 300), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_mean_entropy_has_the_same_bits_whatever_pads_it(width: int, padding: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    entropy = torch.rand(1, width, generator=random) * 10.0 ** torch.randint(-9, 2, (1, width), generator=random)
    single = mean_entropy(entropy, torch.ones(1, width, dtype=torch.bool), torch.tensor([width]))
    exact = math.fsum(entropy[0].tolist()) / width
    assert float(single) == pytest.approx(exact, rel=1e-7)
    wide = torch.full((3, width + padding), float("nan"))
    wide[1, :width] = entropy
    valid = torch.arange(width + padding) < torch.tensor([[1], [width], [0]])
    wide[0, 0] = 3.0
    batch = mean_entropy(wide, valid, torch.tensor([1, width, 1]))
    assert float(batch[1]) == float(single) and float(batch[0]) == 3.0


def test_pinned_positions_can_be_left_out_anywhere() -> None:
    """`valid` need not be a prefix: control keeps pins out of the mean and out of the stability test."""
    valid = torch.tensor([[True, False, True]])
    mean = mean_entropy(torch.tensor([[0.5, 9.0, 0.25]]), valid, torch.tensor([2]))
    assert float(mean) == 0.375
    history = History.start(torch.zeros(1, 3, dtype=torch.int64))
    for tokens in ([1, 5, 2], [1, 6, 2]):
        history = push_history(torch.tensor([tokens]), history, valid)
    assert history.run.tolist() == [2]


def test_the_rule_tensors() -> None:
    rule = StopRule.of([config(), config("jax", 3, 0.5), config(stability=None)])
    assert rule.stability.tolist() == [1, 3, 0] and rule.jax.tolist() == [False, True, False]
    assert rule.confidence.dtype == torch.float32 and rule.confidence[2] == -math.inf
    expected: Tensor = torch.tensor([0.005, 0.5])
    assert torch.equal(rule.confidence[:2], expected)
