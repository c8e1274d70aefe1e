"""What a caller asks for, and where a running request stands. Plain data; the engine moves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgemma.cache import KVCache
from dgemma.config import GenerationConfig, ModelConfig, is_whole
from dgemma.control import NOISE, NOTHING, Control, Mask
from dgemma.diffusion.noise import first_canvas
from dgemma.diffusion.samplers import get_sampler
from dgemma.diffusion.stop import History
from dgemma.engine.confidence import Changes
from dgemma.engine.drafting import Drafting, widths
from dgemma.engine.runner import Shape
from dgemma.engine.scoring import MOST, Scoring
from dgemma.engine.shaping import bias_row
from dgemma.errors import RequestError

_WIDEST_REFERENCE_CANVAS = 256
_UNTRAINED = (16, 32, 64, 128, 256, 512, 1024)  # what narrow canvases round up to where the checkpoint names no widths


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt of token ids and what to do with it.

    `watch` asks for a `Draft` event per denoising step. `reuse` lets the request start from what others that
    began with the same tokens have encoded, and leave its own for others; that changes no bit of the answer.
    `logprobs` asks for `Scored` events: of every committed token, and so many (0 to 20) of the most likely ones there.
    In mode diffusion that encodes the last canvas, too.
    """

    prompt: tuple[int, ...]
    config: GenerationConfig
    watch: bool = False
    reuse: bool = True
    logprobs: int | None = None
    control: Control = NOTHING

    @property
    def starts_from_last(self) -> bool:
        """Whether the hidden state of the prompt's last token is needed, and not only its keys and values."""
        return self.config.mode != "diffusion" or self.logprobs is not None


@dataclass
class Canvas:
    """One canvas being denoised: `ids [C]` is what the next step reads, `step` its number, counted down N..1.

    `soft [C, H]` is the previous prediction's embedding, None before the first step. `bias [V]` is what the request
    adds to the logits of all its steps, None if nothing. `pins` are tokens by position; before position `reach`
    no end token may stand. `places` and `masks` are more tokens that a position may not have. `ended` tells that a hook
    ends it with the step just taken. `changes` is what the prediction did so far.
    """

    index: int
    ids: Tensor
    step: int
    history: History
    soft: Tensor | None = None
    bias: Tensor | None = None
    pins: dict[int, int] = field(default_factory=dict)
    reach: int = 0
    lead: int = 0
    """Positions at its beginning that hold tokens committed before, pinned; only in mode verified."""
    places: dict[int, set[int]] = field(default_factory=dict)
    masks: dict[int, Mask] = field(default_factory=dict)
    ended: bool = False
    automaton: int = 0
    """The constraint's state before position 0."""
    states: tuple[int, ...] = ()
    """The constraint's states along the last prediction, one more than positions."""
    shapes: list[Shape] | None = None
    """What `shapes.shapes` made of its demands; None until asked for, and where they have changed."""
    changes: Changes = field(init=False)

    def __post_init__(self) -> None:
        self.changes = Changes.start(self.ids)

    @property
    def width(self) -> int:
        return self.ids.shape[0]

    def banned(self, place: int, stop_tokens: Sequence[int]) -> tuple[int, ...]:
        """Tokens that a free position may not have and others may."""
        own = self.places.get(place, set())
        return tuple(sorted(own | set(stop_tokens))) if place < self.reach else tuple(sorted(own))

    def bans(self, tokens: Tensor, stop_tokens: Sequence[int]) -> Tensor:
        """Which of `tokens [C]` may not stand where they do, pinned ones aside."""
        early = torch.arange(self.width, device=tokens.device) < self.reach
        banned = early & torch.isin(tokens, torch.tensor(stop_tokens, dtype=tokens.dtype, device=tokens.device))
        if self.bias is not None:
            banned |= self.bias[tokens] == -torch.inf
        for place, own in self.places.items():
            banned[place] |= tokens[place].item() in own
        for place, mask in self.masks.items():
            banned[place] |= mask.tokens[tokens[place]]
        banned[list(self.pins)] = False
        return banned


