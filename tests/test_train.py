"""Training from scratch: the head's hand-written gradient, block masks against the cached passes, exact resume."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_kit import CONFIG

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.diffusion.loss import Objective, cross_entropy, masked_mean
from dgemma.engine.attend import DenoiseAttend, EncodeAttend
from dgemma.errors import ConfigError, DataError
from dgemma.kernels import reference
from dgemma.model import DiffusionGemma
from dgemma.train import loop
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.data.documents import Source
from dgemma.train.data.mixture import Mixture, Phase
from dgemma.train.head import head_loss, soft_signal
from dgemma.train.init import new_model
from dgemma.train.loop import LoopConfig, Run, train
from dgemma.train.metrics import read_journal
from dgemma.train.objective import Batch, Losses, Noise, denoising_loss
from dgemma.train.optim import OptimConfig, ScheduleConfig
from dgemma.train.plot import plot_run


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


def mixture() -> Mixture:
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 30, 40)
    ids = np.tile(np.arange(3, 13, dtype=np.uint16), int(lengths.sum()) // 10 + 1)[: lengths.sum()]
    source = Source("count", ids, np.concatenate([[0], np.cumsum(lengths)]), None, True, 1)
    prose = replace(source, name="prose", whole=False)
    phases = (Phase(0, (1, 1), (1, 1)), Phase(3, (1, 0), (1, 0)))
    return Mixture((source, prose), (4, 8), phases, tokens=64, max_prefix=4, eos=1, pad=0, seed=5)


PLAN = LoopConfig(steps=6, save_every=1, precision="fp32", accumulation=2)
OPTIMIZER = OptimConfig(ema=0.9)
SCHEDULE = ScheduleConfig(warmup=2)


def fit(model: DiffusionGemma, folder: Path, plan: LoopConfig = PLAN, batches: Mixture | None = None) -> Run:
    return train(model, batches or mixture(), plan, folder, optimizer=OPTIMIZER, schedule=SCHEDULE)


class Dying(Mixture):
    """Batches until the seventh, in the middle of a step (of two batches)."""

    def batch(self, step: int) -> Batch:
        if step == 7:
            raise KeyError("killed")
        return super().batch(step)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_continues_as_if_it_had_not_been(tmp_path: Path, precision: str) -> None:
    plan = replace(PLAN, precision=precision)
    whole = fit(new_model(CONFIG, 2), tmp_path / "whole", plan)
    with pytest.raises(KeyError, match="killed"):
        fit(new_model(CONFIG, 2), tmp_path / "cut", plan, Dying(**vars(mixture())))
    cut = fit(new_model(CONFIG, 99), tmp_path / "cut", plan)
    assert whole.finished and cut.finished
    for kind, tensors in whole.optimizer.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, cut.optimizer.state()[kind][name]), (kind, name)
    assert not torch.equal(whole.optimizer.average["embed.weight"], whole.optimizer.masters["embed.weight"])
    journals = [[record | {"seconds": 0} for record in read_journal(tmp_path / name)] for name in ("whole", "cut")]
    assert journals[0] == journals[1] and len(journals[0]) == 6


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    plan = replace(PLAN, save_every=2)
    with pytest.raises(KeyError):
        fit(new_model(CONFIG, 2), tmp_path, plan, Dying(**vars(mixture())))
    assert [record["step"] for record in read_journal(tmp_path)] == [0, 1, 2]  # saved after two
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "canv')  # and a kill in the middle of a line
    fit(new_model(CONFIG, 2), tmp_path, plan)
    assert [record["step"] for record in read_journal(tmp_path)] == list(range(6))


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run = partial(train, new_model(CONFIG, 2), mixture(), folder=tmp_path)
    run(config=replace(PLAN, steps=1), identity={"data": "a", "loop.seed": 0})
    with pytest.raises(ConfigError, match=r"data differ from this recipe's"):
        run(config=PLAN, identity={"data": "b", "loop.seed": 0})


def test_accumulated_batches_are_one_larger_step(tmp_path: Path) -> None:
    """Two batches that hold the same examples twice give the gradient of one."""

    class Same(Mixture):
        def batch(self, step: int) -> Batch:
            return super().batch(0)

    def seen(plan: LoopConfig, folder: Path) -> list[float]:
        train(new_model(CONFIG, 2), Same(**vars(mixture())), plan, folder, loss=noiseless)
        return [record["grad_norm"] for record in read_journal(folder)]

    def noiseless(model: DiffusionGemma, batch: Batch, generator: torch.Generator, **more: Any) -> Losses:
        return denoising_loss(model, batch, torch.Generator().manual_seed(3), **more)

    one = seen(replace(PLAN, steps=3, accumulation=1), tmp_path / "one")
    two = seen(replace(PLAN, steps=3, accumulation=2), tmp_path / "two")
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    plain = fit(new_model(CONFIG, 2), tmp_path / "plain")
    again = fit(new_model(CONFIG, 2), tmp_path / "again", replace(PLAN, recompute=True))
    for name, tensor in plain.optimizer.masters.items():
        torch.testing.assert_close(tensor, again.optimizer.masters[name], atol=1e-6, rtol=0)


def test_parts_of_a_batch_add_up_to_it() -> None:
    model = new_model(CONFIG, 3)
    batch = replace(mixture(), tokens=1024).batch(1)
    assert len(batch.ids) >= 3
    losses = [
        [denoising_loss(model, batch, torch.Generator().manual_seed(1), part=(rank, world)) for rank in range(world)]
        for world in (1, 3)
    ]
    for name in ("total", "canvas", "encoder"):
        whole, *parts = (getattr(loss, name) for world in losses for loss in world)
        torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=0)


def test_a_prompt_may_be_corrupted_several_times() -> None:
    """Each draw of a prompt that is encoded once is what a row of its own would be."""
    model = new_model(CONFIG, 4)
    ids = torch.randint(3, 97, (2, 14))
    layout = Layout(torch.tensor([6, 6]), 14, 8, 8, draws=3)
    valid = torch.ones(2, 14, dtype=torch.bool)
    objective = Objective(encoder_weight=0.0)
    together = denoising_loss(model, Batch(ids, valid, layout), torch.Generator().manual_seed(2), objective)
    apart = Batch(
        ids.repeat_interleave(3, 0),
        valid.repeat_interleave(3, 0),
        Layout(torch.full((6,), 6), 14, 8, 8),
    )
    alone = denoising_loss(model, apart, torch.Generator().manual_seed(2), objective)
    torch.testing.assert_close(together.per_position, alone.per_position, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.total, alone.total)


def test_learning_lowers_the_loss(tmp_path: Path) -> None:
    fit(new_model(CONFIG, 3), tmp_path, replace(PLAN, steps=30, accumulation=1, save_every=30))
    rows = read_journal(tmp_path)
    assert rows[-1]["encoder"] < rows[0]["encoder"] / 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = new_model(CONFIG, 3)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(DataError, match="step 0: the loss is nan"):
        fit(model, tmp_path)


def test_curves_and_tensorboard(tmp_path: Path) -> None:
    fit(new_model(CONFIG, 3), tmp_path, replace(PLAN, tensorboard=True))
    path = plot_run(tmp_path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    accumulated = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulated.Reload()
    values = [event.value for event in accumulated.Scalars("canvas")]
    np.testing.assert_allclose(values, [record["canvas"] for record in read_journal(tmp_path)], rtol=1e-5)
    with pytest.raises(DataError, match=r"is .*nothing the folder of a run"):
        plot_run(tmp_path / "nothing")


def test_auto_computes_in_what_the_processor_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the checkpoint is in bfloat16 either way."""
    monkeypatch.setattr(loop, "has_bfloat16", lambda: False)
    kinds = {name: LoopConfig(steps=1, device="cpu", precision=name) for name in ("auto", "bf16", "fp32")}
    assert [kind.dtype for kind in kinds.values()] == [torch.float32, torch.bfloat16, torch.float32]
    assert [kind.stored for kind in kinds.values()] == [torch.bfloat16, torch.bfloat16, torch.float32]
    monkeypatch.setattr(loop, "has_bfloat16", lambda: True)
    assert kinds["auto"].dtype is torch.bfloat16


