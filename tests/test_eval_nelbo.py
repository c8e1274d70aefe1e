"""Laws of the diffusion bound: exact values for predictors whose bound is known, and the numbers a model gets."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgemma.diffusion.noise import corrupt
from dgemma.eval.nelbo import bayes_shift, noise_level, token_nelbo

LAW = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
ENTROPY = float(-(LAW * LAW.log()).sum())
WRONG = LAW.flip(0)
VOCAB = len(LAW)


def bound(predict: Callable[[Tensor, Tensor], Tensor], shift: Callable[[Tensor], Tensor], law: Tensor = LAW) -> float:
    """The exact bound of a single i.i.d. token: every (clean, noisy) pair, weighted, on a fine grid of noise levels."""
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    pair = torch.arange(VOCAB * VOCAB).repeat_interleave(len(u))
    clean, noisy, level = pair // VOCAB, pair % VOCAB, u.repeat(VOCAB * VOCAB)
    t = noise_level(level)
    chance = law[clean] * (t / VOCAB + (1 - t) * (clean == noisy))
    values = token_nelbo(predict(noisy, t), noisy, clean, t, [shift(t)])[:, 0]
    return float((chance * 2 * level * values).sum() / 4000)


def nothing(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def posterior(noisy: Tensor, t: Tensor) -> Tensor:
    """log P(clean | noisy) of the toy law: what a perfect denoiser trained with cross-entropy says."""
    seen = torch.nn.functional.one_hot(noisy, VOCAB)
    return (LAW * (t[:, None] / VOCAB + (1 - t)[:, None] * seen)).log().log_softmax(dim=1)


def constant(law: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda noisy, t: law.log().expand(len(noisy), -1)


def test_uniform_predictor_costs_log_v() -> None:
    uniform = torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)
    assert bound(constant(uniform), nothing) == pytest.approx(math.log(VOCAB), abs=1e-4)


def test_the_law_itself_costs_its_entropy() -> None:
    assert bound(constant(LAW), nothing) == pytest.approx(ENTROPY, abs=1e-4)


def test_the_posterior_costs_the_entropy_after_the_step_of_bayes() -> None:
    assert bound(posterior, lambda t: bayes_shift(t, VOCAB)) == pytest.approx(ENTROPY, abs=1e-4)


def test_the_posterior_taken_as_it_is_costs_more() -> None:
    assert bound(posterior, nothing) > ENTROPY + 0.5


def test_a_wrong_predictor_costs_the_cross_entropy() -> None:
    cross = float(-(LAW * WRONG.log()).sum())
    assert bound(constant(WRONG), nothing) == pytest.approx(cross, abs=1e-4)
    assert cross > ENTROPY + 0.5


@pytest.mark.parametrize("extra", [-3.0, -0.5, 0.5, 3.0])
def test_any_other_shift_is_still_a_bound(extra: float) -> None:
    assert bound(posterior, lambda t: bayes_shift(t, VOCAB) + extra) > ENTROPY + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formula_equals_the_sum_over_all_other_tokens(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab, rows = 50, 40
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 4
    noisy = torch.randint(vocab, (rows,), generator=generator)
    clean = torch.where(torch.arange(rows) % 2 == 0, noisy, torch.randint(vocab, (rows,), generator=generator))
    t = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    shift = torch.randn(rows, generator=generator, dtype=torch.float64)
    got = token_nelbo(logits.to(dtype), noisy, clean, t, [0.0, shift])
    for column, moved in ((0, torch.zeros(rows)), (1, shift)):
        bent = logits.scatter_add(1, noisy[:, None], moved.double()[:, None])
        model = (1 - t)[:, None] * bent.softmax(dim=1) + t[:, None] / vocab
        truth = (1 - t)[:, None] * torch.nn.functional.one_hot(clean, vocab) + t[:, None] / vocab
        ours, theirs = (q / q.gather(1, noisy[:, None]) for q in (model, truth))
        terms = ours - theirs + theirs * (theirs / ours).log()
        want = terms.scatter(1, noisy[:, None], 0.0).sum(dim=1) / (vocab * (1 - t))
        torch.testing.assert_close(got[:, column], want, rtol=1e-9 if dtype == torch.float64 else 2e-4, atol=1e-7)


def test_a_sure_network_loses_nothing_to_rounding() -> None:
    """p(z) = 1 - 1e-12 in float32: what the other tokens share is still known."""
    logits = torch.tensor([[28.0, 0.0, 0.0, 0.0], [28.0, 0.0, 0.0, 0.0]])
    noisy, clean, t = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), torch.full((2,), 0.01)
    got = token_nelbo(logits, noisy, clean, t, [-28.0])
    exact = token_nelbo(torch.zeros(2, 4, dtype=torch.float64), noisy, clean, t, [0.0])
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=0)


def test_monte_carlo_agrees_with_its_own_error() -> None:
    """Drawn noise through `corrupt`, stratified levels: the mean is the entropy, within three standard errors."""
    generator = torch.Generator().manual_seed(1)
    count = 100_000
    clean = torch.multinomial(LAW, count, replacement=True, generator=generator)
    u = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    t = noise_level(u)
    noisy, _ = corrupt(clean, t, VOCAB, generator)
    values = token_nelbo(posterior(noisy, t), noisy, clean, t, [bayes_shift(t, VOCAB)])[:, 0] * 2 * u
    error = float(values.std()) / math.sqrt(count)
    assert error < 0.02
    assert abs(float(values.mean()) - ENTROPY) < 3 * error
