"""The roofline of a pass on a device: bytes and FLOPs of `floor`'s ops, at the weights' format.

time = sum over ops of max(bytes / copy bandwidth, FLOPs / matmul rate), both measured in the same run. What may stay
on the chip (activations between ops) counts as nothing, so a share of this roofline is never flattered by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dgemma.bench.floor import PARTS, Op, denoise_ops, encode_ops
from dgemma.bench.rates import Product
from dgemma.config import ModelConfig
from dgemma.quant import make_format

_SIZE = 2  # bytes of bfloat16


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device reached: bytes a second of a large copy, FLOPs a second of a large product by type."""

    bandwidth: float
    rates: Mapping[str, float]

    def seconds(self, op: Op, kind: str) -> float:
        """Of all repetitions of an op."""
        work = 0.0 if op.work is None else op.work.flops / self.rates.get(kind, self.rates["bf16"])
        return op.count * max(op.bytes / self.bandwidth, work)


@dataclass(frozen=True, kw_only=True)
class PartRoof:
    """One part of a pass."""

    gigabytes: float
    tflops: float
    ms: float


def roofs(ops: Iterable[Op], name: str | None, ceilings: Ceilings) -> dict[str, PartRoof]:
    """Bytes, FLOPs and time by part, with quantised weights in the format `name` (None: bfloat16)."""
    total = {part: PartRoof(gigabytes=0.0, tflops=0.0, ms=0.0) for part in PARTS}
    for op in stored(ops, name):
        before = total[op.part]
        kind = "fp8" if name == "fp8" and is_quantised(op) else "bf16"
        total[op.part] = PartRoof(
            gigabytes=before.gigabytes + op.count * op.bytes / 1e9,
            tflops=before.tflops + op.count * (op.work.flops if op.work else 0.0) / 1e12,
            ms=before.ms + 1000 * ceilings.seconds(op, kind),
        )
    return total


def stored(ops: Iterable[Op], name: str | None) -> Iterator[Op]:
    """The ops, with the bytes of quantised weights as the format lays them out."""
    for op in ops:
        if name is None or not is_quantised(op):
            yield op
            continue
        assert isinstance(op.work, Product)
        parts = make_format(name).layout((op.work.outputs, op.work.inputs)).values()
        yield replace(op, bytes=float(sum(part.dtype.itemsize * _count(part.shape) for part in parts)))


def is_quantised(op: Op) -> bool:
    """Whether an op multiplies by a weight that formats apply to: see `quant.sites`."""
    dense = op.part in ("projections", "mlp", "experts") or op.name.startswith("self-conditioning")
    return isinstance(op.work, Product) and dense and op.name != "router"


def step_roof(
    config: ModelConfig, name: str | None, ceilings: Ceilings, prefix: int, width: int
) -> dict[str, PartRoof]:
    """Of one denoising step."""
    return roofs(denoise_ops(config, prefix, [width], _SIZE), name, ceilings)


def shared_roof(
    config: ModelConfig, name: str | None, ceilings: Ceilings, prefix: int, width: int
) -> dict[str, PartRoof]:
    """Of a step that also encodes the canvas before its own: products with the same weights read them once."""
    clean = list(encode_ops(config, prefix, width, _SIZE))
    ops = []
    for op in denoise_ops(config, prefix + width, [width], _SIZE):
        twin = next((other for other in clean if _same_weights(op, other)), None)
        if twin is not None and isinstance(op.work, Product) and isinstance(twin.work, Product):
            clean.remove(twin)
            op = replace(op, work=replace(op.work, rows=op.work.rows + twin.work.rows))
        ops.append(op)
    return roofs([*ops, *clean], name, ceilings)


def _same_weights(left: Op, right: Op) -> bool:
    if not isinstance(left.work, Product) or not isinstance(right.work, Product):
        return False
    same = (left.part, left.name, left.count) == (right.part, right.name, right.count)
    return same and (left.work.outputs, left.work.inputs) == (right.work.outputs, right.work.inputs)


def encode_roof(
    config: ModelConfig, name: str | None, ceilings: Ceilings, prefix: int, rows: int, head: bool = False
) -> dict[str, PartRoof]:
    """Of one encode pass; with the product for the next token, if `head`."""
    ops = list(encode_ops(config, prefix, rows, _SIZE))
    if head:
        work = Product(1, config.vocab_size, config.hidden_size)
        ops.append(Op(part="vocabulary", name="head", work=work, bytes=float(_SIZE * work.outputs * work.inputs)))
    return roofs(ops, name, ceilings)


def answer_ms(
    config: ModelConfig, name: str | None, ceilings: Ceilings, prompt: int, canvases: int, width: int, steps: int
) -> float:
    """Of canvases one after the other behind an encoded prompt. The first step of each also commits the one before."""
    total = 0.0
    for canvas in range(canvases):
        prefix = prompt + canvas * width
        step = milliseconds(step_roof(config, name, ceilings, prefix, width))
        first = milliseconds(shared_roof(config, name, ceilings, prefix - width, width)) if canvas else step
        total += first + (steps - 1) * step
    return total


def milliseconds(parts: Mapping[str, PartRoof]) -> float:
    return sum(part.ms for part in parts.values())


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
