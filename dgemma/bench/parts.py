"""Where the time of a pass goes: a stopwatch at the places where the parts of our engine meet, taken off afterwards.

Times are self times: what a part calls and is a part of its own does not count for it. Where the engine runs a part
inside another function than those named here, its time stands under `rest`. Knows no floor.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dgemma import kernels
from dgemma.bench.floor import PARTS, Routing
from dgemma.engine import Engine
from dgemma.engine.attend import DenoiseAttend, EncodeAttend
from dgemma.engine.batch import CanvasBatch
from dgemma.kernels.native import Native
from dgemma.model import device
from dgemma.model.attention import Attention
from dgemma.model.backbone import SelfConditioning
from dgemma.model.block import Block
from dgemma.model.fast import FastExperts, FastGatedMLP, FastLayer, FastStack
from dgemma.model.layers import Embedding, GatedMLP, RMSNorm
from dgemma.model.moe import Experts, Router

ALL_PARTS = (*PARTS, "sampler", "rest", "python")
"""`sampler`: random numbers, sampler, stop rule. `rest`: inside a pass, but in no part. `python`: around the pass."""
PASSES = ("encode", "denoise")
_WHOLE = "embedding"
"""A part that keeps what is inside it, whatever that is: self-conditioning has norms and an MLP of its own."""
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (Embedding, "embedding"),
    (SelfConditioning, "embedding"),
    (Attention, "projections"),
    (GatedMLP, "mlp"),
    (Router, "experts"),
    (Experts, "experts"),
    (RMSNorm, "norms"),
    (Block, "norms"),  # residual sums
)
METHODS: tuple[tuple[type, str, str], ...] = (
    (DenoiseAttend, "__call__", "attention"),
    (EncodeAttend, "__call__", "attention"),
    (CanvasBatch, "__init__", "sampler"),
    (CanvasBatch, "draws", "sampler"),
    (CanvasBatch, "finish", "sampler"),
    (FastStack, "condition", "embedding"),
    (FastLayer, "__call__", "projections"),
    (FastGatedMLP, "__call__", "mlp"),
    (FastExperts, "__call__", "experts"),
    (Native, "norm", "norms"),
    (Native, "heads", "norms"),  # of q, k and v, with the rotation
    (Native, "middle", "norms"),
    (Native, "close", "norms"),
)
# The stack of a device: the products of a layer are its own time, the router's small one too.
_DEVICE: tuple[tuple[Any, str, str], ...] = (
    (device.DeviceStack, "condition", "embedding"),
    (device._Layer, "__call__", "projections"),
    (device._GatedMLP, "__call__", "mlp"),
    (kernels, "heads", "norms"),
    (kernels, "middle", "norms"),
    (kernels, "choose", "experts"),
    (kernels, "close", "norms"),
)


class Stopwatch:
    """Seconds by pass and part since the last `lap`; the pass is "" around passes. One thread.

    `wait` is called wherever a part begins or ends: on a device, it waits for what was started there.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self._wait = wait
        self._seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._open: list[tuple[str, str]] = []
        self._since = 0.0

    def enter(self, part: str, of: str | None = None) -> None:
        """A part begins; `of` names the pass that begins with it."""
        self._turn()
        outer = self._open[-1] if self._open else ("", "")
        self._open.append((outer[0] if of is None else of, _WHOLE if outer[1] == _WHOLE else part))

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    def lap(self) -> dict[tuple[str, str], float]:
        """Seconds by pass and part, and start again from none."""
        assert not self._open
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    def wrap(self, part: str, function: Callable[..., Any], of: str | None = None) -> Callable[..., Any]:
        """`function`, on this watch."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part, of)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed

    def _turn(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def watching(engine: Engine, watch: Stopwatch) -> Iterator[None]:
    """The engine's parts on a watch, no pass of two kinds or recorded, and everything as it was afterwards."""
    runner = engine.runner
    with ExitStack() as stack:
        stack.enter_context(replaced(engine, "config", replace(engine.config, fuse=False)))
        stack.enter_context(replaced(engine, "graphs", None))
        for name in PASSES:
            stack.enter_context(replaced(runner, name, watch.wrap("rest", getattr(runner, name), name)))
        for owner, name, part in ((engine, "tick", "python"), (kernels, "vocab", "vocabulary"), *METHODS, *_DEVICE):
            stack.enter_context(replaced(owner, name, watch.wrap(part, getattr(owner, name))))
        for module in runner.model.modules():
            for kind, part in _MODULES:
                if isinstance(module, kind):
                    _hook(module, part, watch, stack)
        yield


def _hook(module: nn.Module, part: str, watch: Stopwatch, stack: ExitStack) -> None:
    before = module.register_forward_pre_hook(lambda *_: watch.enter(part))
    after = module.register_forward_hook(lambda *_: watch.leave())
    stack.callback(before.remove)
    stack.callback(after.remove)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object, class or module, for a while."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def observe_routing(run: Callable[[], object], rows: int) -> Routing:
    """How many experts a pass of `rows` tokens hits on average while `run` runs; chance where nothing is seen."""
    plain, compiled, hits = kernels.route, Native.route, list[int]()

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, ids = plain(x, *args, **kwargs)
        if x.shape[0] == rows:
            hits.append(int(ids.unique().numel()))
        return weights, ids

    def watched_too(native: Native, scores: Tensor, *args: Any) -> tuple[Tensor, ...]:
        out = compiled(native, scores, *args)
        if scores.shape[0] == rows:
            hits.append(int((out[3] > 0).sum()))
        return out

    with replaced(kernels, "route", watched), replaced(Native, "route", watched_too):
        run()
    return Routing(hit=sum(hits) / len(hits) if hits else None)
