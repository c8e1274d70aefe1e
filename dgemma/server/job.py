"""A client's request as a whole: its choices in the engine, what of them is to be sent, and the accounts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from dgemma.engine import Request
from dgemma.engine.request import is_approximate
from dgemma.server.choice import Choice, Delta, TokenScore, Told, Wanted
from dgemma.server.errors import ApiError
from dgemma.server.outbox import Outbox
from dgemma.server.service import Service
from dgemma.text.confidence import TokenConfidence


@dataclass
class Answer:
    """One finished choice."""

    text: str = ""
    thought: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    sure: list[TokenConfidence] = field(default_factory=list)
    finish: str = "stop"


class Job:
    """An async context: entering it starts every choice, leaving it aborts those that still run."""

    def __init__(
        self, service: Service, name: str, requests: Sequence[Request], prompts: Sequence[str], wanted: Wanted
    ) -> None:
        """`prompts` are the texts of the requests' prompts, for traces."""
        self.service, self.name, self.wanted = service, name, wanted
        self._outbox = Outbox()
        self.choices = [
            Choice(service, index, request, prompt, wanted, self)
            for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]
        self._open = 0
        self._begun = time.perf_counter()
        self._spoke = False
        self._deadline = asyncio.get_running_loop().time() + service.config.timeout_s

    async def __aenter__(self) -> Self:
        self.service.enter(len(self.choices))
        self.service.jobs.add(self)
        begun = 0
        try:
            for choice in self.choices:
                choice.begin()
                begun += 1
        except BaseException:
            for _ in self.choices[begun:]:
                self.service.leave(None)
            await self.__aexit__()
            raise
        self._open = begun
        return self

    async def __aexit__(self, *error: object) -> None:
        self.service.jobs.discard(self)
        for choice in self.choices:
            choice.abort()
        await self._keep_traces()

    def tell(self, item: Delta | Told) -> None:
        if isinstance(item, Told):
            draft = item.moment.event
            tokens = getattr(draft, "canvas_tokens", None)
            if tokens is not None:
                self._outbox.put_draft(item, len(tokens))
                return
        elif not self._spoke and (item.text or item.thought):
            self._spoke = True
            self.service.metrics.first_text(time.perf_counter() - self._begun)
        self._outbox.put(item)

    def over(self, error: BaseException | None = None) -> None:
        self._open -= 1
        if error is not None or not self._open:
            self._outbox.put(error)

    def fail(self, error: ApiError) -> None:
        """Give up all of it; whoever reads is told why."""
        for choice in self.choices:
            choice.abort()
        self._outbox.put(error)

    async def items(self) -> AsyncIterator[Delta | Told]:
        """What to send, until every choice is over."""
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    item = await self._outbox.get()
            except TimeoutError:
                limit = self.service.config.timeout_s
                raise ApiError(
                    504, f"the answer was not complete after {limit:g} s", code="timeout", reason="timeout"
                ) from None
            if item is None:
                await self._keep_traces()
                return
            yield item

    async def answers(self) -> list[Answer]:
        """Everything at once."""
        found = [Answer() for _ in self.choices]
        async for item in self.items():
            if isinstance(item, Delta):
                answer = found[item.index]
                answer.text += item.text
                answer.thought += item.thought
                answer.scores += item.scores
                answer.sure += item.sure
                answer.finish = item.finish or answer.finish
        return found

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's counts, and ours under `dgemma`. The choices of one prompt have it in common."""
        ends = [choice.end for choice in self.choices if choice.end]
        firsts = [choice for choice in self.choices if choice.config.choice == 0]
        prompt = sum(len(choice.request.prompt) for choice in firsts)
        completion = sum(end.completion_tokens for end in ends)
        thoughts = sum(choice.assembler.thought_tokens for choice in self.choices)
        steps = [count for end in ends for count in end.steps]
        accepted = [count for end in ends for count in end.accepted]
        passes = sum(choice.forward_passes for choice in self.choices if choice.end)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.end.cached_tokens for choice in firsts if choice.end)
            },
            "completion_tokens_details": {"reasoning_tokens": thoughts},
            "dgemma": {
                "denoising_steps": sum(steps),
                "steps": steps,
                **({"accepted": accepted} if accepted else {}),
                "tokens_per_forward": round(completion / max(1, passes), 4),
                "seconds": round(max((choice.seconds for choice in self.choices if choice.end), default=0.0), 4),
            },
        }

    @property
    def facts(self) -> dict[str, Any]:
        """What a client needs to have this answer again."""
        config = self.choices[0].config
        trace = {"trace_id": self.name} if self.wanted.record else {}
        approximate = is_approximate(config, self.service.llm.config)
        return {"seed": config.seed, "mode": config.mode, "approximate": approximate, **trace}

    async def _keep_traces(self) -> None:
        for choice in self.choices:
            lines, choice.lines = choice.lines, []
            if lines:
                name = f"{self.name}-{choice.index}" if choice.index else self.name
                await self.service.traces.keep(name, lines)
