"""Self-distillation: the teacher is the engine's own sampler, the student learns what it committed, and steps fall."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from engine_kit import config, run, tiny_config, tiny_model
from torch import Tensor

from dgemma.cache import KVCache
from dgemma.config import GenerationConfig, LayerConfig
from dgemma.diffusion.loss import Objective
from dgemma.engine import Engine, Request, token_logprobs
from dgemma.engine.attend import DenoiseAttend, EncodeAttend
from dgemma.errors import ConfigError
from dgemma.events import Committed, Draft, Finished
from dgemma.model import DiffusionGemma
from dgemma.train import distil
from dgemma.train.attend import Layout
from dgemma.train.distil import SelfDistillation, Trajectory, roll_out
from dgemma.train.init import new_model
from dgemma.train.objective import Batch, Losses, denoising_loss
from dgemma.train.optim import MasterOptimizer, OptimConfig

WIDTH, BLOCKS = 8, 3


def rolled(model: DiffusionGemma, sampler: GenerationConfig, seed: int, wanted: Tensor) -> tuple[Tensor, Trajectory]:
    """Two examples of unlike prefix; the ids and the trajectories."""
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(seed))
    layout = Layout(torch.tensor([5, 9]), 40, BLOCKS * WIDTH, WIDTH)
    return ids, roll_out(model, ids, layout, wanted, sampler, seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_trajectory_is_the_engines(seed: int) -> None:
    """The first block, draw for draw: what every step reads, its signal's effect, when it stops, what it commits."""
    model, sampler = tiny_model().double(), config(seed=seed, max_new_tokens=WIDTH)
    ids, path = rolled(model, sampler, seed, torch.ones(2, BLOCKS, dtype=torch.bool))
    prompt = tuple(ids[0, :5].tolist())
    events = run(Engine(model), [Request(prompt=prompt, config=sampler, watch=True)])
    drafts = [event for event in events if isinstance(event, Draft)]
    (committed,) = [event for event in events if isinstance(event, Committed)]
    taken = int(path.taken[0, 0])
    assert taken == committed.steps == len(drafts)
    assert path.final[0, 0].tolist() == list(drafts[-1].tokens)
    assert 1 < taken < sampler.max_denoising_steps or seed  # at least one stops by the rule, after some steps
    for step, draft in enumerate(drafts[:-1]):
        assert path.canvas[step + 1, 0, 0].tolist() == list(draft.canvas_tokens)


def test_a_block_does_not_depend_on_which_others_are_rolled_out() -> None:
    model, every = tiny_model(), torch.ones(2, BLOCKS, dtype=torch.bool)
    some = torch.tensor([[True, False, True], [False, False, False]])
    (_, whole), (_, part) = (rolled(model, config(), 1, wanted) for wanted in (every, some))
    assert torch.equal(part.taken[some], whole.taken[some]) and not part.taken[~some].any()
    assert torch.equal(part.final[some], whole.final[some])
    assert len(set(whole.taken.flatten().tolist())) > 1  # blocks settle at different steps


def ended_batch() -> Batch:
    """Two examples of three blocks; the second text ends inside its second block."""
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(2))
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, 9 + 13 :] = False
    return Batch(ids, valid, Layout(torch.tensor([5, 9]), 40, BLOCKS * WIDTH, WIDTH))


