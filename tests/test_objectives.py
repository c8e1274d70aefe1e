"""The laws of the training objectives, by enumeration over three tokens and two positions.

A noisy canvas has nine states, so a "model" is a table of logits per state and everything has an exact value: the
posteriors by Bayes, the expected loss as a sum. Cross-entropy is convex in the logits, so a law of the minimiser is a
gradient of zero, and no training is needed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_kit import tiny_model
from torch import Tensor

from dgemma.diffusion.loss import (
    OBJECTIVES,
    Objective,
    by_noise_level,
    canvas_weights,
    cross_entropy,
    observation_bonus,
)
from dgemma.errors import ConfigError
from dgemma.eval.nelbo import bayes_shift
from dgemma.train.attend import Layout
from dgemma.train.head import head_loss
from dgemma.train.objective import Batch, denoising_loss

V, CAP = 3, 30.0
STATES = list(itertools.product(range(V), repeat=2))
# Strongly dependent positions, no symmetry.
JOINT = torch.tensor([[0.30, 0.05, 0.02], [0.03, 0.20, 0.10], [0.08, 0.02, 0.20]])
LEVELS = (0.1, 0.35, 0.6, 0.95)


def model(table: Tensor | None = None) -> Any:
    """What `head_loss` needs of a model, with hidden states that are (uncapped) logits; `denoise` reads a table."""
    embed = torch.nn.Embedding(V, V)
    embed.weight.data = torch.eye(V)
    config = SimpleNamespace(softcap=CAP, vocab_size=V, hidden_size=V, layers=(), sliding_window=1)
    stub = SimpleNamespace(embed=embed, config=config)
    stub.encode = lambda ids, *_: torch.zeros(*ids.shape, V)

    def denoise(noisy: Tensor, *_: Any) -> Tensor:
        assert table is not None
        pairs = noisy.unflatten(1, (-1, 2))
        return table[pairs[..., 0] * V + pairs[..., 1]].flatten(1, 2)

    stub.denoise = denoise
    return stub


def uncapped(logits: Tensor) -> Tensor:
    """Hidden states whose softcapped logits these are."""
    return CAP * torch.atanh(logits / CAP)


def observed(t: float, z: int, x: int) -> float:
    """P(z | x) at noise level t."""
    return (1 - t) * (z == x) + t / V


@dataclass(frozen=True)
class Outcomes:
    """All that can happen at noise level t, with its probability: rows `[M]` or `[M, 2]`."""

    chance: Tensor
    clean: Tensor
    noisy: Tensor
    replaced: Tensor

    @staticmethod
    def at(t: float, joint: Tensor = JOINT) -> Outcomes:
        rows = []
        for x in STATES:
            # None: the position keeps its token; else the token that replaces it, which may be the same.
            for fate in itertools.product((None, *range(V)), repeat=2):
                chance = float(joint[x])
                for new in fate:
                    chance *= 1 - t if new is None else t / V
                noisy = [old if new is None else new for old, new in zip(x, fate, strict=True)]
                rows.append((chance, x, noisy, [new is not None for new in fate]))
        return Outcomes(*(torch.tensor(column) for column in zip(*rows, strict=True)))


def evidence(t: float, joint: Tensor = JOINT) -> Tensor:
    """P(x, z) at noise level t `[x state, z state]`."""
    return torch.tensor(
        [[float(joint[x]) * observed(t, z[0], x[0]) * observed(t, z[1], x[1]) for z in STATES] for x in STATES]
    )


def posterior(weight: Tensor) -> Tensor:
    """P(x_i = v | z) `[z state, 2, V]` from P(x, z), which may be summed over t."""
    out = torch.zeros(len(STATES), 2, V)
    for at, x in enumerate(STATES):
        for i in range(2):
            out[:, i, x[i]] += weight[at]
    return out / out.sum(-1, keepdim=True)


def leave_one_out(t: float) -> Tensor:
    """P(x_i = v | z without z_i) `[z state, 2, V]`."""
    out = torch.zeros(len(STATES), 2, V)
    for at, z in enumerate(STATES):
        for x in STATES:
            for i in range(2):
                out[at, i, x[i]] += float(JOINT[x]) * observed(t, z[1 - i], x[1 - i])
    return out / out.sum(-1, keepdim=True)


def expected_loss(objective: Objective, table: Tensor, levels: tuple[float, ...] = LEVELS) -> Tensor:
    """The objective's loss of a table of hidden states, its expectation over text, noise and equally likely levels."""
    parts = [(t, Outcomes.at(t)) for t in levels]
    clean, noisy, replaced = (torch.cat([getattr(o, n) for _, o in parts]) for n in ("clean", "noisy", "replaced"))
    t = torch.cat([torch.full(o.clean.shape, t) for t, o in parts])
    weights = canvas_weights(objective, torch.ones_like(replaced), replaced)
    weights = weights * torch.cat([o.chance for _, o in parts])[:, None]
    bonus = observation_bonus(objective, t, V)
    hidden = table[noisy[:, 0] * V + noisy[:, 1]]
    return head_loss(model(), hidden, clean, weights, None, None if bonus is None else (noisy, bonus))[0]


