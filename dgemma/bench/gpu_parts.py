"""What the GPU benchmark measures, one function a number or two; each takes a model and gives plain data.

Knows nothing of files, order and time limits: those are `gpu`'s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.bench.gpu_roof import Ceilings
from dgemma.bench.machine import synchronise
from dgemma.bench.parts import ALL_PARTS, Stopwatch, watching
from dgemma.bench.runs import Ours, Side
from dgemma.config import EngineConfig, GenerationConfig
from dgemma.engine import Engine, Request
from dgemma.engine.runner import Draws, Runner
from dgemma.errors import DgemmaError
from dgemma.events import Committed, Event
from dgemma.kernels.scaled import E4M3, product
from dgemma.model import DiffusionGemma

_ENGINE = EngineConfig(prefix_cache_tokens=0)


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and every value."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "all": list(seconds)}


def measure_ceilings(device: torch.device, tiny: bool) -> tuple[Ceilings, dict[str, Any]]:
    """Copy bandwidth and matmul rates; seven timings of each, the median is the ceiling."""
    count, size = (1 << 18, 64) if tiny else (1 << 30, 8192)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = timings(lambda: target.copy_(source), device, 1 if tiny else 10)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Callable[[], object]] = {"bf16": lambda: torch.mm(a, b.t(), out=out)}
    codes = tuple((x.float().to(E4M3), torch.ones(size, device=device)) for x in (a, b))
    calls["fp8"] = lambda: product(codes[0], codes[1])
    facts: dict[str, Any] = {"copy": {"bytes_per_second": 2 * count / statistics.median(copies), **spread(copies)}}
    rates = {}
    for kind, call in calls.items():
        try:
            seconds = timings(call, device, 1 if tiny else 10)
        except RuntimeError as error:  # an older device has no product of e4m3 with such scales
            facts[kind] = {"missing": str(error).splitlines()[0]}
            continue
        rates[kind] = 2.0 * size**3 / statistics.median(seconds)
        facts[kind] = {"flops_per_second": rates[kind], "size": size, **spread(seconds)}
    return Ceilings(bandwidth=facts["copy"]["bytes_per_second"], rates=rates), facts


def timings(call: Callable[[], object], device: torch.device, inner: int, count: int = 7) -> list[float]:
    """Seconds of one call, `count` times the mean of `inner`."""
    call()
    seconds = []
    for _ in range(count):
        synchronise(device)
        begun = time.perf_counter()
        for _ in range(inner):
            call()
        synchronise(device)
        seconds.append((time.perf_counter() - begun) / inner)
    return seconds


@torch.inference_mode()
def observe(model: DiffusionGemma, prompt: Sequence[int], canvas: Sequence[int], soft: Tensor | None) -> dict[str, Any]:
    """One encode pass and two steps on given canvases, the second with a given signal (None: its own), on the CPU.

    What is compared between formats and kernels is so fed the same at every step.
    """
    engine = Engine(model, _ENGINE)
    runner, cache = engine.runner, engine.new_cache()
    chunk, passes = engine.config.encode_chunk, []
    for begin in range(0, len(prompt), chunk):
        passes += runner.encode([(cache, prompt[begin : begin + chunk])])
    ids = torch.tensor(canvas, device=runner.device)
    draws = _draws(runner, len(canvas))
    first = runner.denoise([(cache, ids)], [None], draws)
    signal = first.soft if soft is None else soft.to(first.soft)
    second = runner.denoise([(cache, ids)], [signal], draws)
    found = {"encode": passes[-1], "step": first.hidden, "signal step": second.hidden, "soft": signal}
    stats = {"entropy": second.entropy, "argmax": second.argmax}
    return {name: tensor.float().cpu() for name, tensor in {**found, **stats}.items()}


def _draws(runner: Runner, rows: int) -> Draws:
    blocks = -(-runner.model.config.vocab_size // kernels.DRAW_BLOCK)
    device = runner.device
    return Draws(
        temperature=torch.full((rows,), 0.8, device=device),
        uniforms=torch.full((rows, blocks), 0.5, dtype=torch.float64, device=device),
        draw_temperature=torch.zeros(rows, device=device),
        top_k=None,
    )


def compare(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors of hidden states, agreement of the most likely tokens, mean difference of entropies."""
    out = {}
    for name in ("encode", "step", "signal step"):
        if not bool(got[name].isfinite().all()):
            raise DgemmaError(f"{name}: hidden states are not finite")
        out[f"relative error, {name}"] = float((got[name] - want[name]).norm() / want[name].norm())
    out["same argmax"] = float((got["argmax"] == want["argmax"]).float().mean())
    out["mean |dH|, nats"] = float((got["entropy"] - want["entropy"]).abs().mean())
    return out


