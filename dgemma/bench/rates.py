"""The best times that torch's own primitives reach on this machine, measured here and now: products, attention, memory.

Knows shapes and types, no model. Every number is the best candidate's median; `docs/speed.md` has the definitions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from dgemma.bench.machine import synchronise
from dgemma.kernels.packed import has_bfloat16

Call = Callable[[], object]
CHUNK = 8192
"""Outputs (inputs if turned) beyond which a product is also tried in pieces, as a sweep over a vocabulary makes it."""
_WHOLE = 2**25  # weight elements up to which a product is tried in one piece


@dataclass(frozen=True)
class Product:
    """`x [rows, inputs] -> [rows, outputs]`; the weight is stored as `[outputs, inputs]`, if turned the other way."""

    rows: int
    outputs: int
    inputs: int
    turned: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.outputs * self.inputs

    @property
    def pieces(self) -> float:
        """How many products of at most `CHUNK` outputs (inputs if turned) it is."""
        return max(1.0, (self.inputs if self.turned else self.outputs) / CHUNK)

    def piece(self) -> Product:
        if self.turned:
            return Product(self.rows, self.outputs, min(self.inputs, CHUNK), True)
        return Product(self.rows, min(self.outputs, CHUNK), self.inputs)


@dataclass(frozen=True)
class Core:
    """Attention between its projections: `queries` of `heads` heads over `keys` of `kv_heads`, head size `dim`.

    `causal`: the queries are the last positions, and see what is not behind them; with a `window`, so many of it.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    causal: bool = False
    window: int | None = None

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head that may meet."""
        if not self.causal:
            return self.queries * self.keys
        seen = range(self.keys - self.queries + 1, self.keys + 1)
        return sum(seen) if self.window is None else sum(min(count, self.window) for count in seen)

    @property
    def flops(self) -> float:
        """Of the two products alone."""
        return 4.0 * self.heads * self.dim * self.pairs

    def mask(self, device: torch.device) -> Tensor | None:
        if not self.causal or self.queries == 1:
            return None
        q = torch.arange(self.keys - self.queries, self.keys, device=device)[:, None]
        k = torch.arange(self.keys, device=device)
        return (k <= q) if self.window is None else (k <= q) & (k > q - self.window)


@dataclass(frozen=True)
class Timing:
    """Seconds of the best candidate, and which one that was."""

    seconds: float
    by: str


class Rates:
    """Measures on demand and remembers. `again` measures all a second time and keeps the better of both."""

    seconds = 0.06
    """How long each candidate runs, and at least `least` times."""
    least = 5
    buffer = 256_000_000
    """Bytes that are read and copied for the bandwidth."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.threads = device, dtype, torch.get_num_threads()
        self._known: dict[Product | Core | int, Timing] = {}

    def time(self, what: Product | Core) -> Timing:
        """Of one product, or of one attention core."""
        return self._lookup(what)

    def bandwidth(self, size: int | None = None) -> float:
        """Bytes a second of a large read or copy; of a copy of `size` bytes (which a cache may hold) if given."""
        size = self.buffer if size is None else size
        return size / self._lookup(size).seconds

    def again(self) -> None:
        for what, before in list(self._known.items()):
            now = self._measure(what)
            self._known[what] = min(before, now, key=lambda timing: timing.seconds)

    def _lookup(self, what: Product | Core | int) -> Timing:
        if what not in self._known:
            self._known[what] = self._measure(what)
        return self._known[what]

    @torch.inference_mode()
    def _measure(self, what: Product | Core | int) -> Timing:
        if isinstance(what, int):
            return self._best(_memory(what, self.device, both=what == self.buffer))
        if isinstance(what, Core):
            return self._best(_cores(what, self.device, self.dtype))
        best = self._best(_products(what.piece(), self.device, self.dtype))
        best = Timing(best.seconds * what.pieces, best.by + (f", in pieces of {CHUNK}" if what.pieces > 1 else ""))
        if what.pieces > 1 and what.outputs * what.inputs <= _WHOLE:
            whole = self._best(_products(what, self.device, self.dtype))
            best = min(best, whole, key=lambda timing: timing.seconds)
        return best

    def _best(self, candidates: Iterator[tuple[str, Call, float]]) -> Timing:
        timings = [Timing(self._median(call) * scale, name) for name, call, scale in candidates]
        return min(timings, key=lambda timing: timing.seconds)

    def _median(self, call: Call) -> float:
        call()  # the first call allocates, and chooses a kernel
        synchronise(self.device)
        seconds: list[float] = []
        while len(seconds) < self.least or sum(seconds) < self.seconds:
            begun = time.perf_counter()
            call()
            synchronise(self.device)
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds)


