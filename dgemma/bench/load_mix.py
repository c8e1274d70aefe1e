"""A reproducible mix of requests for a server under load, and what each of them must answer. Knows no HTTP library.

Prompts are log-uniform in length, so that most are short and some fill the context; a quarter begin like another.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.api import LLM
from dgemma.bench.results import PROMPTS
from dgemma.diffusion.samplers import get_sampler
from dgemma.errors import RequestError
from dgemma.text.chat import AnswerStream

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAMPLERS = ("entropy_bound", "confidence", "ancestral")
_STEPS = (6, 12, 24)
_STOPS = (".", " the ", "and", "\n", ", ", "was", "She", " a ")
_SHARED_TEXTS = 8  # beginnings that several prompts have in common
_LATEST_LEAVE = 6  # events after which a client that gives up is gone


@dataclass(frozen=True, kw_only=True)
class MixSettings:
    """Shares are exact (rounded to a whole request) and independent of each other."""

    requests: int = 2000
    seed: int = 0
    longest_prompt: int = 2000
    canvases: int = 4
    """At most so many canvases an answer, where the context allows."""
    samplers: tuple[str, ...] = SAMPLERS
    cancelled: float = 0.2
    """Share of clients that close their stream early."""
    stopped: float = 0.1
    """Share of requests with stop strings."""
    streamed: float = 0.5
    """Share of the others that stream; whoever is to give up always does."""
    chat: float = 0.25

    def __post_init__(self) -> None:
        for name in ("requests", "longest_prompt", "canvases"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("cancelled", "stopped", "streamed", "chat"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(f"{name} must be a share in 0..1, got {getattr(self, name)}")
        for sampler in self.samplers:
            get_sampler(sampler)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One request of the mix, ready to be sent or to be answered in this process."""

    number: int
    route: str
    prompt: tuple[int, ...]
    """Token ids of a completion; empty for a chat."""
    text: str
    """What the user says in a chat."""
    max_tokens: int
    sampler: str
    steps: int
    seed: int
    stop: tuple[str, ...]
    stream: bool
    drafts: bool
    leave_after: int | None
    """The client closes its stream after so many events; None: it stays."""

    def body(self, model: str) -> dict[str, Any]:
        """As JSON for the server."""
        asked: dict[str, Any] = {
            "model": model,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "dgemma": {"sampler": self.sampler, "steps": self.steps},
        }
        if self.route == CHAT:
            asked["messages"] = [{"role": "user", "content": self.text}]
        else:
            asked["prompt"] = list(self.prompt)
        if self.stop:
            asked["stop"] = list(self.stop)
        if self.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True, "include_canvas": self.drafts}}
        return asked


@dataclass(frozen=True)
class Expected:
    """The answer of a request that had the engine for itself."""

    text: str
    reason: str


def make_mix(llm: LLM, settings: MixSettings) -> list[Item]:
    """The same items for the same settings, tokenizer and context."""
    count, rng = settings.requests, random.Random(f"mix {settings.seed}")
    canvas, context = llm.generation.canvas_length or llm.config.canvas_length, llm.config.max_positions
    longest = min(settings.longest_prompt, context - canvas)
    if longest < 1:
        raise RequestError(f"the model has {context} positions, which is no room for a prompt and a canvas of {canvas}")
    cancelled, stopped = _some(rng, count, settings.cancelled), _some(rng, count, settings.stopped)
    chats = _some(rng, count, settings.chat if llm.chat_template else 0.0)
    streamed = _some(rng, count, settings.streamed)
    shared = [_words(rng, longest) for _ in range(_SHARED_TEXTS)]
    items = []
    for number in range(count):
        size = max(1, min(longest, round(math.exp(rng.uniform(0, math.log(longest + 0.5))))))
        words = rng.choice(shared) if rng.random() < 0.25 else _words(rng, size)
        chat, prompt, text, length = number in chats, tuple[int, ...](), "", size
        if chat:
            text = _cut_chat(llm, words, size)
            length = len(llm.encode_chat([{"role": "user", "content": text}]))
        else:
            prompt = tuple(llm.encode_prompt(" ".join(words))[:size])
        canvases = max(1, min(rng.randint(1, settings.canvases), (context - length) // canvas))
        items.append(
            Item(
                number=number,
                route=CHAT if chat else COMPLETIONS,
                prompt=prompt,
                text=text,
                max_tokens=canvases * canvas,
                sampler=rng.choice(settings.samplers),
                steps=rng.choice(_STEPS),
                seed=rng.randrange(1 << 31),
                stop=tuple(rng.sample(_STOPS, rng.randint(1, 3))) if number in stopped else (),
                stream=number in streamed or number in cancelled,
                drafts=rng.random() < 0.5,
                leave_after=rng.randint(0, _LATEST_LEAVE) if number in cancelled else None,
            )
        )
    return items


def expected(llm: LLM, item: Item) -> Expected:
    """What the server must answer, computed in this process; `llm` should run one request at a time and reuse none."""
    options: dict[str, Any] = {
        "max_new_tokens": item.max_tokens, "seed": item.seed, "sampler": item.sampler, "steps": item.steps,
    }  # fmt: skip
    if item.route == CHAT:
        answer = llm.chat([{"role": "user", "content": item.text}], **options)
        parts = AnswerStream(llm.tokenizer)
        ids = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
        text = "".join(part.text for part in [*parts.push(ids), *parts.flush()])
        return _stopped(text, answer.finish_reason, item.stop)
    answer = llm.generate(item.prompt, **options)
    return _stopped(answer.text, answer.finish_reason, item.stop)


def _stopped(text: str, reason: str, stops: Sequence[str]) -> Expected:
    """Cut before the stop string that is complete first: who reads along knows of no other."""
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return Expected(text[: min(places)[1]], "stop") if places else Expected(text, reason)


def _some(rng: random.Random, count: int, share: float) -> set[int]:
    return set(rng.sample(range(count), round(count * share)))


def _words(rng: random.Random, count: int) -> list[str]:
    """At least `count` words of the built-in prompts, shuffled: a word is a token or more."""
    words = [word for text in PROMPTS for word in text.split()]
    rounds = [rng.sample(words, len(words)) for _ in range(-(-count // len(words)))]
    return list(itertools.chain.from_iterable(rounds))[:count]


def _cut_chat(llm: LLM, words: Sequence[str], size: int) -> str:
    """A text whose conversation has about `size` tokens: as many as the context allows."""
    room = llm.config.max_positions - 2 * (llm.generation.canvas_length or llm.config.canvas_length)
    ids = llm.tokenizer.encode(" ".join(words))[: min(size, room - 32)]
    return llm.tokenizer.decode(ids).strip() or words[0]
