"""`LLM`: load a model, then `generate`, `stream`, `chat`, `score`. The one class most users meet.

Text goes in and comes out here; below, the engine knows ids only.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch

from dgemma.checkpoint.load import Checkpoint, load_checkpoint
from dgemma.config import EngineConfig, GenerationConfig, ModelConfig
from dgemma.control import Control, Hook
from dgemma.control.decide import Question, opened, prepare
from dgemma.control.decision import Calibration, Decision
from dgemma.control.language.languages import LANGUAGES, Compiler
from dgemma.engine import Engine, Request, Worker, token_logprobs, validate
from dgemma.engine.deciding import decide
from dgemma.engine.filler import Edited, Filler
from dgemma.engine.infilling import Infilled
from dgemma.engine.request import is_approximate
from dgemma.engine.streams import AsyncStream, Stream, Submitted
from dgemma.errors import ConfigError, RequestError
from dgemma.events import Committed, Event, Finished, Scored
from dgemma.text.chat import ChatTemplate
from dgemma.text.confidence import TokenConfidence, token_confidence
from dgemma.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_LARGE = 1_000_000_000  # bytes of weights from which a CPU keeps the stored type
_SHIPPED = Path(__file__).resolve().parent / "models"
_ENGINE = EngineConfig()


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer and its log-probabilities in nats: `logprob` is the encoder's, given all before it;
    `canvas_logprob` the denoiser's in the canvas's last step (None in mode "ar"); see `events.Scored`.

    `top` are the most likely tokens at its place with the encoder's log-probabilities, as many as were asked for.
    """

    token: int
    logprob: float
    canvas_logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    `token_ids` are all committed tokens, the end token included; `text` is their text without it.
    `finish_reason` is "stop" (end token), "length" (budget) or "abort". `steps` and `stops` are per canvas:
    denoising steps, and why they ended ("stable" or "cap"); without canvases there are no steps and `stops` is
    ("ar",). `accepted` tells in mode "verified" how many drafted tokens of each canvas were accepted.
    `tokens_per_forward` divides by denoising steps and passes that encode committed tokens; the prompt's pass counts
    only where it gives the first token: not in mode "diffusion". `seconds` is wall time, waiting in the queue included.
    `cached_tokens` of the prompt had been encoded by earlier requests. `approximate` tells that some canvas may have a
    width that the checkpoint does not say it was trained with. `logprobs` has an entry a token, or is None if they were
    not asked for; they take one more pass, which counts. `confidence` has an entry a token, for nothing; it is empty in
    modes "ar" and "verified". `parsed` is the value of an answer that had to fit a `schema`: an object of the pydantic
    model, or what JSON says.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    seed: int
    mode: str
    steps: tuple[int, ...]
    stops: tuple[str, ...]
    tokens_per_forward: float
    seconds: float
    model: str
    cached_tokens: int
    approximate: bool
    logprobs: tuple[TokenLogprob, ...] | None = None
    confidence: tuple[TokenConfidence, ...] = ()
    parsed: Any = None
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """Encoder log-likelihood of a text in nats: of each token, in total, per token; and bits per byte (UTF-8)."""

    logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
    total: float
    per_token: float
    bits_per_byte: float


