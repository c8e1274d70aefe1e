"""The floor of a pass on this machine: every op at the best rate that torch's own primitives reach at its shape.

floor = sum over ops of max(FLOPs / best rate at that shape and type, bytes / bandwidth), all measured in this run.
What an op must do is counted from the model's configuration; `docs/speed.md` says what is and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dgemma.bench.rates import Core, Product, Rates
from dgemma.config import LayerConfig, ModelConfig

PARTS = ("embedding", "projections", "attention", "mlp", "experts", "norms", "vocabulary")
"""Parts of a pass, as the benchmark of kernels names them too."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """`count` times the same work. `bytes` must come from memory once each time; `near` bytes move in the cache."""

    part: str
    name: str
    count: int = 1
    work: Product | Core | None = None
    bytes: float = 0.0
    near: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One op of a floor, all its repetitions together. `by` is the primitive that was best, or what else bounds it."""

    part: str
    name: str
    shape: str
    count: int
    gflops: float
    megabytes: float
    gflops_per_second: float | None
    ms: float
    by: str


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Milliseconds that a pass must take, and why. Bandwidths in GB/s."""

    rows: int
    prefix: int
    threads: int
    dtype: str
    bandwidth: float
    lines: tuple[Line, ...]

    @property
    def ms(self) -> float:
        return sum(line.ms for line in self.lines)

    @property
    def parts(self) -> dict[str, float]:
        """Milliseconds of each part."""
        return {part: sum(line.ms for line in self.lines if line.part == part) for part in PARTS}

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "ms": self.ms, "parts": self.parts}


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How many experts of a layer get rows, on average; None: as many as chance would choose."""

    hit: float | None = None

    def of(self, config: ModelConfig, rows: int) -> tuple[int, int]:
        """Experts that are hit, and rows of each, both rounded."""
        experts, chosen = config.num_experts, config.top_k_experts
        hit = self.hit or experts * (1 - (1 - chosen / experts) ** rows)
        hit = max(1, min(experts, round(hit)))
        return hit, max(1, round(rows * chosen / hit))


_CHANCE = Routing()


def denoise_ops(
    config: ModelConfig, prefix: int, widths: Sequence[int], size: int, routing: Routing = _CHANCE
) -> Iterator[Op]:
    """What one denoising step of canvases of `widths` must do, each behind `prefix` clean tokens.

    `size` is bytes an element.
    """
    rows, hidden, vocab = sum(widths), config.hidden_size, config.vocab_size
    yield Op(part="embedding", name="rows of the embedding", bytes=size * rows * hidden)
    yield from _gated("embedding", "self-conditioning", config, rows, size)
    for layer, count in _alike(config):
        seen = prefix if layer.kind == "full" else min(prefix, config.sliding_window - 1)
        cores = [Core(w, seen + w, config.num_heads, layer.num_kv_heads, layer.head_dim) for w in widths]
        yield from _layer(config, layer, count, cores, [seen] * len(widths), size)
    yield from _shared(config, rows, size, routing)
    yield Op(part="norms", name="norms and residuals of self-conditioning", near=size * 4.0 * rows * hidden)
    # One sweep over the vocabulary serves both products, so the embedding must be read once.
    head = Product(rows, vocab, hidden)
    yield Op(part="vocabulary", name="head", work=head, bytes=float(size * vocab * hidden))
    yield Op(part="vocabulary", name="soft embedding", work=Product(rows, hidden, vocab, turned=True))


def encode_ops(config: ModelConfig, prefix: int, rows: int, size: int, routing: Routing = _CHANCE) -> Iterator[Op]:
    """What encoding `rows` tokens behind `prefix` cached ones must do."""
    yield Op(part="embedding", name="rows of the embedding", bytes=float(size * rows * config.hidden_size))
    for layer, count in _alike(config):
        window = None if layer.kind == "full" else config.sliding_window
        seen = prefix if window is None else min(prefix, window - 1)
        core = Core(rows, seen + rows, config.num_heads, layer.num_kv_heads, layer.head_dim, True, window)
        yield from _layer(config, layer, count, [core], [seen], size)
    yield from _shared(config, rows, size, routing)


def measure_floor(ops: Iterable[Op], rates: Rates, rows: int, prefix: int) -> Floor:
    """The floor of `ops`, with whatever rate is not known yet measured now."""
    memory = rates.bandwidth()
    return Floor(
        rows=rows,
        prefix=prefix,
        threads=rates.threads,
        dtype=str(rates.dtype).removeprefix("torch."),
        bandwidth=memory / 1e9,
        lines=tuple(_line(op, rates, memory) for op in ops),
    )


