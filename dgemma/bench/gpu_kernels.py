"""What each kernel of the GPU's row moves and computes in one denoising step, from formulas; nothing is measured.

Bytes are those that a kernel itself asks of memory: inputs once, outputs once, and every scratch that it writes or
reads, which a roofline of the whole step (`gpu_roof`) does not count. The time beside them is the larger of bytes and
FLOPs at two given rates. `python -m dgemma.bench.gpu_kernels` prints the table of `docs/gpu.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dgemma.bench.floor import Routing
from dgemma.bench.gpu_model import RELEASED
from dgemma.config import LayerConfig, ModelConfig

# How the kernels cut their work; `tests/test_gpu_kernels.py` compares these with them.
TILE, CHUNK, SHARES, KEYS_A_SHARE = 128, 32_768, 4, 640
_FLOAT, _DOUBLE = 4, 8
BANDWIDTH, RATE = 3.35e12, 989e12
"""Data sheet of an H100 SXM: bytes a second, and bfloat16 FLOPs a second."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """All launches of one kernel in a step. `ours`: Triton's; else torch's product."""

    name: str
    launches: int
    bytes: float
    flops: float = 0.0
    ours: bool = True

    def ms(self, bandwidth: float, rate: float) -> float:
        return 1000 * max(self.bytes / bandwidth, self.flops / rate)


def kernels_of(config: ModelConfig, prefix: int, rows: int, size: int) -> Iterator[Kernel]:
    """One step of one canvas of `rows` behind `prefix` tokens, weights and activations of `size` bytes."""
    hidden, layers = config.hidden_size, config.num_layers
    stream = float(size * rows * hidden)  # one reading or writing of the stream
    conditioning = [_product(rows, 2 * config.intermediate_size, hidden, size, 1)]
    conditioning += [_product(rows, hidden, config.intermediate_size, size, 1)]
    yield Kernel(name="rms_norm", launches=3, bytes=3 * 2 * stream)
    kinds = [(layer, config.layers.count(layer)) for layer in dict.fromkeys(config.layers)]
    yield _sum("q, k, v", [_product(rows, _packed(config, layer), hidden, size, n) for layer, n in kinds])
    yield Kernel(name="heads", launches=layers, bytes=sum(n * _heads(config, layer, rows, size) for layer, n in kinds))
    yield _attention(config, kinds, prefix, rows, size)
    outputs = [_product(rows, hidden, config.num_heads * layer.head_dim, size, n) for layer, n in kinds]
    yield _sum("attention's output", outputs)
    moe = config.num_experts > 0
    yield Kernel(name="middle", launches=layers, bytes=layers * (6 if moe else 4) * stream)
    gate_up = _product(rows, 2 * config.intermediate_size, hidden, size, layers)
    down = _product(rows, hidden, config.intermediate_size, size, layers)
    yield _sum("MLP, gate and up", [gate_up, conditioning[0]])
    inner = 3.0 * size * rows * config.intermediate_size
    yield Kernel(name="geglu", launches=layers + 1, bytes=(layers + 1) * inner)
    yield _sum("MLP, down", [down, conditioning[1]])
    if moe:
        yield _sum("router", [_product(rows, config.num_experts, hidden, size, layers)])
        chosen = rows * config.top_k_experts
        scores = rows * config.num_experts * size + chosen * (_FLOAT + _DOUBLE)
        yield Kernel(name="choose", launches=layers, bytes=float(layers * scores))
        yield _experts(config, rows, size)
    yield Kernel(name="close", launches=layers, bytes=layers * (5 if moe else 4) * stream)
    yield from _vocabulary(config, rows, size)


def table(config: ModelConfig, prefix: int, rows: int, size: int, bandwidth: float, rate: float) -> str:
    """Markdown: a line a kernel."""
    lines = [
        "| kernel | whose | launches | MB | GFLOP | ms at the ceilings | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    total = 0.0
    for kernel in kernels_of(config, prefix, rows, size):
        ms = kernel.ms(bandwidth, rate)
        total += ms
        by = "memory" if kernel.bytes / bandwidth >= kernel.flops / rate else "products"
        lines.append(
            f"| {kernel.name} | {'Triton' if kernel.ours else 'torch'} | {kernel.launches} | {kernel.bytes / 1e6:,.1f} "
            f"| {kernel.flops / 1e9:,.1f} | {ms:.3f} | {by} |"
        )
    launches = sum(kernel.launches for kernel in kernels_of(config, prefix, rows, size))
    return "\n".join([*lines, f"| sum | | {launches} | | | {total:.3f} | |"])


def _product(rows: int, outputs: int, inputs: int, size: int, count: int) -> Kernel:
    moved = size * (outputs * inputs + rows * (inputs + outputs))
    return Kernel(
        name="", launches=count, bytes=float(count * moved), flops=2.0 * count * rows * outputs * inputs, ours=False
    )


def _sum(name: str, parts: list[Kernel]) -> Kernel:
    return Kernel(
        name=name,
        launches=sum(part.launches for part in parts),
        bytes=sum(part.bytes for part in parts),
        flops=sum(part.flops for part in parts),
        ours=False,
    )


def _packed(config: ModelConfig, layer: LayerConfig) -> int:
    """Columns of the product of queries, keys and values; full layers have no values of their own."""
    return (config.num_heads + (1 if layer.kind == "full" else 2) * layer.num_kv_heads) * layer.head_dim


def _heads(config: ModelConfig, layer: LayerConfig, rows: int, size: int) -> float:
    written = (config.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    # Without values of their own the raw keys are read twice, the second time from the cache.
    return float(size * rows * (_packed(config, layer) + written + 2 * layer.head_dim))


def _attention(config: ModelConfig, kinds: list[tuple[LayerConfig, int]], prefix: int, rows: int, size: int) -> Kernel:
    launches, moved, flops = 0, 0.0, 0.0
    for layer, count in kinds:
        seen = prefix if layer.kind == "full" else min(prefix, config.sliding_window - 1)
        keys, queries = seen + rows, config.num_heads * layer.head_dim
        shares = -(-keys // KEYS_A_SHARE)
        once = size * (2 * rows * queries + 2 * keys * layer.num_kv_heads * layer.head_dim)
        if shares > 1:  # each share writes what the second launch reads
            once += 2 * shares * _FLOAT * rows * (queries + 2 * config.num_heads)
        launches += count * (2 if shares > 1 else 1)
        moved, flops = moved + count * once, flops + count * 4.0 * rows * keys * queries
    return Kernel(name="canvas_attention", launches=launches, bytes=moved, flops=flops)


def _experts(config: ModelConfig, rows: int, size: int) -> Kernel:
    """Weights of those that chance would hit, and what the slots write for each other."""
    hit, _ = Routing().of(config, rows)
    hidden, inner, slots = config.hidden_size, config.expert_size, rows * config.top_k_experts
    weights = size * hit * 3 * hidden * inner
    slots_moved = size * slots * (hidden + 2 * inner + 2 * hidden) + size * rows * hidden
    layers = config.num_layers
    return Kernel(
        name="experts",
        launches=4 * layers,
        bytes=float(layers * (weights + slots_moved)),
        flops=layers * 6.0 * slots * hidden * inner,
    )


def _vocabulary(config: ModelConfig, rows: int, size: int) -> Iterator[Kernel]:
    hidden, vocab = config.hidden_size, config.vocab_size
    chunks, tiles = -(-vocab // CHUNK), -(-vocab // TILE)
    embed, scratch, product = float(size * vocab * hidden), float(size * rows * vocab), 2.0 * rows * vocab * hidden
    statistics = 5.0 * _FLOAT * rows * tiles
    states = size * rows * hidden
    yield Kernel(
        name="vocab, logits",
        launches=chunks,
        bytes=embed + chunks * states + scratch + statistics,
        flops=product,
    )
    sums = SHARES * _FLOAT * rows * hidden
    yield Kernel(
        name="vocab, soft embedding",
        launches=chunks,
        bytes=embed + scratch + (2 * chunks - 1) * sums + statistics / 5,
        flops=product,
    )
    picked = rows * (TILE + 1) * hidden * size
    yield Kernel(name="vocab, draw", launches=1, bytes=statistics + picked, flops=2.0 * rows * TILE * hidden)
    yield Kernel(name="vocab, sum of shares", launches=1, bytes=float(sums + states))


def main() -> None:
    print(table(RELEASED, prefix=1024, rows=RELEASED.canvas_length, size=2, bandwidth=BANDWIDTH, rate=RATE))


if __name__ == "__main__":
    main()