def watch_parts(
    model: DiffusionGemma, prompt: Sequence[int], config: GenerationConfig, repeats: int
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step and of an encode pass by part, each waited for; medians of whole canvases."""
    engine = Engine(model, _ENGINE)
    watch = Stopwatch(lambda: synchronise(engine.runner.device))
    laps = []
    list(_answer(engine, prompt, config))
    with watching(engine, watch):
        for _ in range(repeats):
            before = engine.counters
            list(_answer(engine, prompt, config))
            after, lap = engine.counters, watch.lap()
            for name, done in (("denoise", "denoise_passes"), ("encode", "encode_passes")):
                count = getattr(after, done) - getattr(before, done)
                laps.append((name, {part: 1000 * lap.get((name, part), 0.0) / count for part in ALL_PARTS}))
    out: dict[str, dict[str, Any]] = {}
    for name in ("denoise", "encode"):
        values = [parts for kind, parts in laps if kind == name]
        parts = {part: statistics.median(value[part] for value in values) for part in ALL_PARTS}
        out[name] = {"ms": sum(parts.values()), "parts": {part: ms for part, ms in parts.items() if ms}}
    return out


def time_answers(
    side: Side, prompt: Sequence[int], config: GenerationConfig, canvases: int, repeats: int
) -> dict[str, Any]:
    """Wall clock of whole answers without the prompt's passes, one seed each; a run of other work is an error."""
    side.run(prompt, config.with_(max_denoising_steps=2))
    width = config.canvas_length or 0
    rates, seconds, steps = list[float](), list[float](), list[float]()
    for repeat in range(repeats):
        run = side.run(prompt, config.with_(seed=config.seed + repeat))
        wanted = (canvases * width, canvases * config.max_denoising_steps)
        if (run.tokens, run.denoise_passes) != wanted:
            raise DgemmaError(f"{side.name} wrote {run.tokens} tokens in {run.denoise_passes} steps, not {wanted}")
        seconds.append(run.seconds - run.prompt_seconds)
        rates.append(run.tokens / seconds[-1])
        steps += run.step_seconds
    return {
        "tokens_per_second": spread(rates),
        "seconds": spread(seconds),
        "ms_per_step": 1000 * statistics.median(steps) if steps else None,
        "passes": {"denoise": canvases * config.max_denoising_steps, "commit": run.later_encodes},
    }


def time_tokens(model: DiffusionGemma, prompt: Sequence[int], config: GenerationConfig, repeats: int) -> dict[str, Any]:
    """Autoregression on the same weights: tokens a second behind the encoded prompt."""
    side, rates = Ours(Engine(model, _ENGINE)), []
    side.run(prompt, config)
    for repeat in range(repeats):
        run = side.run(prompt, config.with_(seed=config.seed + repeat))
        # The first token comes with the prompt's pass, which is not in the time.
        rates.append((run.tokens - 1) / (run.seconds - run.prompt_seconds))
    return {"tokens_per_second": spread(rates), "tokens": run.tokens}


def check_work(
    model: DiffusionGemma, row: kernels.Row, prompt: Sequence[int], config: GenerationConfig, canvases: int
) -> dict[str, Any]:
    """That an answer is real work: its canvases change from what they began as, and how many experts a step hits.

    The numbers of experts are of every layer, least over the steps.
    """
    hits: list[int] = []
    plain = row.get("experts", kernels.reference.experts)
    width = config.canvas_length or 0

    def counted(x: Tensor, weights: Tensor, ids: Tensor, *more: Any) -> Tensor:
        if x.shape[0] == width:
            hits.append(int(ids.unique().numel()))
        out: Tensor = plain(x, weights, ids, *more)
        return out

    with kernels.use({**row, "experts": counted}):
        engine = Engine(model, replace(_ENGINE, graph_rows=0))  # a recorded step would count nothing
        events = list(_answer(engine, prompt, config))
    written = [event.tokens for event in events if isinstance(event, Committed)]
    if [len(tokens) for tokens in written] != [width] * canvases or len(set(map(tuple, written))) != canvases:
        raise DgemmaError(f"{len(set(map(tuple, written)))} different canvases of {[len(t) for t in written]} tokens")
    layers = model.config.num_layers
    by_layer = [min(hits[layer::layers]) for layer in range(layers)] if hits else []
    distinct = [len(set(tokens)) for tokens in written]
    return {"canvases": len(written), "distinct tokens": distinct, "experts hit, least by layer": by_layer}


def _answer(engine: Engine, prompt: Sequence[int], config: GenerationConfig) -> Iterator[Event]:
    engine.add(Request(prompt=tuple(prompt), config=config, reuse=False))
    while engine.has_work:
        yield from engine.tick()


def fixed_config(steps: int, canvases: int, width: int, seed: int) -> GenerationConfig:
    """Canvases of a fixed number of steps: no early stop, no end tokens."""
    return replace(
        GenerationConfig(), max_new_tokens=canvases * width, max_denoising_steps=steps, canvas_length=width,
        stability_threshold=None, confidence_threshold=None, stop_tokens=(), seed=seed,
    )  # fmt: skip
