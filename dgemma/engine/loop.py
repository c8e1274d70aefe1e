"""The engine: requests in, events out, one tick at a time. A tick is at most one encode and one denoise pass, which
may be one and the same.

Batching is per step: canvases at different steps, of different widths, samplers and settings share a pass,
requests join and leave between ticks, and nobody waits for the slowest. One thread at a time may tick.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import count

import torch
from torch import Tensor

from dgemma.cache import KVCache, PrefixCounters, PrefixStore
from dgemma.config import EngineConfig
from dgemma.engine.batch import CanvasBatch
from dgemma.engine.chunks import Chunks
from dgemma.engine.commit import commit, conclude, draft
from dgemma.engine.drafting import Drafting
from dgemma.engine.graphs import CudaRecorder, Graphs, Record
from dgemma.engine.hooked import obey, step_view
from dgemma.engine.load import Load, Totals
from dgemma.engine.memory import Memory, most_tokens
from dgemma.engine.pace import Costs, Pace
from dgemma.engine.request import Request, State, validate
from dgemma.engine.runner import Counters, Prediction, Runner
from dgemma.engine.scheduler import plan_denoise, plan_encode, plan_shared, whole_chunk
from dgemma.engine.scoring import Scoring, score
from dgemma.engine.verified import by_draws, catch_up, judge, settle
from dgemma.errors import CapacityError, ConfigError, RequestError
from dgemma.events import Event, Finished, Scored
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
        record: Record | None = None,
    ) -> None:
        self.config, self.model_config = config, model.config
        self.runner = Runner(model)
        self.drafter = self.runner if drafter is None else Runner(drafter)
        sizes = model.config.vocab_size, self.drafter.model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ConfigError(f"a drafter needs the model's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}")
        self._memory = Memory(self.runner, self.drafter, config, prefixes, identity)
        self.prefixes = self._memory.prefixes
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, State] = {}
        self._next_id = 0
        self._turn = count(1)
        self.faults: dict[int, RequestError] = {}
        """Why requests were aborted whose hook failed; whoever ticks takes them out."""
        self._pace = Pace(Costs(config.canvas_cost))
        self._totals = Totals()
        record = record or (CudaRecorder() if self.runner.records else None)
        self.graphs: Graphs | None = None
        if record and config.graph_rows:
            self.graphs = Graphs(self.runner, config, self._memory, self._totals, record)
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
        self._admit()
        events = self._passes()
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
        return self._memory.need(request)

    def new_cache(self, most: int | None = None) -> KVCache:
        """An empty cache for the engine's model and, if given, at `most` that many tokens."""
        return self._memory.new_cache(most)

    def _snapshot(self) -> None:
        prefix = self.prefixes.counters
        self._load = Load(
            running=len(self._running),
            kv_reserved=self._memory.reserved,
            kv_limit=self.config.kv_bytes,
            prefix_tokens=self.prefixes.tokens,
            prefix_hits=prefix.hits,
            prefix_misses=prefix.misses,
            prefix_reused_tokens=prefix.reused_tokens,
            **asdict(self._totals),
            **asdict(self.counters),
        )

    def _admit(self) -> None:
        """Who waits becomes a running request. No one passes a large one that waits for room, or it would for ever."""
        while self._waiting and len(self._running) < self.config.max_batch_rows:
            if not self._memory.fits(self._waiting[0][1]):
                return
            number, request = self._waiting.popleft()
            lane = self.graphs.admit(number, request, most_tokens(request)) if self.graphs else None
            state = self._running[number] = self._memory.admit(number, request, next(self._turn), lane)
            if request.config.mode == "verified":
                # Drawn drafts shape the answer, which may depend neither on others nor on a clock.
                alone = by_draws(request.config)
                state.drafting = Drafting(Pace(Costs(self.config.canvas_cost or _CANVAS_COST)) if alone else self._pace)
            self._totals.admit(len(request.prompt))

    def _passes(self) -> list[Event]:
        """An encode and a denoise pass, or one for both where nothing of the second hangs on the end of the first; and
        recorded steps of the canvases that take those.
        """
        recorded = {
            number: state for number, state in self._running.items() if self.graphs and self.graphs.serves(state)
        }
        rest = [state for number, state in self._running.items() if number not in recorded]
        encoding = plan_encode(rest, self.config)
        for state in encoding:
            state.turn = next(self._turn)
        shared = plan_shared(rest, encoding, self.model_config, self.config) if encoding and self.config.fuse else []
        if shared:
            events = self._both(encoding, shared)
        else:
            events = self._timed("encode", lambda: self._encode(encoding))
            events += self._timed("denoise", lambda: self._denoise(rest))
        return events + self._replay([*recorded.values()], alone=not rest and not self._waiting)

    def _replay(self, states: Sequence[State], alone: bool) -> list[Event]:
        """Recorded steps of `states`, more than one if they are `alone`."""
        events: list[Event] = []
        for state, stats, step, stable in self.graphs.run(states, alone) if self.graphs else ():
            # Who needs hidden states takes no recorded steps.
            committed = conclude(state, stats, step, 0, stable, stats.entropy, self.runner, self.drafter)
            events += [committed, *self._end(state)] if committed else []
        return events

    def _both(self, encoding: Sequence[State], denoising: Sequence[State]) -> list[Event]:
        chunks, (batch, jobs) = self._chunks(encoding), self._canvases(self.runner, denoising)
        softs = [canvas.soft for canvas in batch.canvases]
        hidden, out = self.runner.both(chunks.jobs, jobs, softs, batch.draws())
        return [*self._encoded(chunks, hidden), *self._stepped(batch, jobs, out)]

    def _encode(self, states: Sequence[State]) -> list[Event]:
        if not states:
            return []
        chunks = self._chunks(states)
        return self._encoded(chunks, self.runner.encode(chunks.jobs))

    def _chunks(self, states: Sequence[State]) -> Chunks:
        self._totals.encode_rows += len(states)
        return Chunks(states, self.config, self.runner.invariant)

    def _encoded(self, chunks: Chunks, hidden: Sequence[Tensor]) -> list[Event]:
        """After a pass over `chunks`, of which `hidden` are the states of all parts."""
        events: list[Event] = []
        drawing, last = list[State](), list[Tensor]()
        for state, counts, rows in chunks.finish(hidden):
            begin = state.cache.length
            self._memory.advance(state, sum(counts))
            if state.scoring:
                events += self._score(state, state.scoring, begin, torch.cat(list(rows)))
            if _draws_next(state):
                drawing.append(state)
                last.append(rows[-1][-1 - len(state.drafted) :])
        return events + (self._extend(drawing, last) if drawing else [])

    def _score(self, state: State, scoring: Scoring, begin: int, hidden: Tensor) -> list[Event]:
        """Log-probabilities of what a pass encoded from position `begin` on, once its canvas is encoded to the end."""
        scoring.encode(self.runner, state.ids, begin, hidden)
        return [scoring.take(state.id), *self._end(state)] if scoring.owed and not state.pending else []

    def _extend(self, states: Sequence[State], last: Sequence[Tensor]) -> list[Event]:
        """What the encoder writes next, from the hidden states `[n + 1, H]` of a last token and n drafted ones."""
        events: list[Event] = []
        for state, verdict in zip(states, judge(self.runner, self.drafter, states, last), strict=True):
            number, asked, proposal = state.commits, state.request.logprobs, state.drafting and state.drafting.proposal
            steps, stop = (proposal.steps, proposal.stop) if proposal else (0, "ar")
            committed = commit(state, number, verdict.tokens, steps, stop)
            settle(state, committed.tokens, self.drafter.model.config, len(self._running))
            events.append(committed)
            if asked is not None:
                logits = torch.cat(verdict.logits)[: len(committed.tokens)]
                logprobs, tops = score(logits, committed.tokens, asked)
                events.append(Scored(state.id, number, tuple(logprobs), tuple(tops), ()))
            events += self._end(state)
        return events

    def _denoise(self, ready: Sequence[State]) -> list[Event]:
        left = [state for state in ready if state.id in self._running]  # an encode pass may have ended some
        states = plan_denoise(left, self.model_config, self.config)
        others = [state for state in states if state.draft_cache is not None]
        catch_up(self.drafter, others, whole_chunk(self.config))
        rest = [state for state in states if state.draft_cache is None]
        return (self._step(self.runner, rest) if rest else []) + (self._step(self.drafter, others) if others else [])

    def _step(self, runner: Runner, states: Sequence[State]) -> list[Event]:
        """A step of the canvases of `states`, all by the same model."""
        batch, jobs = self._canvases(runner, states)
        out = runner.denoise(jobs, [canvas.soft for canvas in batch.canvases], batch.draws())
        return self._stepped(batch, jobs, out)

    def _canvases(self, runner: Runner, states: Sequence[State]) -> tuple[CanvasBatch, list[tuple[KVCache, Tensor]]]:
        """The canvases that take a step, new ones begun, and what a pass gets of them."""
        self._totals.denoise_rows += len(states)
        for state in states:
            state.turn = next(self._turn)
            if state.canvas is None:
                state.start_canvas(runner.model.config, runner.device)
        batch = CanvasBatch(states, self.model_config.vocab_size, self.runner.device)
        return batch, [(_prefix(state), canvas.ids) for state, canvas in zip(states, batch.canvases, strict=True)]

    def _stepped(self, batch: CanvasBatch, jobs: Sequence[tuple[KVCache, Tensor]], out: Prediction) -> list[Event]:
        """After a pass over the canvases of `batch`."""
        stats, steps, stable = batch.finish(out)
        hidden = out.hidden.split(batch.widths)
        events: list[Event] = []
        for row, state in enumerate(batch.states):
            if state.control.hook is not None:
                try:
                    view = step_view(state, jobs[row][1], stats, steps[row], row, self.model_config.vocab_size)
                    steps[row], stable[row] = obey(state, view, steps[row], stable[row], self.runner)
                except RequestError as fault:
                    self.faults[state.id] = fault
                    events.append(self._finish(state, "abort"))
                    continue
            if state.request.watch:
                events.append(draft(state, stats, steps[row], row, float(batch.temperature[row])))
            committed = conclude(state, stats, steps[row], row, stable[row], hidden[row], self.runner, self.drafter)
            if committed:
                events += [committed, *self._end(state)]
        return events

    def _end(self, state: State) -> list[Event]:
        """The last event, if the answer is complete and its log-probabilities, where asked for, are told."""
        owed = state.scoring is not None and state.scoring.owed
        return [self._finish(state, state.ending)] if state.ending and not owed else []

    def _finish(self, state: State, reason: str) -> Finished:
        del self._running[state.id]
        if self.graphs:
            self.graphs.release(state.id)
        self._memory.release(state)
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


def _prefix(state: State) -> KVCache:
    """What the canvas of `state` sees: all tokens before it, also those that the very pass encodes."""
    canvas, cache = state.canvas, state.draft_cache or state.cache
    assert canvas is not None
    fresh = len(state.ids) - canvas.lead - cache.length
    return cache.ahead(fresh) if fresh > 0 else cache.before(cache.length + fresh)


def _draws_next(state: State) -> bool:
    return state.config.mode != "diffusion" and state.pending <= 0
