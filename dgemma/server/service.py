"""What the routes of one server share: the model, the limits, the counts. Knows no HTTP but the faults."""

from __future__ import annotations

import hashlib
import math
import secrets
import statistics
import time
from collections import deque
from functools import cached_property, lru_cache
from typing import Protocol

from dgemma import __version__
from dgemma.api import LLM
from dgemma.server.config import ServerConfig
from dgemma.server.errors import ApiError, draining, full, invalid
from dgemma.server.metrics import Metrics
from dgemma.server.traces import Traces

_LONGEST_RETRY_S = 60


class Stoppable(Protocol):
    """A request that can be given up."""

    def fail(self, error: ApiError) -> None: ...


class Service:
    """One model being served. Used by the event loop alone."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        self.metrics = Metrics(llm)
        self.traces = Traces(config.trace_folder, config.traces_kept)
        self.draining = False
        self.created = int(time.time())
        self.jobs: set[Stoppable] = set()
        """Client requests that are being answered."""
        self.piece = lru_cache(maxsize=None)(llm.tokenizer.piece)
        self._answers = 0
        self._seconds: deque[float] = deque(maxlen=32)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with whatever may change an answer of the same seed."""
        llm = self.llm
        named = f"{__version__} {llm.name} {llm.config} {llm.generation} {llm.dtype} {llm.device.type}"
        return f"fp_{hashlib.blake2b(named.encode(), digest_size=6).hexdigest()}"

    @property
    def answers(self) -> int:
        """Answers that run or wait in the engine."""
        return self._answers

    @property
    def capacity(self) -> int:
        return self.llm.engine.config.max_batch_rows + self.config.max_waiting

    def enter(self, answers: int) -> None:
        """Take on so many answers, or say why not."""
        if self.draining:
            raise draining()
        if answers > self.capacity:
            raise invalid(f"{answers} answers are asked for at once; this server takes at most {self.capacity}", "n")
        if self._answers + answers > self.capacity:
            raise full(
                f"{self._answers} answers run or wait here and {answers} more would exceed {self.capacity}; "
                "try again later",
                self._retry_s(),
            )
        self._answers += answers

    def leave(self, seconds: float | None) -> None:
        """An answer is over, after `seconds`; None if it was given up and tells nothing about the next."""
        self._answers -= 1
        if seconds is not None:
            self._seconds.append(seconds)

    def cut(self) -> None:
        """Give up every answer that still runs."""
        for job in list(self.jobs):
            job.fail(draining())

    def _retry_s(self) -> int:
        """Seconds until about half of those before a new request are gone, as recent answers went."""
        usual = statistics.fmean(self._seconds) if self._seconds else 1.0
        rounds = self._answers / self.llm.engine.config.max_batch_rows
        return min(_LONGEST_RETRY_S, max(1, math.ceil(usual * rounds / 2)))

    def check_model(self, name: str) -> None:
        if name != self.llm.name:
            raise ApiError(
                404,
                f"the model {name[:200]!r} is not served here; this is {self.llm.name!r}",
                param="model",
                code="model_not_found",
            )


def new_id(kind: str) -> str:
    """`chatcmpl-...`: random, so that nobody guesses another's trace."""
    return f"{kind}{secrets.token_hex(12)}"


def new_seed() -> int:
    """Of a request that names none; exact in every JSON reader."""
    return secrets.randbits(32)