def _onednn(device: torch.device, dtype: torch.dtype) -> bool:
    able = dtype is torch.float32 or (dtype is torch.bfloat16 and has_bfloat16())
    return device.type == "cpu" and able and torch.backends.mkldnn.is_available()


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _products(shape: Product, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call, float]]:
    """Candidates: name, call, and by what to multiply its time."""
    x = torch.randn(shape.rows, shape.inputs, device=device, dtype=dtype)
    stored = (shape.inputs, shape.outputs) if shape.turned else (shape.outputs, shape.inputs)
    weight = torch.randn(stored, device=device, dtype=dtype)
    weight = weight.t() if shape.turned else weight
    out = torch.empty(shape.rows, shape.outputs, device=device, dtype=dtype)
    yield "F.linear", lambda: linear(x, weight), 1.0
    yield "mm(out=)", lambda: torch.mm(x, weight.t(), out=out), 1.0
    if _onednn(device, dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, shape.rows)
        yield "oneDNN", lambda: _pointwise(x, weight), 1.0
        yield "oneDNN, prepacked", lambda: _pointwise(x, packed), 1.0
    elif device.type == "cpu" and dtype is torch.bfloat16:
        # The processor has no such product: what it can reach is that of floats.
        wide, floats = x.float(), torch.ops.mkldnn._reorder_linear_weight(weight.float(), shape.rows)
        yield "oneDNN, float32", lambda: _pointwise(wide, floats), 1.0


def _cores(core: Core, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Call, float]]:
    groups = core.heads // core.kv_heads
    # As every form likes its inputs best: what it takes to lay them out so is no part of a floor.
    q = 0.25 * torch.randn(1, core.heads, core.queries, core.dim, device=device, dtype=dtype)
    k, v = (torch.randn(1, core.kv_heads, core.keys, core.dim, device=device, dtype=dtype) for _ in range(2))
    wide_k, wide_v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    mask = core.mask(device)
    square = mask is not None and core.window is None and core.queries == core.keys
    how: dict[str, Any] = {"is_causal": True} if square else {"attn_mask": mask}
    yield "SDPA", lambda: scaled_dot_product_attention(q, wide_k, wide_v, scale=1.0, **how), 1.0
    grouped = {**how, "enable_gqa": True}
    yield "SDPA, grouped", lambda: scaled_dot_product_attention(q, k, v, scale=1.0, **grouped), 1.0
    rows = q.view(core.kv_heads, groups * core.queries, core.dim)
    hidden = None if mask is None else ~mask.repeat(groups, 1)

    def soften(scores: Tensor) -> Tensor:
        return torch.softmax(scores if hidden is None else scores.masked_fill_(hidden, -torch.inf), dim=-1)

    turned_k, flat_v = k[0].transpose(1, 2), v[0]
    yield "bmm-softmax-bmm", lambda: torch.bmm(soften(torch.bmm(rows, turned_k)), flat_v), 1.0
    if _onednn(device, dtype):
        columns = v[0].transpose(1, 2)

        def one_by_one() -> list[Tensor]:
            return [_pointwise(soften(_pointwise(rows[i], k[0, i])), columns[i]) for i in range(core.kv_heads)]

        yield "oneDNN a head", one_by_one, 1.0


def _memory(size: int, device: torch.device, both: bool) -> Iterator[tuple[str, Call, float]]:
    """Seconds to move `size` bytes: by a copy of half of them and, if `both`, by a read of all."""
    source = torch.ones(max(1, size // 4), device=device)
    half, target = source[: max(1, size // 8)], torch.empty(max(1, size // 8), device=device)
    yield "copy", lambda: target.copy_(half), 1.0
    if both:
        yield "read (sum)", lambda: source.sum(), 1.0
        yield "read (dot)", lambda: torch.dot(source, source), 1.0
