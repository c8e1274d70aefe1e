"""Fills the holes of a text: candidates of several lengths in one batch, and of them the one that the encoder finds
likeliest, whole. Asks for requests and takes answers; who runs them is another's matter (`run` is one way).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dgemma.config import GenerationConfig, ModelConfig, is_whole
from dgemma.control.infill import Infill, Lengths, check_room
from dgemma.engine.request import Request, is_approximate, validate
from dgemma.engine.streams import Stream
from dgemma.engine.worker import Worker
from dgemma.errors import RequestError
from dgemma.events import Committed, Event, Finished, Scored

USUAL_CANDIDATES = 12
MOST_CANDIDATES = 64
_RETRIES = 6
_SPARE = 16


@dataclass(frozen=True)
class Answered:
    """A finished request: its tokens, the encoder's log-probability of each, the steps of its canvases, its events."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    steps: tuple[int, ...]
    events: tuple[Event, ...] = ()

    @staticmethod
    def of(events: Sequence[Event]) -> Answered:
        ids = tuple(token for event in events if isinstance(event, Committed) for token in event.tokens)
        logprobs = tuple(value for event in events if isinstance(event, Scored) for value in event.logprobs)
        end = events[-1]
        if not isinstance(end, Finished) or end.reason == "abort":
            raise RequestError("the request was aborted")
        return Answered(ids, logprobs, end.steps, tuple(events))


@dataclass(frozen=True)
class Candidate:
    """One way to fill the holes. `logprob` is the encoder's, in nats, of all from the first hole to the last text.

    `flaw` tells why it was not taken: "echo" (it says what stands behind the hole), "words" (not so many as asked for),
    "text" (it would change the text around), or nothing. `steps` are of each canvas.
    """

    lengths: Lengths
    fills: tuple[str, ...]
    logprob: float
    flaw: str
    token_ids: tuple[int, ...]
    steps: tuple[int, ...]
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Infilled:
    """A filled text. `fills` are what stands in the holes now, `logprob` the encoder's of all from the first hole on.

    `candidates` are all that were tried, the best first. `ignored` are instructions that the model was not shown;
    `truncated` tells that some hole did not see all the text behind it. `token_ids` follow `prompt_token_ids`.
    """

    text: str
    fills: tuple[str, ...]
    logprob: float
    candidates: tuple[Candidate, ...]
    ignored: tuple[str, ...]
    truncated: bool
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    seed: int
    approximate: bool
    model: str = ""


class Filling:
    """The search for the best fill: while there are `requests`, have them answered and `take` the answers."""

    def __init__(
        self,
        plan: Infill,
        config: GenerationConfig,
        model: ModelConfig,
        *,
        candidates: int = USUAL_CANDIDATES,
        truncate: bool = False,
        watch: bool = False,
        lenient: bool = False,
        ignored: Sequence[str] = (),
        name: str = "",
    ) -> None:
        """`lenient` takes a flawed fill rather than none. `watch` keeps the events of every denoising step."""
        if not is_whole(candidates, 1, MOST_CANDIDATES):
            raise RequestError(f"candidates must be a whole number of 1..{MOST_CANDIDATES}, got {candidates!r}")
        self.plan, self.config, self.model = plan, config, model
        self._count, self._watch, self._lenient = candidates, watch, lenient
        self._ignored, self._name = tuple(ignored), name
        self._widths = [config.canvas_length] if config.canvas_length else model.trained_widths
        least = plan.layout(plan.least()).size
        check_room(least, self._widths[-1], truncate)
        self._room = self._widths[-1] if least <= self._widths[-1] else least + _SPARE
        self._found: list[Candidate] = []
        self._asked: list[Lengths] = plan.first(self._room, candidates)
        self._banned = [frozenset[int]() for _ in plan.tails]
        self._whole = False
        self._round, self._refined = 0, False
        self._first = list(self._asked)
        for request in self.requests():
            validate(request, model)

    def requests(self) -> list[Request]:
        """What is to be answered next; nothing if the search is over."""
        return [self._request(lengths) for lengths in self._asked]

    def take(self, answers: Sequence[Answered]) -> None:
        """The answers to `requests`, in order. `RequestError` if no fill can be had."""
        for lengths, answer in zip(self._asked, answers, strict=True):
            self._note(lengths, answer)
        good = self._good()
        known = {candidate.lengths for candidate in self._found}
        if good and not self._refined:
            self._refined = True
            self._asked = self.plan.near(good[0].lengths, known, self._room, self._count)
        elif good or self._round == _RETRIES:
            self._asked = []
        else:
            self._round += 1
            self._asked = self._first
        if not self._asked and not good and not self._lenient:
            flaws = sorted({candidate.flaw for candidate in self._found})
            raise RequestError(
                f"none of {len(self._found)} fills will do ({', '.join(flaws)}); try another seed, or other lengths"
            )

    def best(self) -> Candidate:
        return (self._good() or self._ranked())[0]

    def result(self) -> Infilled:
        """The best fill; only when there are no more requests."""
        assert not self._asked
        best = self.best()
        return Infilled(
            text=self.plan.template.filled(best.fills),
            fills=best.fills,
            logprob=best.logprob,
            candidates=tuple([best, *(one for one in self._ranked() if one is not best)]),
            ignored=self._ignored,
            truncated=self.plan.layout(best.lengths).size > self._widths[-1],
            token_ids=best.token_ids,
            prompt_token_ids=self.plan.prompt,
            seed=self.config.seed,
            approximate=is_approximate(self._request(best.lengths).config, self.model),
            model=self._name,
        )

    def _request(self, lengths: Lengths) -> Request:
        size = self.plan.layout(lengths).size
        width = self._width(size)
        config = replace(
            self.config,
            max_new_tokens=size,
            canvas_length=width,
            # Another try draws anew.
            choice=self.config.choice + self._round,
        )
        control = self.plan.control(lengths, self._banned, self._whole)
        return Request(prompt=self.plan.prompt, config=config, watch=self._watch, logprobs=0, control=control)

    def _width(self, size: int) -> int:
        """A model trained with several widths gets just what is needed: free places behind the text cost steps."""
        if self.config.canvas_length is None and self.model.canvas_widths:
            return min(size, self._widths[-1])
        return next((width for width in self._widths if width >= size), self._widths[-1])

    def _note(self, lengths: Lengths, answer: Answered) -> None:
        reading = self.plan.read(answer.ids, lengths)
        layout = self.plan.layout(lengths)
        # An open end is as long as it likes; only what is there in every candidate can be compared.
        counted = layout.size - lengths[-1] * self.plan.open
        self._found.append(
            Candidate(
                lengths,
                reading.fills,
                math.fsum(answer.logprobs[: counted or None]),
                next((flaw for flaw in reading.flaws if flaw), ""),
                answer.ids,
                answer.steps,
                answer.events if self._watch else (),
            )
        )
        for number, (span, flaw) in enumerate(zip(layout.spans, reading.flaws, strict=True)):
            if flaw == "echo" and answer.ids[span]:
                self._banned[number] |= {answer.ids[span][-1]}
            self._whole |= flaw == "text"

    def _ranked(self) -> list[Candidate]:
        return sorted(self._found, key=lambda candidate: -candidate.logprob)

    def _good(self) -> list[Candidate]:
        return [candidate for candidate in self._ranked() if not candidate.flaw]


def run(worker: Worker, filling: Filling) -> Infilled:
    """Have all requests answered, each batch at once."""
    while requests := filling.requests():
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(Stream(worker, request)) for request in requests]
            filling.take([Answered.of(list(stream.events())) for stream in streams])
    return filling.result()