def test_the_student_learns_the_committed_tokens_at_states_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss, block for block, by cached passes: canvas and signal of the chosen step in, final tokens out."""
    model, teacher, batch = (
        tiny_model(seed=1).requires_grad_(True),
        tiny_model(seed=2).requires_grad_(True),
        ended_batch(),
    )
    seen: dict[str, Any] = {}

    def spy(name: str) -> None:
        original = getattr(distil, name)
        monkeypatch.setattr(distil, name, lambda *args: seen.setdefault(name, (args, original(*args)))[1])

    spy("roll_out")
    spy("_states")
    objective = Objective(encoder_weight=0.5)
    # Cold, as in engine_kit: the random teacher settles, but not everywhere in ten steps.
    cold = {"t_min": 0.02, "t_max": 0.2, "entropy_bound": 4.0, "confidence_threshold": 0.8}
    settings = SelfDistillation(steps=10, examples=2, states=2, weight=0.7, **cold)  # type: ignore[arg-type]
    losses = settings(model, batch, torch.Generator().manual_seed(0), teacher=teacher, objective=objective)
    losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    plain = denoising_loss(model, batch, torch.Generator().manual_seed(0), objective)
    torch.testing.assert_close(losses.total, plain.total + 0.7 * losses.distil)
    assert torch.equal(losses.per_position, plain.per_position)

    (ran, ids, layout, wanted, *_), path = seen["roll_out"]
    steps = seen["_states"][1]
    assert ran is teacher and sorted(wanted.sum(dim=1).tolist()) == [2, 3]
    every = []
    for example, draw, block in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(BLOCKS)).tolist():
        if not path.settled[example, block]:
            continue
        step, prefix = int(steps[example, draw, block]), int(layout.start[example]) + block * WIDTH
        with torch.no_grad():
            cache = KVCache(model.config, torch.device("cpu"), torch.float32, slack=64)
            attend = EncodeAttend(model.config, [cache], [prefix])
            model.encode(ids[example, :prefix], torch.arange(prefix), attend)
            cache.advance(prefix)
            where, canvas = torch.arange(prefix, prefix + WIDTH), path.canvas[step, example, block]
            alone = DenoiseAttend([cache], [WIDTH])
            hidden = model.denoise(canvas, where, alone, path.soft[step, example, block])
            every.append(torch.nn.functional.cross_entropy(model.logits(hidden), path.final[example, block]))
    assert 0 < len(every) < 2 * 5  # some did not settle, and count as nothing
    torch.testing.assert_close(losses.distil, torch.stack(every).sum() / (2 * 5), atol=1e-4, rtol=1e-4)


def test_states_cover_the_way_from_its_first_step_on() -> None:
    taken = torch.tensor([[1, 4, 9]]).expand(2000, -1)
    at = distil._states(taken, 3, torch.Generator().manual_seed(0))
    assert at.shape == (2000, 3, 3) and bool((at < taken[:, None]).all()) and not at[:, :, 0].any()
    assert [set(at[:, part, 2].tolist()) for part in range(3)] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]
    share = torch.bincount(at[:, :, 1].flatten(), minlength=4) / at[:, :, 1].numel()
    assert float((share - 0.25).abs().max()) < 0.02  # every step is as likely as any other


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"states": 0}, {"examples": 0}, {"weight": -1.0}, {"steps": 0}, {"t_min": 1.0}):
        with pytest.raises(ConfigError, match="distil.*" + next(iter(wrong)).replace("t_min", "t_max")):
            SelfDistillation(**wrong)  # type: ignore[arg-type]


# -- what it is for: a language of eight words of four letters, three canvases of two words -----------------------

WORDS = torch.randint(3, 32, (8, 4), generator=torch.Generator().manual_seed(5))
SAMPLER = GenerationConfig(
    max_new_tokens=24, max_denoising_steps=24, entropy_bound=0.3, t_min=0.6, t_max=1.0, confidence_threshold=0.05
)


def sentences(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = WORDS[torch.randint(8, (24, 6), generator=generator)].flatten(1)
    ids = torch.cat([torch.full((24, 1), 2), ids], dim=1)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), Layout(torch.ones(24, dtype=torch.int64), 25, 24, WIDTH))


def fitted(model: DiffusionGemma, loss: Any, steps: int, lr: float, first: int) -> Losses:
    optimizer = MasterOptimizer(model.named_parameters(), OptimConfig(lr=lr, adam_lr=lr / 2))
    for step in range(steps):
        losses = loss(model, sentences(first + step), torch.Generator().manual_seed(first + step))
        losses.total.backward()
        optimizer.step(min(1.0, (step + 1) / 10, 2 * (steps - step) / steps))
    return losses


@dataclass(frozen=True)
class Spoken:
    """Of 24 answers: steps a canvas, nats a token under the judge, share of real words, how many different ones."""

    steps: float
    nats: float
    real: float
    different: int


def speak(model: DiffusionGemma, judge: DiffusionGemma) -> Spoken:
    engine = Engine(model)
    events = run(engine, [Request(prompt=(2,), config=SAMPLER.with_(seed=seed)) for seed in range(24)])
    steps = [step for event in events if isinstance(event, Finished) for step in event.steps]
    answers: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Committed):
            answers.setdefault(event.request, []).extend(event.tokens)
    scores = [p for ids in answers.values() for p in token_logprobs(Engine(judge), [2, *ids], 1)]
    words = [tuple(ids[at : at + 4]) for ids in answers.values() for at in range(0, 24, 4)]
    real = [word for word in words if word in set(map(tuple, WORDS.tolist()))]
    return Spoken(sum(steps) / len(steps), -sum(scores) / len(scores), len(real) / len(words), len(set(real)))


def test_distillation_saves_steps_and_costs_no_likelihood() -> None:
    """By the real engine, against as many more steps of ordinary training. Stated tolerance: 0.1 nats a token."""
    layers = (
        LayerConfig(kind="sliding", num_kv_heads=2, head_dim=16),
        LayerConfig(kind="full", num_kv_heads=1, head_dim=32),
    )
    shape = {
        "layers": layers,
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 64,
        "sliding_window": 16,
        "num_experts": 0,
    }
    begun = new_model(tiny_config(**shape), 0)
    fitted(begun, denoising_loss, 200, 0.03, first=0)
    teacher, plain = (copy.deepcopy(begun).requires_grad_(False) for _ in range(2))
    before = speak(teacher, teacher)
    settings = SelfDistillation(steps=16, examples=6, states=3)
    fitted(begun, partial(settings, teacher=teacher), 40, 0.005, first=1000)
    fitted(plain.requires_grad_(True), denoising_loss, 40, 0.005, first=1000)
    ordinary, after = (speak(model.requires_grad_(False), teacher) for model in (plain, begun))
    print(before, ordinary, after)
    assert after.steps < 0.75 * ordinary.steps and after.steps < 0.75 * before.steps
    assert after.nats < before.nats + 0.1 and after.real > before.real - 0.05
    assert after.different >= 6  # not by saying less
