"""Step by step the same decisions as transformers: temperature, argmax, acceptance, renoising, signal, stop.

Its own `_denoising_step`, `EntropyBoundSampler` and `StableAndConfidentStoppingCriteria` run beside ours over
random trajectories; rows that stop leave our batch, as in the engine, and are frozen in theirs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hf_sampler import HfSampler
from torch import Tensor

from dgemma import kernels
from dgemma.config import GenerationConfig
from dgemma.diffusion import noise as noise_module
from dgemma.diffusion.noise import draw_uniforms, first_canvas, step_noise
from dgemma.diffusion.protocol import Noise, Rows, Stats
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.schedule import temperature
from dgemma.diffusion.stop import History, StopRule, should_stop
from dgemma.kernels import reference
from dgemma.kernels.reference import softcap

CAP, VOCAB, ROWS = 30.0, 23, 4
TRAJECTORIES = 200


def settings(trial: int, random: torch.Generator) -> GenerationConfig:
    low, span, bound = torch.rand(3, generator=random).tolist()
    return GenerationConfig(
        max_denoising_steps=(4, 10, 16, 32)[trial // 4 % 4],
        entropy_bound=10.0 ** (3 * bound - 2) if trial % 5 else 0.1,
        t_min=0.4 if trial % 3 else low,
        t_max=0.8 if trial % 3 else low + span + 0.01,
        stability_threshold=trial % 4,
        confidence_threshold=(0.005, 0.05, 0.3)[trial % 3],
        seed=trial,
    )


class Denoiser:
    """Hidden states that name a target the more clearly the more of it the canvas holds; some stay vague."""

    def __init__(self, width: int, random: torch.Generator) -> None:
        self.target = torch.randint(VOCAB, (ROWS, width), generator=random)
        self.clarity = torch.tensor([1.0, 0.6, 0.3, 0.02])[torch.randperm(ROWS, generator=random)]
        self.blur = torch.tensor([0.02, 0.3, 0.6, 1.0])[torch.randint(4, (ROWS,), generator=random)]
        self.random = random

    def __call__(self, canvas: Tensor) -> Tensor:
        held = (canvas == self.target).float()
        peak = (2 + 16 * held.mean(-1, keepdim=True) + 3 * held) * self.clarity[:, None]
        wobble = torch.randn(*canvas.shape, VOCAB, generator=self.random) * self.blur[:, None, None]
        return torch.nn.functional.one_hot(self.target, VOCAB) * peak[..., None] + wobble


def our_step(
    hidden: Tensor, canvas: Tensor, rows: list[int], step: int, config: GenerationConfig
) -> tuple[Stats, Noise, Tensor]:
    """The vocabulary op on the given rows (with the identity as embedding) and the noise of the step."""
    count, width = len(rows), canvas.shape[1]
    uniforms = [draw_uniforms(config.seed, 0, row, step, width, VOCAB) for row in rows]
    tau = temperature(step, config.max_denoising_steps, config.t_min, config.t_max)
    out = kernels.vocab(
        hidden[rows].reshape(-1, VOCAB), torch.eye(VOCAB), CAP, tau.expand(count * width), torch.cat(uniforms)
    )
    names = ("entropy", "argmax", "top_logprob", "draw", "draw_logprob")
    stats = Stats(**{name: getattr(out, name).view(count, width) for name in names})
    noise = [step_noise(config.seed, 0, row, step, width, VOCAB) for row in rows]
    fresh, uniform = (torch.stack(parts) for parts in zip(*noise, strict=True))
    return stats, Noise(fresh, uniform), out.soft.view(count, width, VOCAB)


def run(trial: int, events: Counter[str]) -> None:
    """One trajectory of a batch of rows in both implementations, every value compared at every step."""
    random = torch.Generator().manual_seed(trial)
    config = settings(trial, random)
    width = (3, 8, 16)[trial % 3]
    denoiser, sampler = Denoiser(width, random), get_sampler("entropy_bound")
    canvas = torch.stack([first_canvas(config.seed, 0, row, width, VOCAB) for row in range(ROWS)])
    theirs = HfSampler(canvas.clone(), config, VOCAB)
    live, history = list(range(ROWS)), History.start(canvas)
    accepted_before = torch.zeros(ROWS, width, dtype=torch.bool)
    for step in range(config.max_denoising_steps, 0, -1):
        hidden = denoiser(canvas)
        rows = Rows.single(canvas[live], config, step, VOCAB)
        own, noise, soft = our_step(hidden, canvas, live, step, config)
        # Theirs subtracts a logsumexp as large as the logits: it is off by half an ulp of those (1e-5), ours is not.
        # So decide on their entropies, and count how often ours would decide otherwise.
        tau = temperature(step, config.max_denoising_steps, config.t_min, config.t_max)
        entropy = torch.distributions.Categorical(logits=softcap(hidden, CAP) / tau).entropy()[live]
        torch.testing.assert_close(own.entropy, entropy, rtol=1e-5, atol=1e-5)
        stats = replace(own, entropy=entropy)
        made = sampler(stats, rows, noise)
        events["decisions"] += len(live)
        events["decisions on our own entropies that differ"] += int(
            (sampler(own, rows, noise).accepted != made.accepted).any(-1).sum()
        )
        past = History(history.argmax[live], history.run[live])
        done, pushed = should_stop(stats, rows, past, StopRule.of([config] * len(live)))

        draw, fresh = torch.zeros(2, ROWS, width, dtype=torch.int64)
        draw[live], fresh[live] = stats.draw, noise.tokens
        theirs.step(step, softcap(hidden, CAP), draw, fresh)
        assert torch.equal(theirs.argmax[live], stats.argmax)
        assert torch.equal(theirs.accepted[live], made.accepted)
        assert torch.equal(theirs.canvas[live], made.canvas)
        assert torch.equal(theirs.finished[live], done)
        assert theirs.logits is not None
        torch.testing.assert_close(torch.softmax(theirs.logits[live], -1), soft, rtol=1e-5, atol=1e-6)
        assert torch.equal(torch.argmax(theirs.logits[live], -1), stats.argmax), "frozen rows keep theirs"
        if theirs.stop is not None and config.stability_threshold:
            unfrozen = theirs.stop.argmax_canvas_history[-1, live]
            assert torch.equal(unfrozen, pushed.argmax)

        renoised = accepted_before[live] & ~made.accepted & (made.canvas != canvas[live])
        events["accepted positions renoised"] += int(renoised.sum())
        events["rows frozen while others go on"] += int(len(live) < ROWS)
        events[f"stops by confidence, threshold {config.stability_threshold}"] += int(done.sum())
        events["all accepted"] += int(made.accepted.all(-1).sum())
        events["one accepted"] += int((made.accepted.sum(-1) == 1).sum())
        confident = stats.entropy.mean(-1) < config.confidence_threshold
        events["unstable but confident"] += int((confident & ~done).sum())
        canvas[live], history.argmax[live], history.run[live] = made.canvas, pushed.argmax, pushed.run
        accepted_before[live] = made.accepted
        live = [row for row, stop in zip(live, done.tolist(), strict=True) if not stop]
        if not live:
            break
    assert bool(theirs.finished.all()) == (not live)
    events["stops by cap"] += len(live)


def test_trajectories_equal_transformers_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reference, noise_module):  # three draw blocks in a small vocabulary
        monkeypatch.setattr(module, "DRAW_BLOCK", 8)
    events: Counter[str] = Counter()
    for trial in range(TRAJECTORIES):
        run(trial, events)
    expected = [f"stops by confidence, threshold {k}" for k in range(4)] + [
        "accepted positions renoised",
        "rows frozen while others go on",
        "stops by cap",
        "all accepted",
        "one accepted",
        "unstable but confident",
    ]
    for event in expected:
        assert events[event] >= 20, (event, events)
    assert events["decisions"] > 4000
    assert events["decisions on our own entropies that differ"] <= events["decisions"] / 1000, events


@pytest.mark.parametrize("missing", ["stability_threshold", "confidence_threshold"])
def test_a_missing_threshold_makes_no_rule_in_transformers_either(missing: str) -> None:
    config = GenerationConfig().with_(**{missing: None})
    assert HfSampler(torch.zeros(1, 2, dtype=torch.int64), config, VOCAB).stop is None


def test_the_edges_of_the_bound_equal_transformers() -> None:
    """Entropies of exactly ln 2: bounds at its multiples accept one more, as `<=` in float32 says on both sides."""
    logits = torch.full((1, 6, 4), -1e9)
    logits[..., :2] = 0.0
    entropy = torch.full((1, 6), torch.distributions.Categorical(logits=logits).entropy()[0, 0].item())
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    for times in (0.999999, 1.0, 1.000001, 2.0, 3.0, 4.999999, 5.0):
        config = GenerationConfig(entropy_bound=times * float(entropy[0, 0]))
        theirs = HfSampler(tokens, config, 4)
        theirs.sampler.accept_canvas(tokens, tokens, logits, 1)
        stats = Stats(entropy=entropy, argmax=tokens, top_logprob=entropy, draw=tokens, draw_logprob=entropy)
        noise = Noise(tokens, entropy.double())
        ours = get_sampler("entropy_bound")(stats, Rows.single(tokens, config, 1, 4), noise)
        assert int(ours.accepted.sum()) == int(theirs.accepted.sum()), times
