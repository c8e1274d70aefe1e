"""The rule of verified mode: exact on laws that can be added up, and on long simulations; faults are found."""

import pytest
import torch
from chance import SURE
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.control.verify import judge_draws, judge_points
from dgemma.eval.speculation import FAULTS, RULES, Chain, chi_square, simulate

CHAIN = Chain.random()


def law(size: int, seed: int, zeros: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(size, generator=generator, dtype=torch.float64)
    values[torch.randperm(size, generator=generator)[:zeros]] = 0
    return values / values.sum()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 7), seed=st.integers(0, 999), zeros=st.integers(0, 3))
def test_one_token_has_exactly_the_law_p(size: int, seed: int, zeros: int) -> None:
    """Summed over drafts and over whether they stand; the uniform enters through where it changes sides."""
    p, q = law(size, seed, min(zeros, size - 1)), law(size, seed + 1000, min(zeros, size - 1))
    found = torch.zeros(size, dtype=torch.float64)
    both = torch.stack([p, torch.full((size,), 1 / size, dtype=torch.float64)])
    for draft in q.nonzero().flatten().tolist():
        share = min(1.0, float(p[draft] / q[draft]))
        found[draft] += q[draft] * share
        for uniform, stands in ((share - 1e-9, 1), (share + 1e-9, 0)):
            if 0 <= uniform < 1:
                accepted, rest = judge_draws(
                    both, q[None], torch.tensor([draft]), torch.tensor([uniform], dtype=torch.float64)
                )
                assert int(accepted) == stands
                if not stands:
                    found += q[draft] * (1 - share) * rest / rest.sum()
    assert torch.allclose(found, p, atol=1e-12)


def test_what_follows_a_whole_draft_is_of_the_last_law() -> None:
    p, q = torch.stack([law(5, seed) for seed in range(4)]), torch.stack([law(5, seed) for seed in range(3)])
    draft = torch.tensor([0, 3, 1])
    accepted, rest = judge_draws(p, q, draft, torch.full((3,), 0.999, dtype=torch.float64))
    assert int(accepted) == 3  # p = q: every draft stands
    assert torch.equal(rest, p[3])


def test_nothing_behind_the_first_refused_token_stands() -> None:
    p = torch.tensor([[0.5, 0.5, 0], [0, 0.5, 0.5], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    q = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    accepted, rest = judge_draws(p, q, torch.tensor([0, 0, 0]), torch.tensor([0.4, 0.0, 0.0]).double())
    assert int(accepted) == 1  # p of the second is 0: not even a uniform of 0 lets it stand
    assert rest.tolist() == [0, 0.5, 0.5]
    accepted, token = judge_points(torch.tensor([4, 7, 5, 6]), torch.tensor([4, 9, 5]))
    assert (int(accepted), int(token)) == (1, 7)


def test_a_refusal_by_rounding_still_gives_a_token() -> None:
    p = law(4, 3)[None].expand(2, 4)
    accepted, rest = judge_draws(p, p[:1], torch.tensor([2]), torch.tensor([1.0]).double())
    assert int(accepted) == 0 and torch.equal(rest, p[0])


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 4), drafted=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_batch_is_its_rows(batch: int, drafted: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(torch.randn(batch, drafted + 1, 6, generator=generator, dtype=torch.float64), -1)
    q = torch.softmax(torch.randn(batch, drafted, 6, generator=generator, dtype=torch.float64), -1)
    draft = torch.randint(6, (batch, drafted), generator=generator)
    accept = torch.rand(batch, drafted, generator=generator, dtype=torch.float64)
    accepted, rest = judge_draws(p, q, draft, accept)
    for row in range(batch):
        alone = judge_draws(p[row], q[row], draft[row], accept[row])
        assert int(alone[0]) == int(accepted[row]) and torch.equal(alone[1], rest[row])


@pytest.mark.parametrize("name", RULES)
def test_joint_trigrams_have_the_law_of_the_chain(name: str) -> None:
    """1.2 million sequences in blocks; the canvas's tokens depend on each other."""
    counts = torch.zeros(CHAIN.vocab**3, dtype=torch.int64)
    for seed in range(12):
        part, stands = simulate(CHAIN, RULES[name], 100_000, seed)
        counts += part
    assert stands > 0.1, "no draft stands, so nothing was tested"
    value, degrees, chance = chi_square(counts, CHAIN.law())
    assert chance > 1e-3, f"{name}: chi-square {value:.0f} with {degrees} degrees"


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_test_finds_each_planted_fault(name: str) -> None:
    counts, _ = simulate(CHAIN, FAULTS[name], 50_000)
    value, degrees, chance = chi_square(counts, CHAIN.law())
    assert chance < SURE, f"{name} was not found: chi-square {value:.0f} with {degrees} degrees"