@dataclass
class State:
    """A request in the engine. `ids` are prompt and committed tokens; the cache holds the first of them."""

    id: int
    request: Request
    cache: KVCache
    ids: list[int]
    turn: int
    """When this request last got a place in a batch, or came: the lowest goes first."""
    kv_bytes: int = 0
    """What is set aside for its cache."""
    cached_tokens: int = 0
    whole: int = 0
    """Leading tokens of the cache that were encoded in whole blocks (see `scheduler.parts`)."""
    canvas: Canvas | None = None
    steps: list[int] = field(default_factory=list)
    encode_passes: int = 0
    """Passes that encoded committed tokens; the prompt's do not count."""
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was committed."""
    scoring: Scoring | None = None
    """Only in mode diffusion, for who asked for log-probabilities."""
    ending: str = ""
    """Why the answer is complete, once it is."""
    commits: int = 0
    """`Committed` events so far."""
    drafting: Drafting | None = None
    """Only in mode verified."""
    draft_cache: KVCache | None = None
    """That of the drafter, if it is another model."""
    control: Control = field(init=False)
    """What is demanded of the answer by now: the request's own, and what its hook added."""

    def __post_init__(self) -> None:
        self.control = self.request.control
        if self.request.logprobs is not None and self.config.mode == "diffusion":
            self.scoring = Scoring(self.request.logprobs, len(self.request.prompt))

    @property
    def config(self) -> GenerationConfig:
        """The request's settings, with the number of steps of the draft that is planned."""
        plan = self.drafting.plan if self.drafting else None
        return plan.config if plan else self.request.config

    @property
    def denoises(self) -> bool:
        """Whether a step of a canvas is what comes next."""
        return self.drafting.due if self.drafting else self.config.mode == "diffusion" and not self.pending

    @property
    def drafted(self) -> tuple[int, ...]:
        """The draft to be judged by the next encode pass, behind the pending tokens."""
        proposal = self.drafting.proposal if self.drafting else None
        return proposal.tokens if proposal else ()

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

    def next_width(self, model: ModelConfig) -> int:
        """Positions of the canvas that takes the next step."""
        if self.drafting and self.drafting.plan:
            return self.drafting.plan.option.width
        return self.canvas.width if self.canvas else canvas_width(self.config, model, len(self.steps), self.room)

    def start_canvas(self, model: ModelConfig, device: torch.device) -> Canvas:
        """Begin the next canvas from pure noise."""
        config, index, width = self.config, self.commits, self.next_width(model)
        ids = first_canvas(config.seed, config.choice, index, width, model.vocab_size, device)
        control, start = self.control, self.completion
        draft = torch.tensor(control.draft_of(start, width), dtype=ids.dtype, device=device)
        ids[: len(draft)] = torch.where(draft == NOISE, ids[: len(draft)], draft)
        self.canvas = Canvas(index, ids, config.max_denoising_steps, History.start(ids[None]))
        self.bind(self.canvas, model.vocab_size)
        return self.canvas

    def bind(self, canvas: Canvas, vocab: int) -> None:
        """Put into the canvas in work what is demanded of it by now; its pins into `ids`, too."""
        control, start, ids = self.control, self.completion, canvas.ids
        canvas.bias = bias_row(self.config, self.counts, vocab, ids.device, control.banned)
        canvas.pins = control.pins_of(start, canvas.width)
        canvas.reach = min(max(0, control.reach - start), canvas.width)
        canvas.places = control.bans_of(start, canvas.width)
        if control.constraint is not None:
            answer = self.ids[len(self.request.prompt) :]
            canvas.automaton = control.constraint.advance(control.constraint.start, answer)
        canvas.masks = control.masks_of(start, canvas.width)
        if self.drafting and self.drafting.lead:
            canvas.lead = self.drafting.lead
            canvas.pins = dict(enumerate(self.ids[-canvas.lead :]))
        canvas.shapes = None
        put(ids, canvas.pins)


def put(ids: Tensor, tokens: Mapping[int, int]) -> None:
    """Write `tokens`, by position, into `ids [C]`."""
    if tokens:
        places = torch.tensor(list(tokens), device=ids.device)
        ids[places] = torch.tensor(list(tokens.values()), dtype=ids.dtype, device=ids.device)


