"""Whole steps recorded once and replayed: on a GPU at batch 1, launching a step's kernels one by one takes longer than
running them.

A request whose canvases ask for nothing special gets a *lane*: a cache that stays where it is, so that a recorded step
finds it. Its prompt, and the first step with that, take the ordinary path; all steps after that are replays, those that
encode the canvas before them in the same pass, too. All other requests (drafts to watch, hooks, constraints,
log-probabilities, other modes, answers longer than a lane) and canvases (pins, biases, top-k, top-p) take the ordinary
path throughout, in the same ticks. Both give the same answers.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dgemma.cache import KVCache
from dgemma.config import EngineConfig
from dgemma.diffusion.protocol import Stats, Step
from dgemma.engine.load import Totals
from dgemma.engine.memory import Memory
from dgemma.engine.request import Canvas, Request, State
from dgemma.engine.resident import Resident
from dgemma.engine.runner import Runner
from dgemma.engine.scheduler import chunk
from dgemma.engine.shapes import shapes

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Turns launches that are always the same into something that launches them again."""

_SHORTEST = 1024  # tokens: a recording serves all prefixes up to a power of two, this one at least
_BURST = 8  # steps a tick, where nobody else waits for a turn


class CudaRecorder:
    """Makes CUDA graphs. What they read and write must stay where it is; what they need besides, they share."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        now, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels, which a recording may not
                run()
        now.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        replay: Replay = graph.replay
        return replay


class _Kind(NamedTuple):
    """Canvases that share tensors, and so recordings."""

    width: int
    sampler: str


@dataclass
class _Seat:
    """A canvas in its lane, and how many steps it has left at most."""

    state: State
    canvas: Canvas
    kind: _Kind
    resident: Resident
    left: int

    def may_be_done(self) -> bool:
        """Whether a canvas may have ended by now. Before a prediction can have been stable, nobody needs to look."""
        config = self.state.config
        if self.left <= 0 or config.stability_threshold is None or config.confidence_threshold is None:
            return self.left <= 0
        still = 0 if config.convention == "jax" else config.stability_threshold
        return config.max_denoising_steps - self.left > still


class Graphs:
    """The lanes of an engine, and the recordings of their steps."""

    def __init__(self, runner: Runner, config: EngineConfig, memory: Memory, totals: Totals, record: Record) -> None:
        self._runner, self._config, self._memory, self._totals = runner, config, memory, totals
        self._record, self._ahead = record, config.graph_ahead
        self._tokens = min(config.graph_tokens, runner.model.config.max_positions)
        self._lanes = [memory.new_cache(self._tokens) for _ in range(config.graph_rows)]
        self._owners: list[int | None] = [None] * len(self._lanes)
        self._seats: dict[int, _Seat] = {}
        self._residents: dict[_Kind, Resident] = {}
        self._replays: dict[tuple[_Kind, int, int, int, int], Replay] = {}
        self._watches = [_Watch(len(self._lanes), runner.device) for _ in range(config.graph_ahead + 1)]
        self.replayed = 0
        """Steps that were replays, of one canvas or of several."""

    def admit(self, number: int, request: Request, tokens: int) -> KVCache | None:
        """The cache of a lane, for a request that may use one, if one is free and as long as `tokens`."""
        control = request.control
        special = request.watch or request.logprobs is not None or (control.hook or control.constraint) is not None
        if request.config.mode != "diffusion" or special or tokens > self._tokens or None not in self._owners:
            return None
        lane = self._owners.index(None)
        self._owners[lane] = number
        self._lanes[lane].reserve(self._tokens)
        return self._lanes[lane]

    def release(self, number: int) -> None:
        """The request is gone."""
        if number in self._owners:
            lane = self._owners.index(number)
            self._owners[lane] = None
            self._lanes[lane].clear()
            if lane in self._seats:
                self._seats.pop(lane).resident.free(lane)

    def serves(self, state: State) -> bool:
        """Whether the request takes its next step here. If it is a canvas's first, the canvas is begun."""
        if state.id not in self._owners or state.config.top_k:
            return False
        model, device = self._runner.model.config, self._runner.device
        canvas = state.canvas
        if canvas is None:
            whole = chunk(state, self._config) == state.pending
            room = self._config.max_batch_tokens - state.pending - state.next_width(model)
            if not (state.commits and self._config.fuse and whole and room >= 0):
                return False
            canvas = state.start_canvas(model, device)
        return not (canvas.pins or shapes(state, model.vocab_size, device))

    def run(self, states: Sequence[State], patient: bool) -> Iterator[tuple[State, Stats, Step, bool]]:
        """Replay steps of `states`: until a canvas is done if `patient` (up to a limit), else one or two.

        Gives those that are done: their stats `[1, C]`, their step, and whether the stop rule ended them.
        """
        groups: dict[_Kind, list[int]] = {}
        for state in states:
            lane = self._owners.index(state.id)
            done = lane not in self._seats and self._sit(lane, state)
            if done:
                yield self._rise(lane)
            else:
                groups.setdefault(self._seats[lane].kind, []).append(lane)
        for kind, lanes in groups.items():
            for lane in self._replayed(kind, lanes, _BURST if patient and len(groups) == 1 else 1):
                yield self._rise(lane)

    def _sit(self, lane: int, state: State) -> bool:
        """Put the canvas of `state` into its lane. If tokens before it are not encoded, that is done with its first
        step; whether that was its last one, too.
        """
        canvas = state.canvas
        assert canvas is not None
        kind = _Kind(canvas.width, state.config.sampler)
        if kind not in self._residents:
            self._residents[kind] = Resident(self._runner, self._lanes, *kind)
        resident = self._residents[kind]
        resident.load(lane, state)
        seat = self._seats[lane] = _Seat(state, canvas, kind, resident, canvas.step)
        if not state.pending:
            return False
        clean = state.pending
        self._replay(kind, slice(lane, lane + 1), len(state.ids), clean)()
        state.encode_passes += 1
        self._totals.encode_rows += 1
        self._took([seat], clean)
        self._memory.advance(state, clean)
        return seat.may_be_done() and self._watches[0].look(resident.slots.done).wait()[lane]

    def _rise(self, lane: int) -> tuple[State, Stats, Step, bool]:
        seat = self._seats.pop(lane)
        return seat.state, *seat.resident.take(lane, seat.canvas)

    def _replayed(self, kind: _Kind, lanes: Sequence[int], steps: int) -> list[int]:
        """Take up to so many steps, no more than `graph_ahead` beyond the first canvas that is done; who is."""
        resident, seats = self._residents[kind], [self._seats[lane] for lane in lanes]
        rows = min(len(self._lanes), 1 << max(lanes).bit_length())
        replay = self._replay(kind, slice(0, rows), max(seat.state.cache.length for seat in seats))
        looking: deque[_Watch] = deque()
        done: list[bool] = []
        while steps and not any(done) and all(seat.left > 0 for seat in seats):
            replay()
            steps -= 1
            self._took(seats)
            if any(seat.may_be_done() for seat in seats):
                looking.append(self._watches[self.replayed % len(self._watches)].look(resident.slots.done))
                if len(looking) > self._ahead:
                    done = looking.popleft().wait()
        for watch in looking:
            done = watch.wait()
        return [lane for lane in lanes if done and done[lane]]

    def _took(self, seats: Iterable[_Seat], clean: int = 0) -> None:
        """A step of all of these, with which so many tokens were encoded."""
        tokens = 0
        for seat in seats:
            seat.left -= 1
            tokens += seat.kind.width
            self._totals.denoise_rows += 1
        self.replayed += 1
        self._runner.count_step(tokens, clean)

    def _replay(self, kind: _Kind, rows: slice, length: int, clean: int = 0) -> Replay:
        """The recording for `rows` and prefixes up to `length`; made when it is first asked for."""
        most = min(self._tokens, max(_SHORTEST, 1 << max(0, length - 1).bit_length()))
        key = kind, rows.start, rows.stop, most, clean
        if key not in self._replays:
            resident = self._residents[kind]
            step = partial(resident.step, rows, most, clean)
            with resident.frozen():
                try:
                    self._replays[key] = self._record(step)
                except RuntimeError as error:
                    warnings.warn(f"this model's steps cannot be recorded and run one by one: {error}", stacklevel=2)
                    self._replays[key] = step
        return self._replays[key]


class _Watch:
    """A copy of the flags on the host, made when the device gets there, and waited for when they are needed."""

    def __init__(self, rows: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._flags = torch.zeros(rows, dtype=torch.bool, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None

    def look(self, done: Tensor) -> _Watch:
        self._flags.copy_(done, non_blocking=True)
        if self._event:
            self._event.record()
        return self

    def wait(self) -> list[bool]:
        if self._event:
            self._event.synchronize()
        flags: list[bool] = self._flags.tolist()
        return flags
