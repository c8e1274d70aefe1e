"""The engine: requests in, events out, one tick at a time. A tick is at most one encode and one denoise pass.

Batching is per step: canvases at different steps, of different widths, samplers and settings share a pass,
requests join and leave between ticks, and nobody waits for the slowest. One thread at a time may tick.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from itertools import count

import torch
from torch import Tensor

from dgemma.cache import KVCache, PrefixCounters, PrefixStore, kv_bytes
from dgemma.config import EngineConfig
from dgemma.diffusion.finalise import finalise
from dgemma.diffusion.protocol import Stats, Step
from dgemma.engine.batch import CanvasBatch
from dgemma.engine.confidence import confidence
from dgemma.engine.drafting import Drafting
from dgemma.engine.hooked import obey, settled, step_view
from dgemma.engine.load import Load, Totals
from dgemma.engine.pace import Costs, Pace
from dgemma.engine.request import Request, State, max_canvas, validate
from dgemma.engine.runner import Counters, Runner
from dgemma.engine.scheduler import parts, plan_denoise, plan_encode, whole_chunk
from dgemma.engine.scoring import Scoring, score
from dgemma.engine.verified import by_draws, catch_up, judge, propose, settle
from dgemma.errors import CapacityError, ConfigError, RequestError
from dgemma.events import Committed, Draft, Event, Finished, Scored
from dgemma.model import DiffusionGemma

_DEFAULT = EngineConfig()
_CANVAS_COST = 3.0  # in autoregressive tokens, where none is configured and nothing may be measured


class Engine:
    """Runs requests on one model. `add` any time; call `tick` while `has_work`.

    `drafter` is another model of the same vocabulary, whose canvases draft in mode verified instead of the model's own.

    The weights must not change while `prefixes` holds blocks. A store may be given, to be shared by engines whose
    `identity` (model, revision, adapters: whatever says which weights these are) is the same; without one nothing
    is ever taken from another engine.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        config: EngineConfig = _DEFAULT,
        *,
        prefixes: PrefixStore | None = None,
        identity: str = "",
        drafter: DiffusionGemma | None = None,
    ) -> None:
        self.config, self.model_config = config, model.config
        self.runner = Runner(model)
        self.drafter = self.runner if drafter is None else Runner(drafter)
        sizes = model.config.vocab_size, self.drafter.model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ConfigError(f"a drafter needs the model's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}")
        self.prefixes = prefixes or PrefixStore(config.prefix_cache_tokens, config.block)
        if self.prefixes.block != config.block:
            raise ConfigError(f"the engine needs a prefix store of blocks of {config.block}, got {self.prefixes.block}")
        which = identity.encode() or os.urandom(16)
        named = f"{model.config} {self.runner.dtype} {self.runner.device} {config.block}".encode()
        self._root = blake2b(which + b"\0" + named, digest_size=16).digest()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, State] = {}
        self._next_id = 0
        self._turn = count(1)
        self._kv_reserved = 0
        self.faults: dict[int, RequestError] = {}
        """Why requests were aborted whose hook failed; whoever ticks takes them out."""
        self._pace = Pace(Costs(config.canvas_cost))
        self._totals = Totals()
        self._load = Load(kv_limit=config.kv_bytes)

    def add(self, request: Request) -> int:
        """Queue a request; its id marks its events. `RequestError` if model or `kv_bytes` can never do it, else
        `CapacityError` if the engine is full. May be called from another thread while one ticks.
        """
        validate(request, self.model_config, self.drafter.model.config)
        needed, limit = self.kv_bytes(request), self.config.kv_bytes
        if limit and needed > limit:
            raise RequestError(
                f"prompt ({len(request.prompt)} tokens) and answer (max_new_tokens {request.config.max_new_tokens}) "
                f"may need {needed} bytes of keys and values; this engine sets aside at most {limit} (kv_bytes)"
            )
        held = len(self._waiting) + len(self._running)
        if held >= self.config.max_requests:
            raise CapacityError(f"the engine holds {held} requests and takes at most {self.config.max_requests}")
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def abort(self, request: int) -> Finished | None:
        """Drop a request between ticks, whatever it is doing. Its last event; None if it is not here."""
        for entry in self._waiting:
            if entry[0] == request:
                self._waiting.remove(entry)
                return Finished(request, "abort", len(entry[1].prompt), 0, 0, (), 0)
        state = self._running.get(request)
        if state is None:
            return None
        end = self._finish(state, "abort")
        self._snapshot()
        return end

    def standing(self, request: int) -> tuple[int, int] | None:
        """Reused tokens and encode passes of a running request, as `Finished` will tell them; between ticks."""
        state = self._running.get(request)
        return None if state is None else (state.cached_tokens, state.encode_passes)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def counters(self) -> Counters:
        """Forward passes so far."""
        own = self.runner.counters
        return own if self.drafter is self.runner else own.plus(self.drafter.counters)

    @property
    def prefix_counters(self) -> PrefixCounters:
        """What reuse between requests did so far. May be read from any thread."""
        return self.prefixes.counters

    def tick(self) -> list[Event]:
        """Encode what is pending, then take a denoising step; the events of both in order."""
        while self._waiting and len(self._running) < self.config.max_batch_rows and self._fits(self._waiting[0][1]):
            self._admit(*self._waiting.popleft())
        events = [*self._timed("encode", self._encode), *self._timed("denoise", self._denoise)]
        self._totals.events(events)
        self._snapshot()
        return events

    def _timed(self, kind: str, run: Callable[[], list[Event]]) -> list[Event]:
        """A pass, whose price mode verified wants to know."""
        begun, before = time.perf_counter(), self.counters
        events = run()
        rows = getattr(self.counters, f"{kind}d_tokens") - getattr(before, f"{kind}d_tokens")
        self._pace.costs.saw(kind, rows, time.perf_counter() - begun)
        return events

    @property
    def load(self) -> Load:
        """How busy the engine is, as of the end of the last tick; `waiting` as of now. For any thread."""
        return replace(self._load, waiting=len(self._waiting))

    def kv_bytes(self, request: Request) -> int:
        """Bytes of keys and values that a request may need at most: its prompt and its whole budget."""
        return sum(
            kv_bytes(runner.model.config, runner.dtype, self._slack, _most_tokens(request))
            for runner in self._runners(request)
        )

    def _runners(self, request: Request) -> set[Runner]:
        """Who keeps keys and values for a request."""
        return {self.runner, self.drafter} if request.config.mode == "verified" else {self.runner}

    def new_cache(self, most: int | None = None, runner: Runner | None = None) -> KVCache:
        """An empty cache for the engine's model (or that of `runner`) and, if given, at `most` that many tokens."""
        own = runner or self.runner
        return KVCache(own.model.config, own.device, own.dtype, self._slack, most)

    @property
    def _slack(self) -> int:
        """Covers the widest canvas and the longest chunk."""
        return max(self.config.encode_chunk, max_canvas(self.model_config), max_canvas(self.drafter.model.config))

    def _fits(self, request: Request) -> bool:
        """Whether memory allows it now. Later ones wait behind it, or a large request would never get its turn."""
        limit = self.config.kv_bytes
        return not limit or self._kv_reserved + self.kv_bytes(request) <= limit

    def _snapshot(self) -> None:
        prefix = self.prefixes.counters
        self._load = Load(
            running=len(self._running),
            kv_reserved=self._kv_reserved,
            kv_limit=self.config.kv_bytes,
            prefix_tokens=self.prefixes.tokens,
            prefix_hits=prefix.hits,
            prefix_misses=prefix.misses,
            prefix_reused_tokens=prefix.reused_tokens,
            **asdict(self._totals),
            **asdict(self.counters),
        )

    def _admit(self, number: int, request: Request) -> None:
        cache, size = self.new_cache(_most_tokens(request)), self.kv_bytes(request)
        state = State(number, request, cache, list(request.prompt), next(self._turn), size)
        if request.reuse and self.config.prefix_cache_tokens:
            # The next token's distribution comes from encoding the last one: who needs it must leave that to do.
            usable = request.prompt[: len(request.prompt) - request.starts_from_last]
            state.cached_tokens = state.whole = self.prefixes.take(self._root, usable, state.cache)
        if request.config.mode == "verified":
            # Drawn drafts shape the answer, which may depend neither on others nor on a clock.
            alone = by_draws(request.config)
            state.drafting = Drafting(Pace(Costs(self.config.canvas_cost or _CANVAS_COST)) if alone else self._pace)
            if self.drafter is not self.runner:
                state.draft_cache = self.new_cache(_most_tokens(request), self.drafter)
        self._running[number] = state
        self._kv_reserved += size
        self._totals.admit(len(request.prompt))

    def _encode(self) -> list[Event]:
        states = plan_encode(self._running.values(), self.config)
        if not states:
            return []
        self._totals.encode_rows += len(states)
        jobs: list[tuple[KVCache, Sequence[int]]] = []
        cuts = [parts(state, self.config) for state in states]
        for state, counts in zip(states, cuts, strict=True):
            state.turn = next(self._turn)
            state.encode_passes += state.cache.length >= len(state.request.prompt)
            tokens = [*state.ids[state.cache.length :], *state.drafted]
            for cache, size in zip(state.cache.segments(counts), counts, strict=True):
                begin = cache.length - state.cache.length
                jobs.append((cache, tokens[begin : begin + size]))
        rest = iter(self.runner.encode(jobs))
        hidden = [[next(rest) for _ in counts] for counts in cuts]
        events: list[Event] = []
        for state, counts, rows in zip(states, cuts, hidden, strict=True):
            begin = state.cache.length
            self._advance(state, counts)
            if state.scoring:
                events += self._score(state, state.scoring, begin, torch.cat(rows))
        pairs = zip(states, hidden, strict=True)
        last = [rows[-1][-1 - len(state.drafted) :] for state, rows in pairs if _draws_next(state)]
        return events + (self._extend([state for state in states if _draws_next(state)], last) if last else [])

    def _score(self, state: State, scoring: Scoring, begin: int, hidden: Tensor) -> list[Event]:
        """Log-probabilities of what a pass encoded from position `begin` on, once its canvas is encoded to the end."""
        scoring.encode(self.runner, state.ids, begin, hidden)
        return [scoring.take(state.id), *self._end(state)] if scoring.owed and not state.pending else []

    def _advance(self, state: State, counts: Sequence[int]) -> None:
        """Make what a pass encoded part of the cache, and keep its whole blocks for others."""
        aligned = state.whole == state.cache.length and not state.drafted
        state.cache.advance(sum(counts))
        fresh = counts.count(self.config.block) * self.config.block if aligned else 0
        state.whole += fresh
        if fresh and state.request.reuse:
            self.prefixes.put(self._root, state.ids[: state.whole], state.cache)

    def _extend(self, states: Sequence[State], last: Sequence[Tensor]) -> list[Event]:
        """What the encoder writes next, from the hidden states `[n + 1, H]` of a last token and n drafted ones."""
        events: list[Event] = []
        for state, verdict in zip(states, judge(self.runner, self.drafter, states, last), strict=True):
            number, asked, proposal = state.commits, state.request.logprobs, state.drafting and state.drafting.proposal
            steps, stop = (proposal.steps, proposal.stop) if proposal else (0, "ar")
            committed = self._commit(state, number, verdict.tokens, steps, stop)
            settle(state, committed.tokens, self.drafter.model.config, len(self._running))
            events.append(committed)
            if asked is not None:
                logits = torch.cat(verdict.logits)[: len(committed.tokens)]
                logprobs, tops = score(logits, committed.tokens, asked)
                events.append(Scored(state.id, number, tuple(logprobs), tuple(tops), ()))
            events += self._end(state)
        return events

    def _denoise(self) -> list[Event]:
        states = plan_denoise(self._running.values(), self.model_config, self.config)
        if not states:
            return []
        self._totals.denoise_rows += len(states)
        others = [state for state in states if state.draft_cache is not None]
        catch_up(self.drafter, others, whole_chunk(self.config))
        rest = [state for state in states if state.draft_cache is None]
        return (self._step(self.runner, rest) if rest else []) + (self._step(self.drafter, others) if others else [])

    def _step(self, runner: Runner, states: Sequence[State]) -> list[Event]:
        """A step of the canvases of `states`, all by the same model."""
        for state in states:
            state.turn = next(self._turn)
            if state.canvas is None:
                state.start_canvas(runner.model.config, runner.device)
        batch = CanvasBatch(states, self.model_config.vocab_size, self.runner.device)
        jobs = [
            ((state.draft_cache or state.cache).before(len(state.ids) - canvas.lead), canvas.ids)
            for state, canvas in zip(states, batch.canvases, strict=True)
        ]
        out = runner.denoise(jobs, [canvas.soft for canvas in batch.canvases], batch.draws())
        stats, steps, stable = batch.finish(out)
        hidden = out.hidden.split(batch.widths)
        events: list[Event] = []
        for row, state in enumerate(states):
            if state.control.hook is not None:
                try:
                    view = step_view(state, jobs[row][1], stats, steps[row], row, self.model_config.vocab_size)
                    steps[row], stable[row] = obey(state, view, steps[row], stable[row], self.runner)
                except RequestError as fault:
                    self.faults[state.id] = fault
                    events.append(self._finish(state, "abort"))
                    continue
            if state.request.watch:
                events.append(_draft(state, stats, steps[row], row, float(batch.temperature[row])))
            events += self._after_step(state, stats, steps[row], row, stable[row], hidden[row])
        return events

    def _after_step(
        self, state: State, stats: Stats, step: Step, row: int, stable: bool, hidden: Tensor
    ) -> list[Event]:
        canvas = state.canvas
        assert canvas is not None
        if canvas.step > 0 and not stable and not canvas.ended:
            return []
        taken = state.config.max_denoising_steps - canvas.step
        if state.drafting:
            propose(state, canvas, stats.argmax[row], hidden, taken, "stable" if stable else "cap", self.drafter)
            return []
        # HF commits the argmax; JAX commits the sampled and renoised canvas.
        final = argmax = stats.argmax[row, : canvas.width]
        if state.config.convention == "jax":
            # Fresh noise may hit a banned token, which is committed by nobody.
            final = torch.where(canvas.bans(step.canvas, state.config.stop_tokens), argmax, step.canvas)
        if state.control.hook is not None:
            final = settled(state, final, hidden, self.runner)
        state.steps.append(taken)
        state.canvas = None
        stop = "hook" if canvas.ended else "stable" if stable else "cap"
        committed = self._commit(state, canvas.index, final.tolist(), taken, stop, canvas.reach)
        sure = confidence(canvas.changes, stats, row, len(committed.tokens), canvas.pins)
        committed = replace(committed, **sure)
        if state.scoring:
            state.scoring.commit(self.runner, canvas.index, committed.tokens, hidden)
        return [committed, *self._end(state)]

    def _commit(
        self, state: State, canvas: int, tokens: Sequence[int], steps: int, stop: str, reach: int = 0
    ) -> Committed:
        """Make tokens final: cut at the first end token from place `reach` on (it stays) and at the budget."""
        kept, ended = finalise(tokens[reach:], state.config.stop_tokens)
        kept = (*tokens[:reach], *kept)
        if len(kept) > state.room:
            kept, ended = kept[: state.room], False
        state.ids.extend(kept)
        state.counts.update(kept)
        state.commits += 1
        if ended or not state.room:
            state.ending = "stop" if ended else "length"
        return Committed(state.id, canvas, kept, steps, stop)

    def _end(self, state: State) -> list[Event]:
        """The last event, if the answer is complete and its log-probabilities, where asked for, are told."""
        owed = state.scoring is not None and state.scoring.owed
        return [self._finish(state, state.ending)] if state.ending and not owed else []

    def _finish(self, state: State, reason: str) -> Finished:
        del self._running[state.id]
        self._kv_reserved -= state.kv_bytes
        return Finished(
            request=state.id,
            reason=reason,
            prompt_tokens=len(state.request.prompt),
            cached_tokens=state.cached_tokens,
            completion_tokens=state.completion,
            steps=tuple(state.steps),
            encode_passes=state.encode_passes,
            accepted=tuple(state.drafting.accepted) if state.drafting else (),
        )


def _most_tokens(request: Request) -> int:
    """Tokens that its cache may hold: no canvas is encoded before it is cut to the budget."""
    return len(request.prompt) + request.config.max_new_tokens


def _draws_next(state: State) -> bool:
    return state.config.mode != "diffusion" and state.pending <= 0


def _draft(state: State, stats: Stats, step: Step, row: int, temperature: float) -> Draft:
    """The event of the step just taken; steps are counted up from 1 here, for people."""
    canvas = state.canvas
    assert canvas is not None
    lead, width, total = canvas.lead, canvas.width, state.config.max_denoising_steps
    return Draft(
        request=state.id,
        canvas=canvas.index,
        step=total - canvas.step,
        max_steps=total,
        temperature=temperature,
        tokens=tuple(stats.argmax[row, lead:width].tolist()),
        canvas_tokens=tuple(step.canvas[lead:].tolist()),
        accepted=tuple(step.accepted[lead:].tolist()),
        entropy=tuple(stats.entropy[row, lead:width].tolist()),
        states=canvas.states,
    )
