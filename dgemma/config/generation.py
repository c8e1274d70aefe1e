"""What one request may choose, and how Hugging Face's `generation_config.json` spells it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from dgemma.config.checks import is_whole
from dgemma.config.model import ModelConfig, token_ids
from dgemma.errors import RequestError

Mode = Literal["diffusion", "ar", "verified"]
Convention = Literal["hf", "jax"]
Narrow = Literal["auto", "never", "short", "adaptive"]
VerifyDraft = Literal["argmax", "sample"]
VerifyPace = Literal["adaptive", "fixed"]
BAN = -100.0
"""A `logit_bias` from which down a token is excluded, not just unlikely."""
_MOST, _LARGEST = 2**31 - 1, 2.0**127
"""What tensors of rows hold: one value too large for them would end a pass that others share."""
_CHOICES = (
    ("convention", Convention),
    ("mode", Mode),
    ("narrow", Narrow),
    ("verify_draft", VerifyDraft),
    ("verify_pace", VerifyPace),
)
_FOR_AR = ("temperature", "top_k", "top_p", "logit_bias", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Everything one request may choose. The defaults are the reference's; a checkpoint overrides them.

    Diffusion: step s of N (counted N..1) has temperature `t_min + (t_max - t_min) * s / N`. `temperature` and `top_k`
    shape the draw only (0 makes the draw the argmax); acceptance and stop keep the schedule. `top_p`, `logit_bias` and
    the penalties shape the whole prediction.
    `convention` is `"hf"` (stop when the argmax repeats; commit the argmax) or `"jax"` (stop when the argmax equals
    the canvas that was read; commit the sampled and renoised canvas).
    """

    max_new_tokens: int = 256
    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_bound: float = 0.1
    accept_confidence: float = 0.9
    """Only `sampler="confidence"`: accept positions whose top probability reaches this."""
    stability_threshold: int | None = 1
    confidence_threshold: float | None = 0.005
    canvas_length: int | None = None
    """Positions per canvas; None takes the checkpoint's."""
    narrow: Narrow = "auto"
    """When a canvas has fewer positions than that. `"short"`: where the rest of the answer needs no more, rounded up to
    a width of training. `"adaptive"`: also at first, so that text comes early; each canvas has the next wider one.
    `"auto"`: `"short"` if the checkpoint names its widths and `canvas_length` is not chosen, else `"never"`.
    """
    sampler: str = "entropy_bound"
    convention: Convention = "hf"
    mode: Mode = "diffusion"
    """`"ar"`: the encoder writes token by token. `"verified"`: canvases draft, and the encoder accepts or corrects, so
    that the answer has exactly the law of `"ar"`; parameters of the draw then mean what they mean there."""
    verify_draft: VerifyDraft = "argmax"
    """What a canvas proposes in mode verified: its likeliest tokens, so that the answer is token by token that of mode
    `"ar"` with the same seed, or tokens drawn from its prediction."""
    verify_pace: VerifyPace = "adaptive"
    """`"adaptive"`: width and steps (at most `max_denoising_steps`) of a draft, or none, as it pays. `"fixed"`: always
    `canvas_length` and at most `max_denoising_steps`."""
    seed: int = 0
    choice: int = 0
    """Which of several answers to the same prompt this is; part of the random key."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens and what is added to their logits before the temperature, -100 to 100; -100 (or less) bans a token for
    good. A mapping will do, too."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that stands in the answer so far; in diffusion: in committed canvases."""
    frequency_penalty: float = 0.0
    """The same, as many times as the token stands there."""
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0

    def __post_init__(self) -> None:
        self._whole("max_new_tokens", low=1)
        self._whole("max_denoising_steps", low=1)
        self._whole("seed")
        self._whole("choice", low=0)
        self._whole("top_k", low=0)
        if self.canvas_length is not None:
            self._whole("canvas_length", low=1)
        if self.stability_threshold is not None:
            self._whole("stability_threshold", low=0)
        for name in ("t_min", "temperature"):
            self._real(name, low=0.0, open_low=False)
        for name in ("t_max", "entropy_bound"):
            self._real(name, low=0.0)
        if self.confidence_threshold is not None:
            self._real("confidence_threshold", low=0.0)
        self._real("top_p", low=0.0, high=1.0)
        for name in ("presence_penalty", "frequency_penalty"):
            self._real(name, low=-2.0, high=2.0, open_low=False)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        self._real("accept_confidence", low=0.0, high=1.0)
        if self.t_max <= self.t_min:
            raise RequestError(f"t_max must be greater than t_min ({self.t_min}), got {self.t_max}")
        for name, allowed in _CHOICES:
            if getattr(self, name) not in get_args(allowed):
                raise RequestError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")

    def _whole(self, name: str, low: int | None = None) -> None:
        value = getattr(self, name)
        good = is_whole(value)
        if not good or (low is not None and not low <= value <= _MOST):
            bound = "" if low is None else f" in {low}..{_MOST}" if good and value > _MOST else f" of at least {low}"
            raise RequestError(f"{name} must be a whole number{bound}, got {value!r}")

    def _real(self, name: str, low: float, high: float = _LARGEST, open_low: bool = True) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or value > high or value < low or (open_low and value == low):
            span = f"{'more than' if open_low else 'at least'} {low:g}" + (
                f" and at most {high:g}" if high < _LARGEST or (good and value > high) else ""
            )
            raise RequestError(f"{name} must be a number {span}, got {value!r}")

    @property
    def banned(self) -> frozenset[int]:
        """Tokens that `logit_bias` bans."""
        return frozenset(token for token, bias in self.logit_bias if bias <= BAN)

    @property
    def blank_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer or fill what is behind its end, ascending."""
        return tuple(sorted({*self.stop_tokens, self.pad_token}))

    def with_(self, **changes: Any) -> GenerationConfig:
        """A copy with `changes`; an unknown name is a `RequestError` that lists the known ones."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise RequestError(f"unknown generation parameter {name!r}; known: {', '.join(sorted(known))}")
        return replace(self, **changes)

    @staticmethod
    def from_hf(data: Mapping[str, Any], model: ModelConfig) -> GenerationConfig:
        """Read HF's `generation_config.json` (also the nested spelling of older MLX conversions)."""
        flat = dict(data)
        for nested in ("sampler_config", "linear_temperature_schedule_config", "diffusion_stopping_config"):
            flat.update(flat.pop(nested, None) or {})
        names = {f.name for f in fields(GenerationConfig)} - {"stop_tokens", "pad_token"}
        chosen = {name: value for name, value in flat.items() if name in names and name not in _FOR_AR}
        chosen["stop_tokens"] = token_ids(flat.get("eos_token_id")) or model.eos_tokens
        chosen["pad_token"] = int(flat.get("pad_token_id") or model.pad_token)
        return GenerationConfig(**chosen)

    def to_hf(self) -> dict[str, Any]:
        """HF's `generation_config.json`: exactly the keys that `transformers` accepts."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "max_denoising_steps": self.max_denoising_steps,
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": self.entropy_bound},
            "t_min": self.t_min,
            "t_max": self.t_max,
            "stability_threshold": self.stability_threshold,
            "confidence_threshold": self.confidence_threshold,
            "eos_token_id": list(self.stop_tokens),
            "pad_token_id": self.pad_token,
        }


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """`logit_bias` as pairs, whether it came as pairs or as a mapping."""
    pairs = list(given.items() if isinstance(given, Mapping) else given) if isinstance(given, Iterable) else [given]
    chosen: dict[int, float] = {}
    for pair in pairs:
        if not _is_bias(pair):
            raise RequestError(
                f"logit_bias must be pairs of a token id and a number of at most {-BAN:g} "
                f"({BAN:g} or less bans the token), got {pair!r}"
            )
        if pair[0] in chosen:
            raise RequestError(f"logit_bias must name a token once, got {pair[0]} twice")
        chosen[pair[0]] = float(pair[1])
    return tuple(chosen.items())


def _is_bias(pair: Any) -> bool:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or any(isinstance(part, bool) for part in pair):
        return False
    token, bias = pair
    # Not "bias > -BAN": that would let NaN through.
    return isinstance(token, int) and token >= 0 and isinstance(bias, int | float) and bias <= -BAN
