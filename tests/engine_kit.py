"""A tiny random model and short ways to run an engine on it, for the tests of cache, engine and api."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dgemma.config import EngineConfig, GenerationConfig, LayerConfig, ModelConfig
from dgemma.engine import Engine, Request
from dgemma.events import Committed, Event, Finished
from dgemma.model import DiffusionGemma

VOCAB = 128
WINDOW = 6
CANVAS = 8
NO_REUSE = EngineConfig(prefix_cache_tokens=0)
APART = EngineConfig(prefix_cache_tokens=0, fuse=False)
"""For who watches `denoise` and `encode` of a runner: no pass is both."""


def tiny_config(**changes: Any) -> ModelConfig:
    """Both layer kinds, experts, unlike head shapes; the window is shorter than the canvas."""
    sliding = LayerConfig(kind="sliding", num_kv_heads=2, head_dim=8)
    full = LayerConfig(kind="full", num_kv_heads=1, head_dim=12)
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_heads": 4,
        "layers": (sliding, full, sliding, full), "num_experts": 4, "top_k_experts": 2, "expert_size": 12,
        "sliding_window": WINDOW, "canvas_length": CANVAS, "max_positions": 512,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> DiffusionGemma:
    """Random everywhere, with unlike scalars; small q/k norms keep attention soft, as in a trained model."""
    model = DiffusionGemma(tiny_config(**changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if "q_norm" in name or "k_norm" in name:
            noise = 0.25 * (1 + 0.2 * noise)
        elif tensor.dim() == 1:
            noise = 1 + 0.2 * noise
        else:
            noise = noise * tensor.shape[-1] ** -0.5
        tensor.copy_(noise)
    return model.to(dtype)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def config(**changes: Any) -> GenerationConfig:
    """Ten quick steps that usually stop before the cap on a tiny model."""
    values: dict[str, Any] = {
        "max_new_tokens": 20, "max_denoising_steps": 10, "t_min": 0.02, "t_max": 0.2,
        "entropy_bound": 4.0, "confidence_threshold": 0.8,
    }  # fmt: skip
    return GenerationConfig(**(values | changes))


def request(length: int, seed: int = 0, **changes: Any) -> Request:
    """A request of its own prompt and seed; `watch` and `reuse` go to the request, the rest to its config."""
    own = {name: changes.pop(name) for name in ("watch", "reuse") if name in changes}
    return Request(prompt=prompt(length, seed), config=config(seed=seed, **changes), **own)


def run(engine: Engine, requests: Sequence[Request] = (), joins: Mapping[int, Request] | None = None) -> list[Event]:
    """Tick until done. `joins` adds requests before the tick of that number (0 is the first)."""
    waiting, events = dict(joins or {}), []
    for item in requests:
        engine.add(item)
    tick = 0
    while engine.has_work or waiting:
        if tick in waiting:
            engine.add(waiting.pop(tick))
        events += engine.tick()
        tick += 1
    return events


def of(events: Sequence[Event], number: int) -> list[Event]:
    """One request's events, renumbered to 1: what it would have seen alone."""
    fields = [(type(e), {n: getattr(e, n) for n in e.__slots__}) for e in events if e.request == number]
    return [kind(**(values | {"request": 1})) for kind, values in fields]


def tokens(events: Sequence[Event], number: int = 1) -> list[int]:
    return [t for e in events if isinstance(e, Committed) and e.request == number for t in e.tokens]


def end(events: Sequence[Event], number: int = 1) -> Finished:
    (last,) = [e for e in events if isinstance(e, Finished) and e.request == number]
    return last
