"""The vocabulary op: its draw (`categorical`) and statistics, against laws and float64 computed otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from chance import SURE, fits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vocab_kit import CAP, example, run, uniforms

from dgemma import kernels
from dgemma.kernels import DRAW_BLOCK, reference
from dgemma.kernels.reference import categorical

ALMOST_ONE = 1 - 2.0**-53


def counts(logits: Tensor, number: int, block: int = DRAW_BLOCK, chunk: int = 4096) -> Tensor:
    """How often each token is drawn in `number` draws from one row of logits `[V]`."""
    total, noise = torch.zeros(len(logits)), uniforms(number, len(logits), block=block)
    for part in noise.split(chunk):
        total += torch.bincount(categorical(logits.expand(len(part), -1), part), minlength=len(logits))
    return total


# -- the draw ------------------------------------------------------------------------


@pytest.mark.parametrize("number", [50_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_draws_follow_the_softmax_over_several_real_blocks(number: int) -> None:
    size = 2 * DRAW_BLOCK + 100
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1.5
    logits[[0, DRAW_BLOCK - 1, DRAW_BLOCK, size - 1]] = 5.0  # ends of blocks, and of the vocabulary
    assert fits(counts(logits, number), torch.softmax(logits.double(), 0)) > SURE


@pytest.mark.parametrize("heavy", range(-1, 5))
def test_draws_follow_the_softmax_wherever_the_mass_is(heavy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4, five of them, the last of two tokens; one block far heavier than the rest, or none."""
    monkeypatch.setattr(reference, "DRAW_BLOCK", 4)
    logits = torch.linspace(-1, 1, 18)
    if heavy >= 0:
        logits[heavy * 4 : heavy * 4 + 4] += 4.0
    drawn = counts(logits, 200_000, block=4, chunk=50_000)
    assert fits(drawn, torch.softmax(logits.double(), 0)) > SURE
    wrong = torch.softmax(logits.double(), 0)
    wrong[wrong.argmax()] *= 0.9
    assert fits(drawn, wrong) < SURE, "a tenth less of one token would be seen"


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_token_without_probability_is_never_drawn(data: st.DataObject) -> None:
    block = 4
    size = data.draw(st.integers(1, 4 * block))
    live = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    number = st.floats(0, ALMOST_ONE) | st.sampled_from([0.0, ALMOST_ONE, 0.5, 2.0**-53, 5e-324])
    blocks = -(-size // block)
    noise = data.draw(st.lists(number, min_size=blocks, max_size=blocks))
    weights = data.draw(st.lists(st.floats(-60, 60, width=32), min_size=size, max_size=size))
    logits = torch.tensor([w if alive else -math.inf for w, alive in zip(weights, live, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "DRAW_BLOCK", block)
        drawn = int(categorical(logits[None], torch.tensor([noise], dtype=torch.float64)))
    assert 0 <= drawn < size and live[drawn]


@pytest.mark.parametrize("number", [0.0, ALMOST_ONE, 0.5])
@pytest.mark.parametrize("token", [0, 1, DRAW_BLOCK - 1, DRAW_BLOCK, 2 * DRAW_BLOCK, 2 * DRAW_BLOCK + 4])
def test_a_certain_token_is_drawn_in_every_block(token: int, number: float) -> None:
    size = 2 * DRAW_BLOCK + 5
    logits = torch.full((1, size), -math.inf)
    logits[0, token] = -7.0
    assert int(categorical(logits, torch.full((1, 3), number, dtype=torch.float64))) == token
    hole = torch.zeros(1, size)
    hole[0, token] = -math.inf
    assert int(categorical(hole, torch.full((1, 3), number, dtype=torch.float64))) != token


def test_the_ends_of_the_unit_interval_are_the_ends_of_the_taken_block() -> None:
    logits = torch.zeros(1, 2 * DRAW_BLOCK)

    def drawn(*numbers: float) -> int:
        return int(categorical(logits, torch.tensor([numbers], dtype=torch.float64)))

    assert drawn(0.0, 0.0) == DRAW_BLOCK, "the later block takes over with probability one half"
    assert drawn(0.0, 0.5) == 0
    assert drawn(ALMOST_ONE, 0.5) == DRAW_BLOCK - 1
    assert drawn(ALMOST_ONE, 0.5 - 2.0**-54) == 2 * DRAW_BLOCK - 1


def test_draws_do_not_depend_on_the_chunking_of_rows() -> None:
    size = 2 * DRAW_BLOCK + 100
    logits = torch.randn(64, size, generator=torch.Generator().manual_seed(2)) * 3
    noise = uniforms(64, size)
    whole = categorical(logits, noise)
    for chunk in (1, 7, 32):
        parts = [categorical(a, b) for a, b in zip(logits.split(chunk), noise.split(chunk), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert len(set(whole.tolist())) > 8


def test_a_constant_added_to_the_logits_changes_no_draw() -> None:
    logits = torch.randint(-64, 64, (256, 1500), generator=torch.Generator().manual_seed(3)) / 16
    noise = uniforms(256, 1500)
    assert torch.equal(categorical(logits, noise), categorical(logits + 8, noise))


# -- statistics ----------------------------------------------------------------------


def test_statistics_equal_float64() -> None:
    states, embed, temperature = example()
    stats = run(states, embed, temperature)
    logits = states.double().numpy() @ embed.double().numpy().T
    logits = np.tanh(logits / CAP) * CAP / temperature.double().numpy()[:, None]
    weights = np.exp(logits - logits.max(1, keepdims=True))
    probs = weights / weights.sum(1, keepdims=True)
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(1)
    rows = np.arange(len(probs))
    assert entropy.min() < 0.2 and entropy.max() > 7, "peaked and flat rows"
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(stats.entropy, entropy, **close)
    np.testing.assert_array_equal(stats.argmax, logits.argmax(1))
    np.testing.assert_allclose(stats.top_logprob, np.log(probs.max(1)), **close)
    np.testing.assert_allclose(stats.draw_logprob, np.log(probs[rows, stats.draw]), **close)
    np.testing.assert_allclose(stats.soft, probs @ embed.double().numpy(), **close)
    assert (stats.draw.numpy() != logits.argmax(1)).mean() > 0.3


def test_the_signal_is_of_the_temperature_shaped_distribution() -> None:
    """With the identity as embedding the soft embedding is the distribution itself."""
    states, temperature = (
        torch.randn(8, 40, generator=torch.Generator().manual_seed(6)) * 4,
        torch.full((8,), 0.5),
    )
    stats = run(states, torch.eye(40), temperature)
    shaped = torch.softmax(reference.softcap(states, CAP) / 0.5, dim=-1)
    torch.testing.assert_close(stats.soft, shaped)
    assert float((stats.soft - torch.softmax(states, dim=-1)).abs().max()) > 0.05


def test_a_row_does_not_depend_on_the_others() -> None:
    states, embed, temperature = example(rows=16)
    noise = uniforms(16, len(embed))
    # Logits first: torch's product changes with the row count, and the op's own arithmetic is under test.
    logits = states @ embed.t()
    whole = run(logits, torch.eye(len(embed)), temperature, noise=noise)
    for row in range(16):
        one = slice(row, row + 1)
        single = run(logits[one], torch.eye(len(embed)), temperature[one], noise=noise[one])
        for name in ("entropy", "argmax", "top_logprob", "draw", "draw_logprob"):
            assert torch.equal(getattr(single, name), getattr(whole, name)[one]), name


def test_one_hot_rows_have_no_entropy_and_no_nan() -> None:
    states = torch.zeros(2, 8)
    states[0, 3] = 1e4
    stats = run(states, torch.eye(8), torch.full((2,), 1e-3))
    assert float(stats.entropy[0]) == 0.0 and float(stats.top_logprob[0]) == 0.0
    assert int(stats.draw[0]) == int(stats.argmax[0]) == 3
    assert float(stats.entropy[1]) == pytest.approx(math.log(8))


@pytest.mark.parametrize("mode", ["plain", "greedy", "top_k"])
def test_ties_go_to_the_lowest_id(mode: str) -> None:
    states = torch.zeros(3, 1200)
    states[0, [7, 8, 1100]] = 2.0
    states[1, [1023, 1024]] = 2.0
    greedy = {"draw_temperature": torch.zeros(3)} if mode == "greedy" else {}
    options = {"top_k": torch.full((3,), 2)} if mode == "top_k" else greedy
    stats = run(states, torch.eye(1200), torch.full((3,), 0.5), **options)
    assert stats.argmax.tolist() == [7, 1023, 0]
    if mode == "greedy":
        assert torch.equal(stats.draw, stats.argmax)


def test_the_argmax_is_of_the_logits_even_where_their_logarithms_meet() -> None:
    """Flat rows: two logits that differ in the last bit have one float32 log-probability."""
    states = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0)) * 1e-5
    temperature = torch.full((200,), 0.8)
    stats = run(states, torch.eye(3000), temperature)
    logits = reference.softcap(states, CAP) / 0.8
    assert torch.equal(stats.argmax, logits.argmax(-1))
    logp = torch.log_softmax(logits, dim=-1)
    assert ((logp == logp.amax(-1, keepdim=True)).sum(-1) > 1).any(), "the case occurs"


# -- what a request may do to the draw -----------------------------------------------


def test_draw_temperature_zero_is_the_argmax_and_one_changes_nothing() -> None:
    states, embed, temperature = example()
    plain = run(states, embed, temperature)
    assert torch.equal(run(states, embed, temperature, draw_temperature=torch.ones(96)).draw, plain.draw)
    mixed = torch.arange(96) % 2
    stats = run(states, embed, temperature, draw_temperature=mixed.float())
    assert torch.equal(stats.draw, torch.where(mixed == 1, plain.draw, plain.argmax))


def test_request_parameters_shape_the_draw_only() -> None:
    states, embed, temperature = example()
    plain = run(states, embed, temperature)
    shaped = run(states, embed, temperature, draw_temperature=torch.full((96,), 0.3), top_k=torch.full((96,), 5))
    for name in ("entropy", "argmax", "top_logprob", "soft"):
        assert torch.equal(getattr(plain, name), getattr(shaped, name)), name
    assert not torch.equal(plain.draw, shaped.draw)
    logp = torch.log_softmax(reference.softcap(states @ embed.t(), CAP) / temperature[:, None], dim=-1)
    torch.testing.assert_close(shaped.draw_logprob, logp.gather(1, shaped.draw[:, None]).squeeze(1))


@pytest.mark.parametrize("tiny", [1e-3, 1e-20, 1e-38, 1e-44])
def test_a_tiny_draw_temperature_is_nearly_the_argmax(tiny: float) -> None:
    states, embed, temperature = example()
    stats = run(states, embed, temperature, draw_temperature=torch.full((96,), tiny))
    assert (stats.draw == stats.argmax).float().mean() > 0.95


def test_draw_temperature_divides_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "DRAW_BLOCK", 2)
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0])
    rows, temperature = 200_000, 0.8
    stats = run(
        logits.expand(rows, -1),
        torch.eye(4),
        torch.full((rows,), temperature),
        draw_temperature=torch.full((rows,), 0.5),
        noise=uniforms(rows, 4, block=2),
    )
    law = torch.softmax(reference.softcap(logits, CAP).double() / (temperature * 0.5), 0)
    assert fits(torch.bincount(stats.draw, minlength=4), law) > SURE