def canvas_width(config: GenerationConfig, model: ModelConfig, index: int, room: int) -> int:
    """Positions of canvas `index` (from 0) of a request that may still commit `room` tokens; see `narrow`."""
    widths, rule = canvas_widths(config, model), config.narrow
    fitting = next((width for width in widths if width >= room), widths[-1])
    return min(fitting, widths[min(index, len(widths) - 1)]) if rule == "adaptive" else fitting


def canvas_widths(config: GenerationConfig, model: ModelConfig) -> list[int]:
    """The widths that canvases of a request may have, ascending; the last is its canvas length."""
    widest, named = config.canvas_length or model.canvas_length, model.canvas_widths
    if config.narrow == "never" or (config.narrow == "auto" and (config.canvas_length or not named)):
        return [widest]
    return [*(width for width in named or _UNTRAINED if width < widest), widest]


def is_approximate(config: GenerationConfig, model: ModelConfig) -> bool:
    """Whether some canvas may have a width that the checkpoint does not say it was trained with."""
    return config.mode == "diffusion" and not {*canvas_widths(config, model)} <= {*model.trained_widths}


def _positions(config: GenerationConfig, model: ModelConfig) -> int:
    """Positions of all canvases of an answer that uses its whole budget; canvases are never cut."""
    total, index, room = 0, 0, config.max_new_tokens
    widest = canvas_widths(config, model)[-1]
    while room > 0:
        width = canvas_width(config, model, index, room)
        # Once a canvas is as wide as any, so are the next ones, until the rest is shorter.
        count = max(1, room // width) if width == widest else 1
        total, index, room = total + count * width, index + count, room - count * width
    return total


def max_canvas(model: ModelConfig) -> int:
    """The widest canvas a request may ask for.

    A model with learned canvas positions has no embedding beyond them. Others may go up to the reference's
    256 (or their own width, if larger); how well they do there is for their maker to say.
    """
    return model.canvas_positions or max(model.canvas_length, _WIDEST_REFERENCE_CANVAS)


def validate(request: Request, model: ModelConfig, drafter: ModelConfig | None = None) -> None:
    """A `RequestError` for whatever this model cannot do, or in mode verified the `drafter`, if that is another one."""
    prompt, config = request.prompt, request.config
    if not prompt:
        raise RequestError("the prompt is empty; it needs at least 1 token")
    for place, token in enumerate(prompt):
        if not 0 <= token < model.vocab_size:
            raise RequestError(f"prompt token {place} is {token}; the vocabulary has ids 0..{model.vocab_size - 1}")
    for token, _ in config.logit_bias:
        if token >= model.vocab_size:
            raise RequestError(f"logit_bias names token {token}; the vocabulary has ids 0..{model.vocab_size - 1}")
    if len(config.banned) == model.vocab_size:
        raise RequestError(f"logit_bias bans all {model.vocab_size} tokens of the vocabulary; it must leave at least 1")
    request.control.check(config, model.vocab_size)
    asked = request.logprobs
    if asked is not None and not is_whole(asked, 0, MOST):
        raise RequestError(f"logprobs must be a whole number of 0 to {MOST}, or None for none; got {asked!r}")
    budget = config.max_new_tokens
    if config.mode == "diffusion":
        width, widest = canvas_widths(config, model)[-1], max_canvas(model)
        if width > widest:
            raise RequestError(f"canvas_length must be at most {widest} for this model, got {width}")
        get_sampler(config.sampler)
        budget = _positions(config, model)
    if config.mode == "verified":
        drafter = drafter or model
        widest = max_canvas(drafter)
        if widths(config, drafter)[-1] > widest:
            raise RequestError(f"canvas_length must be at most {widest} for this model, got {config.canvas_length}")
        get_sampler(config.sampler)
    if len(prompt) + budget > model.max_positions:
        raise RequestError(
            f"prompt ({len(prompt)} tokens) and answer ({budget} positions) need {len(prompt) + budget} "
            f"positions; the model has {model.max_positions}"
        )