def slope(objective: Objective, probs: Tensor, levels: tuple[float, ...] = LEVELS) -> float:
    """The largest gradient of the expected loss at a table that predicts `probs`."""
    table = uncapped(probs.log()).requires_grad_(True)
    expected_loss(objective, table, levels).backward()
    assert table.grad is not None
    return float(table.grad.abs().max())


def test_official_is_minimal_at_the_posterior_of_unknown_noise() -> None:
    official, known = Objective(), [evidence(t) for t in LEVELS]
    assert slope(official, posterior(sum(known, torch.zeros(9, 9)))) < 1e-6
    assert slope(official, posterior(known[1])) > 1e-3  # the posterior of one level is not it
    assert slope(official, posterior(known[1]), LEVELS[1:2]) < 1e-6  # unless it is the only one


@pytest.mark.parametrize("t", LEVELS)
def test_leave_one_out_with_the_observation_is_the_posterior(t: float) -> None:
    objective, alone = Objective(name="leave_one_out"), leave_one_out(t)
    bonus = observation_bonus(objective, torch.tensor(t), V)
    assert bonus is not None
    seen = torch.nn.functional.one_hot(torch.tensor(STATES), V)
    told = torch.softmax(alone.log() + bonus * seen, dim=-1)
    torch.testing.assert_close(told, posterior(evidence(t)), atol=1e-6, rtol=1e-5)
    # And so the loss, which adds the observation, is minimal where the network leaves it aside.
    assert slope(objective, alone, (t,)) < 1e-6
    assert slope(objective, posterior(evidence(t)), (t,)) > 1e-3
    torch.testing.assert_close(bonus, -bayes_shift(torch.tensor(t), V))


@pytest.mark.parametrize("cap", [30.0, 2.0])
def test_the_gradient_with_an_observation_is_autograds(cap: float) -> None:
    network = tiny_model(softcap=cap).requires_grad_(True)
    vocab = network.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(3, 300, 24, generator=generator)).requires_grad_(True)
    targets, noisy = (torch.randint(vocab, (3, 300), generator=generator) for _ in range(2))
    weights, bonus = torch.rand(3, 300, generator=generator), 6 * torch.rand(3, 300, generator=generator)
    found = []
    for ours in (True, False):
        if ours:
            loss, _ = head_loss(network, hidden, targets, weights, None, (noisy, bonus))
        else:
            logits = network.logits(hidden) + bonus[..., None] * torch.nn.functional.one_hot(noisy, vocab)
            loss = (cross_entropy(logits, targets, weights) / weights.sum()).sum()
        (3 * loss).backward()
        found.append((loss.detach(), hidden.grad, network.embed.weight.grad))
        hidden.grad = network.embed.weight.grad = None
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


def test_reweighted_lies_between_replaced_only_and_official() -> None:
    table = uncapped(torch.log_softmax(torch.randn(9, 2, V, generator=torch.Generator().manual_seed(1)), -1))
    value = {
        kept: float(expected_loss(Objective(name="reweighted", kept_weight=kept), table).detach())
        for kept in (0, 0.3, 1)
    }
    assert value[1] == pytest.approx(expected_loss(Objective(), table).item())
    # By hand: cross-entropies of every outcome, averaged over the replaced and over the kept positions.
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    logp = torch.log_softmax(CAP * torch.tanh(table / CAP), -1)
    for t in LEVELS:
        every = Outcomes.at(t)
        for chance, x, z, fate in zip(*vars(every).values(), strict=True):
            for i in range(2):
                sums[bool(fate[i])][0] -= float(chance * logp[z[0] * V + z[1], i, x[i]])
                sums[bool(fate[i])][1] += float(chance)
    (lost, share), (kept_lost, kept_share) = sums[True], sums[False]
    assert value[0] == pytest.approx(lost / share, rel=1e-5)
    assert value[0.3] == pytest.approx((lost + 0.3 * kept_lost) / (share + 0.3 * kept_share), rel=1e-5)
    # Only ratios matter: weights of any scale are the same loss.
    valid, fate = torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True, False])
    weights = canvas_weights(Objective(name="reweighted"), valid, fate)
    hidden, targets = torch.randn(4, V), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(
        head_loss(model(), hidden, targets, weights), head_loss(model(), hidden, targets, 7 * weights)
    )