def test_top_k_restricts_the_draw_row_by_row() -> None:
    states, embed, temperature = example()
    limits = torch.tensor([0, 1, 2, 5, 40, 5000]).repeat(16)
    logits = reference.softcap(states @ embed.t(), CAP) / temperature[:, None]
    order = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
    ranks = set()
    for seed in range(20):
        noise = uniforms(96, len(embed), seed)
        plain = run(states, embed, temperature, noise=noise)
        stats = run(states, embed, temperature, noise=noise, top_k=limits)
        rank = order.gather(1, stats.draw[:, None]).squeeze(1)
        assert ((rank < limits) | (limits == 0)).all()
        free = (limits == 0) | (limits == 5000)
        assert torch.equal(stats.draw[free], plain.draw[free])
        assert torch.equal(stats.draw[limits == 1], stats.argmax[limits == 1])
        ranks |= set(rank[limits == 5].tolist())
    assert ranks == {0, 1, 2, 3, 4}


def test_top_k_renormalises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "DRAW_BLOCK", 2)
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0])
    rows = 200_000
    noise = uniforms(rows, 5, block=2)
    stats = run(logits.expand(rows, -1), torch.eye(5), torch.ones(rows), top_k=torch.full((rows,), 3), noise=noise)
    law = torch.softmax(reference.softcap(logits, CAP).double(), 0)
    law[3:] = 0
    assert fits(torch.bincount(stats.draw, minlength=5), law) > SURE


def test_the_dispatched_op_agrees_with_the_reference() -> None:
    states, embed, temperature = example()
    ours = kernels.vocab(states, embed, CAP, temperature, uniforms(96, len(embed)))
    theirs = run(states, embed, temperature)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.argmax, theirs.argmax)