def test_unfit_loop_settings_are_refused() -> None:
    for wrong, text in (({"steps": 0}, "loop.steps"), ({"steps": 1, "precision": "fp8"}, "'fp8'")):
        with pytest.raises(ConfigError, match=text):
            LoopConfig(**wrong)


def test_the_signal_is_the_last_of_several_passes() -> None:
    """Against the passes written out; how many there were is part of the noise."""
    model = new_model(CONFIG, 4)
    ids, valid = torch.randint(3, 97, (2, 14)), torch.ones(2, 14, dtype=torch.bool)
    batch = Batch(ids, valid, Layout(torch.tensor([6, 6]), 14, 8, 8))
    objective = Objective(encoder_weight=0.0, self_conditioning=1.0, signal_passes=4)
    seen = set()
    for seed in range(6):
        noise = Noise.draw(batch, 97, objective, torch.Generator().manual_seed(seed))
        attend = BlockAttend(CONFIG, batch.layout.without_targets(), torch.float32)
        where, places = batch.layout.canvas_positions(), torch.arange(8).expand(2, -1)
        with torch.no_grad():
            model.encode(ids[:, :6], torch.arange(6).expand(2, -1), attend.encode)
            signal = None
            for _ in range(noise.passes):
                signal = soft_signal(model, model.denoise(noise.noisy, where, attend.denoise, signal, places))
            logits = model.logits(model.denoise(noise.noisy, where, attend.denoise, signal, places))
            plain = cross_entropy(logits, noise.clean, noise.valid).mean()
        ours = denoising_loss(model, batch, torch.Generator().manual_seed(seed), objective)
        torch.testing.assert_close(ours.canvas, plain, atol=1e-5, rtol=1e-5)
        seen.add(noise.passes)
    assert len(seen) > 1