def sampled_slope(objective: Objective, probs: Tensor, joint: Tensor) -> float:
    """The gradient of the training step itself, over many drawn examples: root of the sum of its squares."""
    generator = torch.Generator().manual_seed(7)
    states = torch.multinomial(joint.flatten(), 120_000, replacement=True, generator=generator)
    pairs = torch.tensor(STATES)[states].view(400, 600)
    ids = torch.cat([torch.zeros(400, 1, dtype=torch.int64), pairs], dim=1)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), Layout(torch.ones(400, dtype=torch.int64), 601, 600, 2))
    table = uncapped(probs.log()).requires_grad_(True)
    losses = denoising_loss(model(table), batch, generator, replace(objective, encoder_weight=0, self_conditioning=0))
    losses.total.backward()
    assert table.grad is not None
    return float(table.grad.square().sum().sqrt())


def test_the_training_step_draws_what_the_law_says() -> None:
    """Noise, level and observation as `denoising_loss` puts them together: uniform levels, one per canvas."""
    levels = (torch.arange(400) + 0.5) / 400
    averaged = posterior(sum((evidence(float(t)) for t in levels), torch.zeros(9, 9)))
    noise = 3 / 120_000**0.5
    assert sampled_slope(Objective(), averaged, JOINT) < noise
    # Of independent positions the rest of the canvas says nothing: one table is the answer at every level.
    apart = JOINT.sum(1, keepdim=True) * JOINT.sum(0, keepdim=True)
    prior = torch.stack([JOINT.sum(1), JOINT.sum(0)]).expand(9, 2, V)
    assert sampled_slope(Objective(name="leave_one_out"), prior, apart) < noise
    assert sampled_slope(Objective(), prior, apart) > 3 * noise
    late = posterior(sum((evidence(float(t) ** 0.5) for t in levels), torch.zeros(9, 9)))
    assert sampled_slope(Objective(), late, JOINT) > 3 * noise


def small_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    ids, valid = torch.randint(3, 128, (3, 21), generator=generator), torch.rand(3, 21, generator=generator) < 0.9
    return Batch(ids, valid, Layout(torch.tensor([1, 3, 5]), 21, 16, 8))


def gradients(objective: Objective) -> tuple[dict[str, Tensor], Any]:
    network = tiny_model().requires_grad_(True)
    losses = denoising_loss(network, small_batch(), torch.Generator().manual_seed(4), objective)
    losses.total.backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, losses


def test_the_encoder_weight_is_linear_and_zero_leaves_the_encoder_out() -> None:
    (none, without), (one, single), (two, double) = (gradients(Objective(encoder_weight=w)) for w in (0.0, 1.0, 2.0))
    for name in two:
        base = none.get(name, torch.zeros_like(two[name]))
        torch.testing.assert_close(two[name] - base, 2 * (one[name] - base), atol=1e-6, rtol=1e-3)
    assert float((one["embed.weight"] - none["embed.weight"]).abs().max()) > 1e-4
    torch.testing.assert_close(without.per_position, single.per_position, atol=1e-6, rtol=1e-5)
    assert float(without.encoder) == 0.0 < float(single.encoder) == float(double.encoder)
    torch.testing.assert_close(double.total, double.canvas + 2 * double.encoder)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_levels_add_up_to_the_mean(name: str) -> None:
    _, losses = gradients(Objective(name=name))
    edges = (0.0, 0.25, 0.5, 0.75, 1.0)
    parts = by_noise_level(losses.per_position, losses.valid, losses.t, edges)
    total = 0.0
    for key, mean in parts.items():
        low, high = map(float, key.split("-"))
        total += mean * int((losses.valid & (losses.t >= low) & (losses.t < high)).sum())
    assert total == pytest.approx(float((losses.per_position * losses.valid).sum()), rel=1e-5)
    if name != "reweighted":  # there the mean that is trained on has weights of its own
        assert total / int(losses.valid.sum()) == pytest.approx(float(losses.canvas), rel=1e-5)


def test_what_no_objective_can_be() -> None:
    for wrong in (
        {"name": "elbo"},
        {"encoder_weight": -1.0},
        {"self_conditioning": 1.5},
        {"kept_weight": float("nan")},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Objective(**wrong)  # type: ignore[arg-type]


def test_the_ablation_chooses_by_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "recipes/ablation"))
    from table import YARDSTICKS, interval, summary, verdict

    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # Student's t, two degrees of freedom

    def seeds(**changes: float) -> list[dict[str, float]]:
        base = dict.fromkeys(YARDSTICKS, 1.0) | changes
        return [{key: value + noise for key, value in base.items()} for noise in (-0.01, 0.0, 0.01)]

    official = seeds()
    near, better, mixed = seeds(judge=0.96), seeds(judge=0.9), seeds(judge=0.9, consistency=0.9)
    for rival, choice in ((near, "official"), (better, "leave_one_out"), (mixed, "official")):
        lines = verdict({"official": official, "leave_one_out": rival})
        assert lines[-1] == f"Default by the rule: {choice}."
    assert "better on samples: judge" in lines[0] and "worse on samples: faultless" in lines[0]
    assert "| tokens a forward | 1.000 ± 0.025 |" in summary({"official": official})
