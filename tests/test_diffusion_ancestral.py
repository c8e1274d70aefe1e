"""`ancestral` is exact: with three tokens every transition is enumerated and compared with Bayes' rule.

The chain: q(x_s | x_0) = alpha delta + (1 - alpha)/V with alpha = 1 - s/N, from matrices of single steps.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from chance import SURE, fits
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.diffusion import noise as noise_module
from dgemma.diffusion.noise import draw_uniforms, first_canvas, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats
from dgemma.diffusion.samplers import SAMPLERS
from dgemma.kernels import reference
from dgemma.kernels.reference import categorical

VOCAB = 3
GRID = 30_000


def kept(steps: int, step: int) -> Tensor:
    """q(x_s | x_0) as a matrix [x_0, x_s], float64."""
    alpha = 1 - step / steps
    return alpha * torch.eye(VOCAB, dtype=torch.float64) + (1 - alpha) / VOCAB


def single(steps: int, step: int) -> Tensor:
    """q(x_s | x_{s-1}): the matrix that makes `kept(s)` of `kept(s - 1)`."""
    return torch.linalg.solve(kept(steps, step - 1), kept(steps, step))


def posterior(steps: int, step: int) -> Tensor:
    """q(x_{s-1} | x_s, x_0) by Bayes' rule, [x_0, x_s, x_{s-1}]."""
    joint = kept(steps, step - 1)[:, None, :] * single(steps, step).t()[None]
    return joint / joint.sum(-1, keepdim=True)


def run(steps: int, step: int, canvas: Tensor, draw: Tensor, noise: Noise) -> Tensor:
    """One row of many positions through the sampler."""
    zero = torch.zeros(1, canvas.numel())
    stats = Stats(entropy=zero, argmax=draw[None], top_logprob=zero, draw=draw[None], draw_logprob=zero)
    config = GenerationConfig(max_denoising_steps=steps)
    made = SAMPLERS["ancestral"](stats, Rows.single(canvas[None], config, step, VOCAB), noise)
    assert torch.equal(made.accepted, made.canvas == draw)
    return made.canvas[0]


def enumerated(steps: int, step: int) -> Tensor:
    """The sampler's own posterior: every draw, token read and fresh token, and uniforms on a fine grid."""
    grid = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    law = torch.zeros(VOCAB, VOCAB, VOCAB, dtype=torch.float64)
    for draw, read, fresh in itertools.product(range(VOCAB), repeat=3):
        full = torch.full((GRID,), fresh)
        out = run(steps, step, full * 0 + read, full * 0 + draw, Noise(full[None], grid[None]))
        law[draw, read] += torch.bincount(out, minlength=VOCAB) / (GRID * VOCAB)
    return law


@pytest.fixture(autouse=True)
def small_draw_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two tokens: the draw's law is the same, and 200,000 of them take no time."""
    monkeypatch.setattr(reference, "DRAW_BLOCK", 2)
    monkeypatch.setattr(noise_module, "DRAW_BLOCK", 2)


CASES = [(n, s) for n in (1, 2, 5) for s in range(1, n + 1)]


@pytest.mark.parametrize(("steps", "step"), CASES)
def test_transition_probabilities_equal_bayes(steps: int, step: int) -> None:
    difference = (enumerated(steps, step) - posterior(steps, step)).abs().max()
    assert float(difference) < 3 / GRID, "two thresholds, each within a grid cell"


def test_the_chain_reproduces_every_marginal() -> None:
    """With the true p(x_0 | x_s) the reverse chain passes through the marginals of the forward one."""
    steps, truth = 5, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    marginal = truth @ kept(steps, steps)
    assert torch.allclose(marginal, torch.full((VOCAB,), 1 / 3, dtype=torch.float64)), "t = 1 is the prior"
    for step in range(steps, 0, -1):
        joint = truth[:, None] * kept(steps, step)
        x0_given_xs = joint / joint.sum(0)
        reverse = torch.einsum("ax,axy->xy", x0_given_xs, enumerated(steps, step))
        marginal = marginal @ reverse
        assert torch.allclose(marginal, truth @ kept(steps, step - 1), atol=3e-4)
    assert torch.allclose(marginal, truth, atol=3e-4)


@pytest.mark.parametrize(("steps", "step"), [(1, 1), (2, 2), (4, 1), (4, 2), (4, 4), (48, 25)])
def test_samples_follow_the_marginal_over_x0(steps: int, step: int) -> None:
    """Keyed draws: p(x_{s-1} | x_s) is the posterior summed over x_0, for every token that was read."""
    width = 210_000
    model = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    read = torch.arange(width) % VOCAB
    draw = categorical(model.log().expand(width, -1), draw_uniforms(0, 0, 0, step, width, VOCAB))
    tokens, uniforms = step_noise(0, 0, 0, step, width, VOCAB)
    out = run(steps, step, read, draw, Noise(tokens[None], uniforms[None]))
    law = torch.einsum("a,axy->xy", model, posterior(steps, step))
    for token in range(VOCAB):
        counts = torch.bincount(out[read == token], minlength=VOCAB)
        assert fits(counts, law[token]) > SURE, token
    if 1 < step < steps:
        forgetful = model @ kept(steps, step - 1)  # the draw noised afresh, whatever was read
        assert fits(torch.bincount(out[read == 0], minlength=VOCAB), forgetful) < SURE


def test_whole_trajectories_draw_from_the_model() -> None:
    """A denoiser that knows p(x_0 | x_s) exactly: the end of the chain is distributed as the data."""
    steps, width, truth = 6, 200_000, torch.tensor([0.75, 0.2, 0.05], dtype=torch.float64)
    canvas = first_canvas(1, 0, 0, width, VOCAB)
    for step in range(steps, 0, -1):
        joint = truth[:, None] * kept(steps, step)
        logits = (joint / joint.sum(0)).t().log()[canvas]
        draw = categorical(logits, draw_uniforms(1, 0, 0, step, width, VOCAB))
        tokens, uniforms = step_noise(1, 0, 0, step, width, VOCAB)
        canvas = run(steps, step, canvas, draw, Noise(tokens[None], uniforms[None]))
        assert fits(torch.bincount(canvas, minlength=VOCAB), truth @ kept(steps, step - 1)) > SURE, step
    assert torch.equal(canvas, draw), "the last step is the draw itself"
