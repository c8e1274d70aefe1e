"""What a caller asks for, and where a running request stands. Plain data; the engine moves it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgemma.cache import KVCache
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.diffusion.noise import first_canvas
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.stop import History
from dgemma.errors import RequestError

_WIDEST_REFERENCE_CANVAS = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt of token ids and what to do with it.

    `watch` asks for a `Draft` event per denoising step. `reuse` lets the request start from the cache of an
    earlier one that also said so (the turns of a conversation). Reused keys may differ in their last bits
    from freshly computed ones, so an answer that must not depend on what ran before leaves it off.
    """

    prompt: tuple[int, ...]
    config: GenerationConfig
    watch: bool = False
    reuse: bool = False


@dataclass
class Canvas:
    """One canvas being denoised: `ids [C]` is what the next step reads, `step` its number, counted down N..1.

    `soft [C, H]` is the previous prediction's embedding, None before the first step.
    """

    index: int
    ids: Tensor
    step: int
    history: History
    soft: Tensor | None = None

    @property
    def width(self) -> int:
        return self.ids.shape[0]


@dataclass
class State:
    """A request in the engine. `ids` are prompt and committed tokens; the cache holds the first of them."""

    id: int
    request: Request
    cache: KVCache
    ids: list[int]
    turn: int
    """When this request last got a place in a batch, or came: the lowest goes first."""
    cached_tokens: int = 0
    canvas: Canvas | None = None
    steps: list[int] = field(default_factory=list)
    encode_passes: int = 0
    """Passes that encoded committed tokens; the prompt's do not count."""

    @property
    def config(self) -> GenerationConfig:
        return self.request.config

    @property
    def pending(self) -> int:
        """Tokens that must be encoded before the request can go on."""
        return len(self.ids) - self.cache.length

    @property
    def completion(self) -> int:
        """Committed tokens."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def room(self) -> int:
        """Tokens that the budget still allows."""
        return self.config.max_new_tokens - self.completion

    def start_canvas(self, model: ModelConfig, device: torch.device) -> Canvas:
        """Begin the next canvas from pure noise."""
        config, index, width = self.config, len(self.steps), canvas_width(self.config, model)
        ids = first_canvas(config.seed, config.choice, index, width, model.vocab_size, device)
        self.canvas = Canvas(index, ids, config.max_denoising_steps, History.start(ids[None]))
        return self.canvas


def canvas_width(config: GenerationConfig, model: ModelConfig) -> int:
    """Positions per canvas of a request."""
    return config.canvas_length or model.canvas_length


def max_canvas(model: ModelConfig) -> int:
    """The widest canvas a request may ask for.

    A model with learned canvas positions has no embedding beyond them. Others may go up to the reference's
    256 (or their own width, if larger); how well they do there is for their maker to say.
    """
    return model.canvas_positions or max(model.canvas_length, _WIDEST_REFERENCE_CANVAS)


def validate(request: Request, model: ModelConfig) -> None:
    """A `RequestError` for whatever this model cannot do."""
    prompt, config = request.prompt, request.config
    if not prompt:
        raise RequestError("the prompt is empty; it needs at least 1 token")
    for place, token in enumerate(prompt):
        if not 0 <= token < model.vocab_size:
            raise RequestError(f"prompt token {place} is {token}; the vocabulary has ids 0..{model.vocab_size - 1}")
    budget = config.max_new_tokens
    if config.mode == "diffusion":
        width, widest = canvas_width(config, model), max_canvas(model)
        if width > widest:
            raise RequestError(f"canvas_length must be at most {widest} for this model, got {width}")
        get_sampler(config.sampler)
        if config.top_p < 1.0:
            raise RequestError(f"top_p works in mode 'ar' only; in mode 'diffusion' it must be 1.0, got {config.top_p}")
        budget = -(-budget // width) * width  # canvases are always whole
    if len(prompt) + budget > model.max_positions:
        raise RequestError(
            f"prompt ({len(prompt)} tokens) and answer ({budget} positions) need {len(prompt) + budget} "
            f"positions; the model has {model.max_positions}"
        )
