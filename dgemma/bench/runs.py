"""One timed answer of one side, and our side. Passes are counted where they happen, on both sides."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from dgemma.bench.machine import Memory, MemoryMeter, synchronise
from dgemma.cache import KVCache
from dgemma.config import GenerationConfig
from dgemma.engine import Engine, Request, Runner
from dgemma.events import Committed
from dgemma.model import DiffusionGemma
from dgemma.model.layers import Linear
from dgemma.model.moe import Experts


@dataclass(frozen=True, kw_only=True)
class Run:
    """One answer, from ids to ids.

    `step_seconds` are of whole denoising steps, sampler and stop rule included, without the first of each canvas:
    that one has no self-conditioning, and starts the canvas. `later_encodes` are encode passes after the prompt's, also
    those that are a denoise pass as well.
    `cpu_seconds` is the process's time on all cores, which other programs disturb less than `seconds`.
    """

    prompt_tokens: int
    tokens: int
    seconds: float
    cpu_seconds: float
    prompt_seconds: float
    step_seconds: tuple[float, ...]
    denoise_passes: int
    later_encodes: int
    canvases: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        """As `dgemma.api.Generation` counts: the prompt's pass only where it gives the first token (mode "ar")."""
        return self.tokens / (self.denoise_passes + self.later_encodes + (self.denoise_passes == 0))


class Side(Protocol):
    """A system under measurement."""

    name: str

    def run(self, prompt: Sequence[int], config: GenerationConfig) -> Run:
        """Answer one prompt, timed."""

    def rehearse(self, prompt: Sequence[int], config: GenerationConfig) -> Memory:
        """The same, for the memory that it takes."""

    def encode(self, prompt: Sequence[int]) -> Tensor:
        """Hidden states `[T, H]` of the causal pass, on the CPU: shows that both sides are one model."""


class Ours:
    """dgemma's engine, ticked in the caller's thread, with a stopwatch on its encode passes while it runs.

    The prompt is timed apart, so none of its passes is shared with a step (`EngineConfig.fuse`); later ones are.
    """

    name = "dgemma"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, prompt: Sequence[int], config: GenerationConfig) -> Run:
        usual = self._engine.config
        try:
            with _EncodeClock(self._engine.runner) as clock:
                return self._run(prompt, config, clock)
        finally:
            self._engine.config = usual

    def _run(self, prompt: Sequence[int], config: GenerationConfig, clock: _EncodeClock) -> Run:
        engine = self._engine
        tokens, canvases, steps = 0, 0, list[float]()
        before_all, usual, first = engine.counters, engine.config, True
        cpu, begun = time.process_time(), time.perf_counter()
        now = begun
        engine.add(Request(prompt=tuple(prompt), config=config, reuse=False))
        while engine.has_work:
            engine.config = replace(usual, fuse=usual.fuse and clock.tokens >= len(prompt))
            passes, stepped = len(clock.passes), engine.counters.denoise_passes
            events = engine.tick()
            before, now = now, time.perf_counter()
            if taken := engine.counters.denoise_passes - stepped:  # several where they are recorded
                encoding = sum(seconds for _, seconds in clock.passes[passes:])
                if not first:
                    steps += [(now - before - encoding) / taken] * taken
                first = False
            for event in events:
                if isinstance(event, Committed):
                    tokens, canvases, first = tokens + len(event.tokens), canvases + 1, True
        cpu = time.process_time() - cpu
        prompt_passes = clock.passes_for(len(prompt))
        denoised = engine.counters.denoise_passes - before_all.denoise_passes
        shared = engine.counters.shared_passes - before_all.shared_passes
        return Run(
            prompt_tokens=len(prompt),
            tokens=tokens,
            seconds=now - begun,
            cpu_seconds=cpu,
            prompt_seconds=sum(seconds for _, seconds in clock.passes[:prompt_passes]),
            step_seconds=tuple(steps),
            denoise_passes=denoised,
            later_encodes=len(clock.passes) - prompt_passes + shared,
            canvases=canvases if denoised else 0,
        )

    def rehearse(self, prompt: Sequence[int], config: GenerationConfig) -> Memory:
        return metered(self, prompt, config)

    def encode(self, prompt: Sequence[int]) -> Tensor:
        (hidden,) = self._engine.runner.encode([(self._engine.new_cache(), prompt)])
        return hidden.float().cpu()


class _EncodeClock:
    """Remembers tokens and seconds of every encode pass of a runner, until it is left."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.passes: list[tuple[int, float]] = []

    def __enter__(self) -> _EncodeClock:
        encode, device = self._runner.encode, self._runner.device

        def timed(jobs: Sequence[tuple[KVCache, Sequence[int]]]) -> list[Tensor]:
            begun = time.perf_counter()
            hidden = encode(jobs)
            synchronise(device)
            self.passes.append((sum(len(ids) for _, ids in jobs), time.perf_counter() - begun))
            return hidden

        vars(self._runner)["encode"] = timed
        return self

    def __exit__(self, *error: object) -> None:
        del vars(self._runner)["encode"]

    @property
    def tokens(self) -> int:
        return sum(size for size, _ in self.passes)

    def passes_for(self, tokens: int) -> int:
        """How many of the passes it took to encode the first `tokens`."""
        done = 0
        for count, (size, _) in enumerate(self.passes, start=1):
            done += size
            if done >= tokens:
                return count
        return len(self.passes)


def metered(side: Side, prompt: Sequence[int], config: GenerationConfig) -> Memory:
    """Memory of this process while one of its sides runs."""
    meter = MemoryMeter()
    side.run(prompt, config)
    return meter.stop()


def weight_bytes(model: DiffusionGemma) -> int:
    """Bytes of a model's weights as it keeps them, packed or quantised ones included."""
    total = sum(weight.nbytes for weight in model.parameters())
    for module in model.modules():
        if isinstance(module, Linear) and module.matrix is not None:
            total += module.matrix.nbytes
        if isinstance(module, Experts) and module.matrices is not None:
            total += sum(matrix.nbytes for group in module.matrices for matrix in group)
    return total
