"""The optimizer: Muon as it always was, AdamW as torch's, masters, averages, freezing, and the schedules."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from dgemma.errors import ConfigError
from dgemma.train.optim import MasterOptimizer, OptimConfig, ScheduleConfig, orthogonalise, rate

SHAPES = {"embed.weight": (11, 6), "mlp.weight": (8, 6), "experts": (3, 4, 6), "norm.weight": (6,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def give_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params.values():
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = gradient if param.requires_grad else None


class Before:
    """The very formulas that the shipped models were trained with, at their settings."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        self.params = params
        self.masters = {name: p.detach().float().clone() for name, p in params.items()}
        self.first = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        self.second = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        self.steps = 0

    def step(self, scale: float) -> None:
        self.steps += 1
        grads = {name: p.grad.float() for name, p in self.params.items() if p.grad is not None}
        norm = float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt())
        for name, grad in grads.items():
            grad, master, first = grad * min(1.0, 1.0 / (norm + 1e-6)), self.masters[name], self.first[name]
            if grad.ndim >= 2 and "embed" not in name:
                first.lerp_(grad, 1 - 0.95)
                direction = orthogonalise(grad.lerp(first, 0.95))
                master.mul_(1 - 0.012 * scale * 0.01)
                ratio = max(1.0, grad.shape[-2] / grad.shape[-1]) ** 0.5
                master.add_(direction, alpha=-0.012 * scale * ratio)
            else:
                first.lerp_(grad, 1 - 0.9)
                second = self.second[name].lerp_(grad.square(), 1 - 0.98)
                bias1, bias2 = 1 - 0.9**self.steps, 1 - 0.98**self.steps
                master.addcdiv_(first / bias1, (second / bias2).sqrt() + 1e-8, value=-0.003 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_moves_weights_bit_for_bit_as_before(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, before = MasterOptimizer(ours.items(), OptimConfig()), Before(theirs)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(0.7)
        before.step(0.7)
        for name, master in before.masters.items():
            assert torch.equal(optimizer.masters[name], master), (step, name)
            assert torch.equal(ours[name].detach(), master.to(dtype)), (step, name)
            assert ours[name].grad is None


def test_adamw_is_torchs_with_decay_on_matrices() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = MasterOptimizer(
        ours.items(), OptimConfig(name="adamw", lr=0.01, weight_decay=0.1, clip=math.inf, betas=(0.8, 0.99))
    )
    groups = [
        {"params": [p for name, p in theirs.items() if name in ("mlp.weight", "experts")], "weight_decay": 0.1},
        {"params": [p for name, p in theirs.items() if name not in ("mlp.weight", "experts")], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.005, betas=(0.8, 0.99), eps=1e-8)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step(0.5)
        reference.step()
    for name, param in ours.items():
        torch.testing.assert_close(param, theirs[name], atol=2e-7, rtol=2e-6)


def test_long_gradients_are_shortened_and_their_norm_is_told() -> None:
    params = parameters()
    optimizer = MasterOptimizer(params.items(), OptimConfig(name="adamw", clip=0.5))
    give_gradients(params, 0)
    length = torch.cat([p.grad.flatten() for p in params.values() if p.grad is not None]).norm()
    assert optimizer.step(1.0) == pytest.approx(float(length), rel=1e-6) and length > 0.5
    kept = torch.cat([first.flatten() for first in optimizer.first.values()]).norm() / (1 - 0.9)
    assert float(kept) == pytest.approx(0.5, rel=1e-5)


def test_a_float32_parameter_is_its_own_master_and_what_is_frozen_has_none() -> None:
    params = parameters() | {"low": nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    params["mlp.weight"].requires_grad_(False)
    optimizer = MasterOptimizer(params.items(), OptimConfig(ema=0.9))
    assert optimizer.masters["experts"].data_ptr() == params["experts"].data_ptr()
    assert optimizer.masters["low"].dtype == torch.float32
    assert all("mlp.weight" not in part for part in optimizer.state().values())
    with pytest.raises(ConfigError, match="nothing to train"):
        MasterOptimizer([("x", nn.Parameter(torch.ones(2), requires_grad=False))], OptimConfig())


def test_the_average_forgets_at_its_rate() -> None:
    params = parameters(torch.bfloat16)
    optimizer = MasterOptimizer(params.items(), OptimConfig(ema=0.75))
    expected = {name: m.clone() for name, m in optimizer.masters.items()}
    for step in range(3):
        give_gradients(params, step)
        optimizer.step(1.0)
        expected = {name: 0.75 * old + 0.25 * optimizer.masters[name] for name, old in expected.items()}
    for name, average in optimizer.averaged().items():
        torch.testing.assert_close(average, expected[name])
        assert not torch.equal(average, optimizer.masters[name])
    plain = MasterOptimizer(params.items(), OptimConfig())
    assert plain.averaged() is plain.masters


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_frozen_parameter_rests_and_then_starts_as_a_new_one(name: str) -> None:
    late, fresh = parameters(), parameters()
    optimizer = MasterOptimizer(late.items(), OptimConfig(name=name, clip=math.inf))
    for step in range(3):
        late["norm.weight"].requires_grad_(False)
        give_gradients(late, step)
        optimizer.step(1.0)
        assert torch.equal(late["norm.weight"], fresh["norm.weight"])
        assert not torch.equal(late["embed.weight"], fresh["embed.weight"])
    late["norm.weight"].requires_grad_(True)
    other = MasterOptimizer(fresh.items(), OptimConfig(name=name, clip=math.inf))
    for opt, params in ((optimizer, late), (other, fresh)):
        give_gradients(params, 9)
        opt.step(1.0)
    assert torch.equal(late["norm.weight"], fresh["norm.weight"])
    assert optimizer.step(1.0) == 0.0  # no gradients at all: nothing moves
    assert torch.equal(late["norm.weight"], fresh["norm.weight"])


@pytest.mark.parametrize("config", [OptimConfig(ema=0.5), OptimConfig(name="adamw")])
def test_a_restored_optimizer_continues_bit_for_bit(config: OptimConfig) -> None:
    def steps(params: dict[str, nn.Parameter], optimizer: MasterOptimizer, numbers: range) -> None:
        for step in numbers:
            give_gradients(params, step)
            optimizer.step(1.0)

    whole, half, other = parameters(torch.bfloat16), parameters(torch.bfloat16), parameters(torch.bfloat16)
    straight, first, second = (MasterOptimizer(p.items(), config) for p in (whole, half, other))
    steps(whole, straight, range(5))
    steps(half, first, range(3))
    steps(other, second, range(7, 9))  # astray
    second.load_state(first.state())
    assert all(torch.equal(other[name], half[name]) for name in SHAPES)
    steps(other, second, range(3, 5))
    for kind, part in straight.state().items():
        for name, value in part.items():
            assert torch.equal(value, second.state()[kind][name]), (kind, name)


def test_states_of_other_forms() -> None:
    params = parameters()
    optimizer = MasterOptimizer(params.items(), OptimConfig(ema=0.5))
    old: dict[str, Any] = {**optimizer.state(), "steps": 7}
    optimizer.load_state(old)
    assert {int(steps) for steps in optimizer.steps.values()} == {7}
    with pytest.raises(ConfigError, match="'average'"):
        optimizer.load_state({kind: part for kind, part in old.items() if kind != "average"})
    with pytest.raises(ConfigError, match="'masters'"):
        optimizer.load_state({**old, "masters": {"x": torch.zeros(2)}})


def test_float32_weights_survive_in_the_masters_of_a_bfloat16_model() -> None:
    exact, low = parameters(), parameters(torch.bfloat16)
    optimizer = MasterOptimizer(low.items(), OptimConfig(ema=0.5))
    optimizer.start_from(exact)
    for name, weight in exact.items():
        assert torch.equal(optimizer.masters[name], weight) and torch.equal(optimizer.average[name], weight)
        assert torch.equal(low[name], weight.bfloat16())
    with pytest.raises(ConfigError, match=r"mlp\.weight"):
        optimizer.start_from({name: weight for name, weight in exact.items() if name != "mlp.weight"})


def test_orthogonalise_makes_singular_values_alike_and_experts_one_by_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 24, 16)
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.6 and values.max() < 1.3
    for one, expert in zip(stack, orthogonalise(stack), strict=True):
        torch.testing.assert_close(orthogonalise(one), expert, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["wsd", "cosine"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_schedules_rise_to_one_and_fall_to_the_floor(name: str, floor: float) -> None:
    config = ScheduleConfig(name=name, warmup=10, decay_share=0.4, floor=floor)
    rates = [rate(config, step, 100) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert rates[10] == 1.0 and all(a >= b for a, b in pairwise(rates[10:]))
    assert floor <= rates[-1] < floor + 0.03
    middle = rate(config, 55, 100)
    assert middle == (1.0 if name == "wsd" else pytest.approx((1 + floor) / 2))
    if name == "wsd":
        assert rate(config, 80, 100) == pytest.approx(floor + (1 - floor) / 2)


BAD = {
    "name must be one of muon, adamw; got 'sgd'": lambda: OptimConfig(name="sgd"),
    "lr must be above 0, got 0": lambda: OptimConfig(lr=0),
    "adam_lr must be above 0, got -1": lambda: OptimConfig(adam_lr=-1),
    "lr must be above 0, got nan": lambda: OptimConfig(lr=math.nan),
    "clip must be above 0": lambda: OptimConfig(clip=0.0),
    "weight_decay must be a number from 0": lambda: OptimConfig(weight_decay=-0.1),
    r"ema must be at least 0 and below 1, got 1": lambda: OptimConfig(ema=1.0),
    r"betas\[1\] must be": lambda: OptimConfig(betas=(0.9, 1.0)),
    "name must be one of wsd, cosine; got 'linear'": lambda: ScheduleConfig(name="linear"),
    "warmup must be": lambda: ScheduleConfig(warmup=-1),
    "floor must be from 0 to 1, got 2": lambda: ScheduleConfig(floor=2),
}


@pytest.mark.parametrize("text", BAD)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BAD[text]()