def _line(op: Op, rates: Rates, memory: float) -> Line:
    seconds, by, rate = op.bytes / memory, "memory", None
    if op.near:
        seconds, by = op.near / rates.bandwidth(int(op.near)), "cache"
    if op.work is not None:
        timing = rates.time(op.work)
        rate = op.work.flops / timing.seconds
        # FLOPs / rate is the time itself: the rate was taken at this very shape.
        if timing.seconds >= seconds:
            seconds, by = timing.seconds, timing.by
    return Line(
        part=op.part,
        name=op.name,
        shape=_shape(op.work),
        count=op.count,
        gflops=op.count * (op.work.flops if op.work else 0.0) / 1e9,
        megabytes=op.count * (op.bytes + op.near) / 1e6,
        gflops_per_second=None if rate is None else rate / 1e9,
        ms=1000 * op.count * seconds,
        by=by,
    )


def _shape(work: Product | Core | None) -> str:
    if isinstance(work, Product):
        return f"{work.rows} x {work.outputs} x {work.inputs}"
    if isinstance(work, Core):
        return f"{work.heads}/{work.kv_heads} heads x {work.dim}, {work.queries} x {work.keys}"
    return ""


def _alike(config: ModelConfig) -> list[tuple[LayerConfig, int]]:
    """The different layers, and how many there are of each."""
    return [(layer, config.layers.count(layer)) for layer in dict.fromkeys(config.layers)]


def _layer(
    config: ModelConfig, layer: LayerConfig, count: int, cores: Sequence[Core], seen: Sequence[int], size: int
) -> Iterator[Op]:
    rows, hidden = sum(core.queries for core in cores), config.hidden_size
    queries, keys = config.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    # Full layers have no v projection. One product for all of q, k, v is what a careful engine does.
    fused = Product(rows, queries + (1 if layer.kind == "full" else 2) * keys, hidden)
    out = Product(rows, hidden, queries)
    kind = f"{layer.kind} layers"
    yield Op(part="projections", name=f"q, k, v of {kind}", count=count, work=fused, bytes=_weight(fused, size))
    yield Op(part="projections", name=f"output of {kind}", count=count, work=out, bytes=_weight(out, size))
    for core in dict.fromkeys(cores):
        stored = float(size * 2 * keys * seen[cores.index(core)])
        times = count * list(cores).count(core)
        yield Op(part="attention", name=f"scores and mixing of {kind}", count=times, work=core, bytes=stored)


def _shared(config: ModelConfig, rows: int, size: int, routing: Routing) -> Iterator[Op]:
    """What all layers have alike."""
    layers, hidden = config.num_layers, config.hidden_size
    yield from _gated("mlp", "dense MLP", config, rows, size, layers)
    if config.num_experts:
        router = Product(rows, config.num_experts, hidden)
        yield Op(part="experts", name="router", count=layers, work=router, bytes=_weight(router, size))
        hit, each = routing.of(config, rows)
        for name, product in (
            ("experts, gate and up", Product(each, 2 * config.expert_size, hidden)),
            ("experts, down", Product(each, hidden, config.expert_size)),
        ):
            yield Op(part="experts", name=name, count=layers * hit, work=product, bytes=_weight(product, size))
    # The stream is read and written once by attention and once by the rest: norms and residuals ride along.
    yield Op(part="norms", name="norms and residuals", count=layers, near=size * 4.0 * rows * hidden)


def _gated(part: str, name: str, config: ModelConfig, rows: int, size: int, count: int = 1) -> Iterator[Op]:
    both = Product(rows, 2 * config.intermediate_size, config.hidden_size)
    down = Product(rows, config.hidden_size, config.intermediate_size)
    yield Op(part=part, name=f"{name}, gate and up", count=count, work=both, bytes=_weight(both, size))
    yield Op(part=part, name=f"{name}, down", count=count, work=down, bytes=_weight(down, size))


def _weight(product: Product, size: int) -> float:
    return float(size * product.outputs * product.inputs)


def step_floor(
    config: ModelConfig, rates: Rates, prefix: int, widths: Sequence[int], routing: Routing = _CHANCE
) -> Floor:
    """The floor of a denoising step, at the rates' type."""
    ops = denoise_ops(config, prefix, widths, _size(rates.dtype), routing)
    return measure_floor(ops, rates, sum(widths), prefix)


def encode_floor(config: ModelConfig, rates: Rates, prefix: int, rows: int, routing: Routing = _CHANCE) -> Floor:
    """The floor of an encode pass, at the rates' type."""
    return measure_floor(encode_ops(config, prefix, rows, _size(rates.dtype), routing), rates, rows, prefix)


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize
