"""One answer of a client's request: an engine request, its events as text, and its trace."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace
from typing import Protocol

from dgemma.config import GenerationConfig
from dgemma.engine import Request
from dgemma.events import Committed, Draft, Event, Finished, Scored
from dgemma.server.service import Service
from dgemma.server.text import Assembler, Piece
from dgemma.text.confidence import TokenConfidence, of_event
from dgemma.trace import Header, Moment, TraceEncoder, as_text


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Log-probabilities of one token of an answer: the encoder's, its likeliest ones, and the denoiser's own."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    canvas_logprob: float | None


@dataclass(frozen=True, slots=True)
class Delta:
    """More of answer `index`. `finish` is set in its last one."""

    index: int
    text: str = ""
    thought: str = ""
    scores: tuple[TokenScore, ...] = ()
    sure: tuple[TokenConfidence, ...] = ()
    finish: str | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A moment of answer `index`, for whoever watches its canvas."""

    index: int
    moment: Moment


class Listener(Protocol):
    """Where a choice reports to, in the event loop."""

    def tell(self, item: Delta | Told) -> None: ...

    def over(self, error: BaseException | None = None) -> None:
        """This choice will report no more."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a client asked to see of its answers."""

    stops: tuple[str, ...] = ()
    thoughts: bool = False
    top: int | None = None
    confidence: bool = False
    drafts: bool = False
    record: bool = False


class Choice:
    """Runs from `begin` to the first of: the engine's end, a stop text, `abort`. Lives in one event loop."""

    def __init__(
        self, service: Service, index: int, request: Request, prompt: str, wanted: Wanted, listener: Listener
    ) -> None:
        self.index, self.request = index, request
        self.end: Finished | None = None
        self.open = False
        self.header = Header.of(service.llm.name, request.config, prompt, request.prompt)
        self.lines: list[str] = []
        """The recorded trace so far, if one was asked for."""
        self._service, self._wanted, self._listener = service, wanted, listener
        self._recorder = TraceEncoder(self.header, service.piece) if wanted.record else None
        if self._recorder:
            self.lines.append(as_text(self._recorder.header))
        self.assembler = Assembler(service.llm.tokenizer, wanted.stops, wanted.thoughts)
        self._steps: list[int] = []
        self._pending: list[Piece] = []
        self._scores: list[TokenScore] = []
        self._sure: list[TokenConfidence] = []
        self._unscored: tuple[int, ...] = ()
        self._standing: tuple[int, int] | None = None

    @property
    def config(self) -> GenerationConfig:
        return self.request.config

    def begin(self) -> None:
        """Hand the request to the engine (errors of `Engine.add`)."""
        self._begun = self._latest = time.perf_counter()
        loop, worker = asyncio.get_running_loop(), self._service.llm.worker
        engine = worker.engine

        def deliver(event: Event | BaseException) -> None:
            # Read here, between the engine's ticks: what a stop text will have to say of itself.
            standing = None
            if isinstance(event, Committed) and self._wanted.stops:
                standing = engine.standing(event.request)  # `submit` may not have told us our number yet
            with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody listens
                loop.call_soon_threadsafe(self._take, event, standing)

        self._number = worker.submit(self.request, deliver)
        self.open = True

    def abort(self) -> None:
        """Stop the engine's work on it, within one step. Nothing more is reported."""
        if self.open:
            self.open = False
            self._service.llm.worker.abort(self._number)
            self._service.leave(None)

    @property
    def seconds(self) -> float:
        """From `begin` to the latest event."""
        return self._latest - self._begun

    @property
    def forward_passes(self) -> int:
        """As `Generation` counts them."""
        assert self.end is not None
        return sum(self.end.steps) + self.end.encode_passes + (self.config.mode != "diffusion")

    def _take(self, event: Event | BaseException, standing: tuple[int, int] | None) -> None:
        if not self.open:
            return
        try:
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Committed):
                self._standing = standing
            self._handle(event)
        except BaseException as error:
            self.abort()
            self._listener.over(error)

    def _handle(self, event: Event) -> None:
        now, before = time.perf_counter(), self._latest
        self._latest = now if not isinstance(event, Draft) else before
        match event:
            case Draft():
                self._tell(event, now)
            case Committed():
                if event.stop != "ar":
                    self._service.metrics.canvas(now - before, event.steps)
                    self._steps.append(event.steps)
                self._commit(event, now)
            case Scored():
                self._score(event)
                self._tell(event, now)
                self._send(stopped=self.assembler.stopped)
            case Finished():
                self._finish(event, now)

    def _commit(self, event: Committed, now: float) -> None:
        ends = self.config.stop_tokens
        ids = event.tokens[:-1] if event.tokens and event.tokens[-1] in ends else event.tokens
        piece = self.assembler.push(ids)
        self._pending.append(piece)
        self._tell(event, now, piece)
        self._unscored = ids
        self._sure += of_event(event)[: len(ids)] if self._wanted.confidence else ()
        if self._wanted.top is None:
            self._send(stopped=self.assembler.stopped)

    def _score(self, event: Scored) -> None:
        for place, token in enumerate(self._unscored):
            own = event.canvas_logprobs[place] if event.canvas_logprobs else None
            self._scores.append(TokenScore(token, event.logprobs[place], event.top[place], own))
        self._unscored = ()

    def _send(self, stopped: bool) -> None:
        """Report what became final; at a stop text that is all there will be."""
        if not stopped:
            self._report(None)
        elif self._standing:  # else the engine has ended it already, and says so next
            self._service.llm.worker.abort(self._number)
            cached, passes = self._standing
            end = Finished(self._number, "stop", len(self.request.prompt), cached, 0, tuple(self._steps), passes)
            self._finish(end, time.perf_counter())

    def _finish(self, event: Finished, now: float) -> None:
        piece = self.assembler.flush()
        self._pending.append(piece)
        self._latest = now
        if self.assembler.stopped:
            event = replace(event, reason="stop", completion_tokens=self.assembler.tokens)
        self.end = event
        self._tell(event, now, piece)
        self._report("length" if event.reason == "length" else "stop")
        self.open = False
        self._service.leave(self.seconds)
        self._listener.over()

    def _report(self, finish: str | None) -> None:
        text, thought = ("".join(getattr(piece, name) for piece in self._pending) for name in ("text", "thought"))
        scores: tuple[TokenScore, ...] = ()
        if self._wanted.top is not None:
            scores = tuple(self._scores[place] for piece in self._pending for place in piece.tokens)
        places = [place for piece in self._pending for place in piece.tokens]
        sure = tuple(self._sure[place] for place in places) if self._sure else ()
        self._pending.clear()
        if text or thought or scores or sure or finish:
            self._listener.tell(Delta(self.index, text, thought, scores, sure, finish))

    def _tell(self, event: Event, now: float, piece: Piece | None = None) -> None:
        piece = piece or Piece()
        moment = Moment(now - self._begun, event, piece.text, piece.thought)
        if self._recorder:
            self.lines.append(as_text(self._recorder.line(moment)))
        if self._wanted.drafts:
            self._listener.tell(Told(self.index, moment))