class LLM:
    """A loaded model with its tokenizer and engine. Thread-safe: concurrent calls share batches."""

    def __init__(
        self, checkpoint: Checkpoint, engine: EngineConfig = _ENGINE, drafter: Checkpoint | None = None
    ) -> None:
        self.name, self.folder = checkpoint.name, checkpoint.folder
        self.config: ModelConfig = checkpoint.config
        self.generation: GenerationConfig = checkpoint.generation
        self.tokenizer = Tokenizer.load(checkpoint.folder)
        self.chat_template = ChatTemplate.load(checkpoint.folder)
        self.demo = checkpoint.folder.parent == _SHIPPED
        self.compiler = Compiler(self.tokenizer.token_bytes, self.config.vocab_size)
        self.engine = Engine(checkpoint.model, engine, drafter=drafter.model if drafter else None)
        if drafter and not self.tokenizer.alike(Tokenizer.load(drafter.folder)):
            raise ConfigError(f"the drafter {drafter.name!r} has not the tokens of {checkpoint.name!r}")
        self.device, self.dtype = self.engine.runner.device, self.engine.runner.dtype
        self.worker = Worker(self.engine)
        self.filler = Filler(self.worker, self.tokenizer, self.encode_chat if self.chat_template else None, self.name)

    @staticmethod
    def load(
        model: str | Path = "default",
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        threads: int | None = None,
        engine: EngineConfig = _ENGINE,
        drafter: str | Path | None = None,
    ) -> LLM:
        """Load a shipped model by name, a folder, or a hub id. In mode "verified" the canvases of another model, the
        `drafter`, may draft what this one verifies.

        `device` "auto" is a CUDA GPU if there is one, else the CPU. `dtype` "auto" is bfloat16 on a GPU. On a
        CPU it is float32, in which a batch gives every prompt the very answer it gets alone, unless the
        stored weights exceed 1 GB: then they stay as they are. `threads` sets torch's CPU threads for
        the whole process.
        """
        if threads is not None:
            if threads < 1:
                raise ConfigError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        place = _device(device)
        kind = _dtype(dtype, place)
        loaded = [load_checkpoint(one, device=place, dtype=kind) for one in (model, drafter) if one is not None]
        for one in loaded:
            if kind is None and sum(weight.nbytes for weight in one.model.parameters()) <= _LARGE:
                one.model.float()
        return LLM(loaded[0], engine, *loaded[1:])

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a plain prompt: the begin-of-sequence token, then the text's."""
        return [self.tokenizer.bos, *self.tokenizer.encode(text)]

    def encode_chat(self, messages: Messages, **template: Any) -> list[int]:
        """Ids of a conversation up to where the answer begins. `template` are the template's own options."""
        if self.chat_template is None:
            raise RequestError(f"model {self.name!r} has no chat template; use generate with a plain prompt")
        ids = self.tokenizer.encode(self.chat_template.render(messages, **template))
        return ids if ids[:1] == [self.tokenizer.bos] else [self.tokenizer.bos, *ids]

    def request(
        self,
        prompt: Prompt,
        *,
        watch: bool = False,
        reuse: bool = True,
        logprobs: int | None = None,
        on_step: Hook | None = None,
        **overrides: Any,
    ) -> Request:
        """A checked request for the engine: `overrides` over the checkpoint's generation settings.

        `reuse=False` encodes the whole prompt, whatever other requests have encoded; the answer is the same.
        `logprobs=k` gives the log-probabilities of every token and of the k most likely ones at its place (0 to 20).
        `schema=`, `regex=`, `choices=` or `grammar=` is what the whole answer must fit; see `docs/constraints.md`.
        `on_step` is called after every denoising step, in the engine's thread; see `docs/hooks.md`.
        """
        if on_step is not None and not callable(on_step):
            raise RequestError(f"on_step must be callable, got {type(on_step).__name__}")
        if "steps" in overrides:
            if "max_denoising_steps" in overrides:
                raise RequestError("steps is another name of max_denoising_steps; give one of them")
            overrides["max_denoising_steps"] = overrides.pop("steps")
        ids = tuple(self.encode_prompt(prompt) if isinstance(prompt, str) else _ids(prompt))
        language = {name: overrides.pop(name) for name in LANGUAGES if name in overrides}
        config = self.generation.with_(**overrides)
        control = Control(hook=on_step, constraint=self.compiler.constraint(config, language))
        request = Request(prompt=ids, config=config, watch=watch, reuse=reuse, logprobs=logprobs, control=control)
        validate(request, self.config, self.engine.drafter.model.config)
        return request

    @overload
    def generate(self, prompt: str, **overrides: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[int], **overrides: Any) -> Generation: ...
    @overload
    def generate(self, prompt: list[str] | list[list[int]], **overrides: Any) -> list[Generation]: ...
    def generate(self, prompt: Any, **overrides: Any) -> Any:
        """Complete a prompt (text or token ids), or each of a list of prompts, as one batch.

        `overrides` are fields of `GenerationConfig` (`seed=`, `max_new_tokens=`, `sampler=`, `mode=`, ...),
        taken over the checkpoint's own; `steps=` is short for `max_denoising_steps=`. `logprobs=k`, `on_step=`,
        `schema=`, `regex=`, `choices=`, `grammar=`: see `request`.
        """
        many = _is_batch(prompt)
        answers = self._answers([self.request(one, **overrides) for one in (prompt if many else [prompt])])
        return answers if many else answers[0]

    def stream(self, prompt: Prompt, **overrides: Any) -> Iterator[Event]:
        """The events of one completion: a `Draft` per step, `Committed` per canvas (or token), `Finished`; with
        `logprobs=k` also a `Scored` after each `Committed`.

        A wrong request raises here, before iterating. Leaving the loop early aborts the request.
        """
        return self._events(self.request(prompt, watch=True, **overrides))

    def chat(self, messages: Messages, *, template: Mapping[str, Any] | None = None, **overrides: Any) -> Generation:
        """Answer a conversation; a later turn need not encode again what this one's prompt had."""
        ids = self.encode_chat(messages, **(template or {}))
        return self._answers([self.request(ids, **overrides)])[0]

    def chat_stream(
        self, messages: Messages, *, template: Mapping[str, Any] | None = None, **overrides: Any
    ) -> Iterator[Event]:
        """The events of `chat`; see `stream`."""
        ids = self.encode_chat(messages, **(template or {}))
        return self._events(self.request(ids, watch=True, **overrides))

    async def agenerate(self, prompt: Any, **overrides: Any) -> Any:
        """`generate` without blocking the event loop. Cancelling it aborts the requests."""
        many = _is_batch(prompt)
        requests = [self.request(one, **overrides) for one in (prompt if many else [prompt])]
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(AsyncStream(self.worker, request)) for request in requests]
            answers = [self._answer(stream, [event async for event in stream.events()]) for stream in streams]
        return answers if many else answers[0]

    def astream(self, prompt: Prompt, **overrides: Any) -> AsyncIterator[Event]:
        """`stream` without blocking the event loop. Cancelling or closing it aborts the request."""
        return self._aevents(self.request(prompt, watch=True, **overrides))

    def score(self, text: Prompt, *, prompt: Prompt = "") -> Score:
        """Log-likelihood of `text` after `prompt` under the encoder, an ordinary causal language model."""
        before = self.encode_prompt(prompt) if isinstance(prompt, str) else _ids(prompt)
        ids = self.tokenizer.encode(text) if isinstance(text, str) else _ids(text)
        if not ids:
            raise RequestError("the text to score is empty; it needs at least 1 token")
        self._check_text((*before, *ids))
        logprobs = token_logprobs(self.engine, [*before, *ids], given=len(before))
        written = text if isinstance(text, str) else self.tokenizer.decode(ids, skip_special=False)
        total = math.fsum(logprobs)
        return Score(
            logprobs=tuple(logprobs),
            token_ids=tuple(ids),
            total=total,
            per_token=total / len(ids),
            bits_per_byte=-total / math.log(2) / max(1, len(written.encode())),
        )

    def decide(
        self, template: str | Messages, questions: Question | Sequence[Question], *, prompt: Prompt = "", **options: Any
    ) -> list[Decision]:
        """The probability of every label of closed questions, from one denoising pass; see `docs/decisions.md`.

        The answer belongs at `[[answer]]` in `template`, a text behind `prompt` or a conversation; a question's text at
        `[[question]]`. `options`: `draws=4`, `seed=0`, `joint=False` (all in one canvas), `encoder=False` (its law),
        `calibration` (default: the checkpoint's), `temperature` instead of it, `canvas_length`.
        """
        ids = tuple(self.encode_prompt(prompt) if isinstance(prompt, str) else _ids(prompt))
        self._check_text(ids)
        text, before = opened(template, self.chat_template, self.tokenizer, ids)
        plan = prepare(self.tokenizer.encode, text, questions, before, joint=bool(options.get("joint")))
        return decide(self.engine, plan, options.pop("calibration", None) or Calibration.load(self.folder), **options)

    def infill(self, text: str, **options: Any) -> Infilled:
        """Fill holes like `[[...]]` or `[[... 3 words ...]]` of `text`; the rest stays as it is. See `docs/infill.md`.

        `options`: `prompt=""` before it, `candidates=12` lengths at once, `most=16` tokens in a hole that tells no
        length, `truncate=False` (allow holes that do not see to the end), and what `generate` takes.
        """
        return self.filler.infill(self.generation, text, **options)

    def edit(self, text: str, **options: Any) -> Edited:
        """Write parts of `text` anew and keep the rest: `spans=[(start, end)]` of characters, or the words around
        the share `doubt=0.2` of its tokens that the model finds least likely, by its canvas or `by="encoder"`.

        Also `instruction=`, `prompt=""`, `keep_prefix=`, `keep_suffix=` (characters), `resize=0` (tokens that a
        span may grow or shrink by), and what `infill` takes.
        """
        return self.filler.edit(self.generation, text, **options)

    def _check_text(self, ids: Sequence[int]) -> None:
        """A `RequestError` for ids that the model cannot encode."""
        validate(Request(prompt=tuple(ids), config=GenerationConfig(mode="ar", max_new_tokens=1)), self.config)

    def _answers(self, requests: Sequence[Request]) -> list[Generation]:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(Stream(self.worker, request)) for request in requests]
            return [self._answer(stream, list(stream.events())) for stream in streams]

    def _events(self, request: Request) -> Iterator[Event]:
        with Stream(self.worker, request) as stream:
            yield from stream.events()

    async def _aevents(self, request: Request) -> AsyncIterator[Event]:
        with AsyncStream(self.worker, request) as stream:
            async for event in stream.events():
                yield event

    def _answer(self, stream: Submitted, events: Sequence[Event]) -> Generation:
        config, end = stream.request.config, events[-1]
        assert isinstance(end, Finished)
        committed = [event for event in events if isinstance(event, Committed)]
        ids = tuple(token for event in committed for token in event.tokens)
        encoder = config.mode != "diffusion"
        passes = sum(end.steps) + end.encode_passes + encoder
        text = self.tokenizer.decode(ids[:-1] if end.reason == "stop" else ids)
        return Generation(
            text=text,
            token_ids=ids,
            prompt_token_ids=stream.request.prompt,
            finish_reason=end.reason,
            seed=config.seed,
            mode=config.mode,
            steps=end.steps,
            stops=tuple(event.stop for event in committed if event.stop != "ar") or ("ar",) * encoder,
            tokens_per_forward=len(ids) / max(1, passes),
            seconds=stream.seconds,
            model=self.name,
            cached_tokens=end.cached_tokens,
            accepted=end.accepted,
            approximate=is_approximate(config, self.config),
            logprobs=None if stream.request.logprobs is None else _token_logprobs(ids, events),
            confidence=() if encoder else token_confidence(committed, self.tokenizer, config.stop_tokens),
            parsed=stream.request.control.parse(text) if end.reason == "stop" else None,
        )


def _token_logprobs(ids: Sequence[int], events: Sequence[Event]) -> tuple[TokenLogprob, ...]:
    scored = [event for event in events if isinstance(event, Scored)]
    told = [
        (logprob, marginal, top)
        for event in scored
        for logprob, marginal, top in zip(
            event.logprobs, event.canvas_logprobs or [None] * len(event.logprobs), event.top, strict=True
        )
    ]
    # An answer that was aborted may lack the last ones.
    return tuple(TokenLogprob(token, *values) for token, values in zip(ids, told, strict=False))


def _device(name: str) -> torch.device:
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if gpu else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = torch.device("meta")
    # Not mps: draws are float64, which it lacks.
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no device {name!r} here: torch sees {torch.cuda.device_count()} CUDA GPUs")
    return device


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | None:
    """What to load in; None means to look at the stored size first."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}; got {dtype!r}")
    return _DTYPES[dtype]


def _is_batch(prompt: Any) -> bool:
    """A list of prompts, as against one prompt: a text or a list of ids."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], str | list | tuple)


def _ids(prompt: Any) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise RequestError(f"a prompt is a text or a list of token ids, got {type(prompt).__name__}") from None
