"""A whole `generate` equals `transformers`' token for token, in float64, given the same random draws.

The peer draws with torch's global generator. Here its two sources, `torch.randint` and `torch.multinomial`, are
replaced by our keyed noise, so that both sides see the same randomness and nothing of dgemma is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hf import Shape, hf_model, our_model
from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from dgemma.config import GenerationConfig
from dgemma.diffusion.noise import draw_uniforms, first_canvas, step_noise
from dgemma.engine import Engine, Request
from dgemma.events import Committed, Event, Finished
from dgemma.kernels.reference import categorical
from dgemma.model import DiffusionGemma

SHAPES = {
    "two kinds": Shape(vocab=307),
    "window 3": Shape(vocab=256, layers="ssf", window=3, canvas=12, experts=8, top_k=3),
    "one expert": Shape(vocab=200, layers="sf", window=24, experts=1, top_k=1, canvas=10),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "official": {"max_denoising_steps": 12},
    "stops early": {
        "max_denoising_steps": 24, "t_min": 0.02, "t_max": 0.3, "entropy_bound": 3.0,
        "confidence_threshold": 0.7,
    },
    "three equal": {
        "max_denoising_steps": 20, "t_min": 0.05, "t_max": 0.1, "entropy_bound": 8.0,
        "stability_threshold": 2, "confidence_threshold": 0.9,
    },
    "confident only": {
        "max_denoising_steps": 16, "t_max": 0.41, "entropy_bound": 20.0,
        "stability_threshold": 0, "confidence_threshold": 2.5,
    },
    "one step": {"max_denoising_steps": 1},
}  # fmt: skip
STOPS = {
    "official": "cap", "stops early": "stable", "three equal": "stable", "confident only": "stable", "one step": "cap",
}  # fmt: skip
"""Why canvases stop under each setting, at least some of them."""


@dataclass
class Replay:
    """Our draws in the order in which `transformers` asks: the first canvas, then per step a draw and fresh tokens.

    `configs` has one entry per row. Rows that have stopped keep drawing there; keyed draws do not mind.
    """

    configs: list[GenerationConfig]
    width: int
    vocab: int
    canvas: int = -1
    step: int = 0
    drawn: bool = False

    def randint(self, *, low: int, high: int, size: tuple[int, int], device: object) -> Tensor:
        assert (low, high, size) == (0, self.vocab, (len(self.configs), self.width))
        if self.drawn:
            self.drawn = False
            return torch.stack([step_noise(*key, self.width, self.vocab)[0] for key in self._keys()])
        self.canvas, self.step = self.canvas + 1, self.configs[0].max_denoising_steps + 1
        return torch.stack([first_canvas(*key[:3], self.width, self.vocab) for key in self._keys()])

    def multinomial(self, probs: Tensor, num_samples: int) -> Tensor:
        assert num_samples == 1 and not self.drawn
        self.step, self.drawn = self.step - 1, True
        uniforms = torch.cat([draw_uniforms(*key, self.width, self.vocab) for key in self._keys()])
        return categorical(probs.log(), uniforms)[:, None]

    def _keys(self) -> list[tuple[int, int, int, int]]:
        return [(c.seed, c.choice, self.canvas, self.step) for c in self.configs]


def peer_generate(
    model: Any, prompts: list[list[int]], configs: list[GenerationConfig], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[float]]:
    """New tokens per row, and the reference's count of denoising passes per row."""
    config = configs[0]
    width, pad = max(map(len, prompts)), config.pad_token
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    replay = Replay(configs, model.config.canvas_length, model.config.text_config.vocab_size)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch, "randint", replay.randint)
        patch.setattr(torch, "multinomial", replay.multinomial)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            max_denoising_steps=config.max_denoising_steps,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=config.entropy_bound),
            t_min=config.t_min,
            t_max=config.t_max,
            stability_threshold=config.stability_threshold,
            confidence_threshold=config.confidence_threshold,
            eos_token_id=list(config.stop_tokens) or None,
            pad_token_id=pad,
        )
    new = out.sequences[:, width:]
    passes = (new != pad).sum(dim=-1) / out.tokens_per_forward
    return new.tolist(), passes.tolist()


def our_generate(
    model: DiffusionGemma, prompts: list[list[int]], configs: list[GenerationConfig]
) -> tuple[list[list[int]], list[Finished], list[str]]:
    """Tokens and end of every row, and why the canvases stopped; all rows in one batch."""
    engine = Engine(model)
    rows = zip(prompts, configs, strict=True)
    numbers = [engine.add(Request(prompt=tuple(row), config=config)) for row, config in rows]
    events: list[Event] = []
    while engine.has_work:
        events += engine.tick()
    tokens = {number: [] for number in numbers}
    for event in events:
        if isinstance(event, Committed):
            tokens[event.request] += event.tokens
    ends = {event.request: event for event in events if isinstance(event, Finished)}
    stops = [event.stop for event in events if isinstance(event, Committed)]
    return [tokens[n] for n in numbers], [ends[n] for n in numbers], stops


def prompts_of(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (5, 21, 11)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SHAPES)
def test_generate_equals_the_reference(name: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[name]
    peer = hf_model(shape, seed=3).double()
    ours = our_model(peer)
    config = GenerationConfig(max_new_tokens=3 * shape.canvas, **SETTINGS[setting])
    prompts = prompts_of(shape.vocab)
    free = [config.with_(seed=seed) for seed in (11, 12, 13)]
    # A token of the middle row's second canvas, as an end token.
    token = our_generate(ours, prompts, free)[0][1][shape.canvas + 3]
    for configs in (free, [c.with_(stop_tokens=(token,)) for c in free]):
        expected, passes = peer_generate(peer, prompts, configs, monkeypatch)
        tokens, ends, stops = our_generate(ours, prompts, configs)
        for row, kept in enumerate(tokens):
            assert kept == expected[row][: len(kept)]
            assert set(expected[row][len(kept) :]) <= {config.pad_token}
            assert sum(ends[row].steps) == pytest.approx(passes[row], rel=1e-5)
        if configs is free:
            assert all(len(kept) == 3 * shape.canvas for kept in tokens)
            assert STOPS[setting] in stops
        else:
            assert ends[1].reason == "stop" and len(tokens[1]) <= shape.canvas + 4
