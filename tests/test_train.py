"""Training from scratch: the head's hand-written gradient, block masks against the cached passes, exact resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.config import LayerConfig, ModelConfig
from dgemma.diffusion.loss import cross_entropy, masked_mean
from dgemma.engine.attend import DenoiseAttend, EncodeAttend
from dgemma.kernels import reference
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.data import Mixture, Phase, Source
from dgemma.train.head import head_loss, soft_signal
from dgemma.train.init import new_model
from dgemma.train.loop import LoopConfig, train
from dgemma.train.objective import Batch
from dgemma.train.optim import wsd

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    layers=(
        LayerConfig(kind="sliding", num_kv_heads=2, head_dim=16),
        LayerConfig(kind="full", num_kv_heads=1, head_dim=32),
    ),
    num_experts=4,
    top_k_experts=2,
    expert_size=16,
    sliding_window=5,
    canvas_length=8,
)


def test_head_loss_is_the_plain_one_with_its_gradient() -> None:
    model = new_model(CONFIG, 0)
    hidden = torch.randn(3, 700, 32, requires_grad=True)  # more rows than one chunk
    targets, valid = torch.randint(97, (3, 700)), torch.rand(3, 700) < 0.7
    grads = []
    for loss in (
        head_loss(model, hidden, targets, valid.float())[0],
        masked_mean(cross_entropy(model.logits(hidden), targets, valid), valid),
    ):
        (2 * loss).backward()
        grads.append((loss.detach(), hidden.grad, model.embed.weight.grad))
        hidden.grad = model.embed.weight.grad = None
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(soft_signal(model, hidden), model.soft_embedding(model.logits(hidden)))


def test_a_training_block_sees_what_the_engine_lets_it_see() -> None:
    """Every block of the parallel pass equals a cached encode of its prefix and a denoise of the block alone."""
    model = new_model(CONFIG, 1).double()
    ids, noisy = torch.randint(97, (2, 20)), torch.randint(97, (2, 16))
    layout = Layout(torch.tensor([2, 4]), 20, 16, 4)
    attend = BlockAttend(CONFIG, layout, torch.float64)
    with torch.no_grad():
        model.encode(ids, torch.arange(20).expand(2, -1), attend.encode)
        together = model.denoise(noisy, layout.canvas_positions(), attend.denoise)
        for row, start in enumerate((2, 4)):
            for block in range(4):
                prefix = start + 4 * block
                cache = KVCache(CONFIG, torch.device("cpu"), torch.float64, slack=32)
                model.encode(ids[row, :prefix], torch.arange(prefix), EncodeAttend(CONFIG, [cache], [prefix]))
                cache.advance(prefix)
                part = slice(4 * block, 4 * block + 4)
                alone = model.denoise(noisy[row, part], torch.arange(prefix, prefix + 4), DenoiseAttend([cache], [4]))
                torch.testing.assert_close(together[row, part], alone, atol=1e-5, rtol=0)


def test_norm_gradient_is_autograds() -> None:
    grads = []
    x, weight, slope = torch.randn(7, 32, requires_grad=True), torch.rand(32, requires_grad=True), torch.randn(7, 32)
    for norm in (kernels.rms_norm, reference.rms_norm):
        norm(x, weight, 1e-6).backward(slope)
        grads.append((x.grad, weight.grad))
        x.grad = weight.grad = None
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def _mixture() -> Mixture:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 30, 40)
    ids = np.tile(np.arange(3, 13, dtype=np.uint16), int(lengths.sum()) // 10 + 1)[: lengths.sum()]
    source = Source("count", ids, np.concatenate([[0], np.cumsum(lengths)]), None, True, 1)
    prose = replace(source, name="prose", whole=False)
    phases = (Phase(0, (1, 1), (1, 1)), Phase(3, (1, 0), (1, 0)))
    return Mixture((source, prose), (4, 8), phases, tokens=64, max_prefix=4, eos=1, pad=0, seed=5)


def test_an_interrupted_run_continues_as_if_it_had_not_been(tmp_path: Path) -> None:
    plan = LoopConfig(steps=6, warmup=2, save_every=1)
    whole, cut = new_model(CONFIG, 2), new_model(CONFIG, 2)
    assert train(whole, _mixture(), plan, tmp_path / "whole")
    steps = iter(range(3))

    class Dies(Mixture):
        def batch(self, step: int) -> Batch:
            if next(steps, None) is None:
                raise KeyError("killed")
            return super().batch(step)

    with pytest.raises(KeyError, match="killed"):
        train(cut, Dies(**vars(_mixture())), plan, tmp_path / "cut")
    fresh = new_model(CONFIG, 99)
    assert train(fresh, _mixture(), plan, tmp_path / "cut")
    for (name, a), b in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 6


def test_learning_lowers_the_loss_and_the_schedule_ends_at_zero(tmp_path: Path) -> None:
    model = new_model(CONFIG, 3)
    train(model, _mixture(), LoopConfig(steps=30, warmup=3), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["encoder"] < rows[0]["encoder"] / 2
    assert wsd(0, 10, 2, 0.4) == 0.5 and wsd(5, 10, 2, 0.4) == 1.0 and 0 < wsd(9, 10, 2, 0.4) <= 0.25
