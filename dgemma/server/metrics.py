"""What a server tells Prometheus: the engine's load, read when asked, and what the routes report of their requests.

Names and meanings are listed in docs/load.md. Knows no HTTP framework; every instance has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dgemma.api import LLM
from dgemma.engine.load import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `render` returns."""

# Bounds of histograms: each at most 2.5 times the one before, from a small model on a CPU to a large one in a queue.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
_STEPS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

_GAUGES = {
    "dgemma_requests_waiting": ("Requests that wait for a place in the engine.", "waiting"),
    "dgemma_requests_running": ("Requests that hold a cache and advance together.", "running"),
    "dgemma_kv_reserved_bytes": ("Keys and values that the running requests may need at most.", "kv_reserved"),
    "dgemma_kv_limit_bytes": ("Limit of the reserved bytes; 0 is none.", "kv_limit"),
    "dgemma_prefix_tokens": ("Tokens held for requests that begin alike, outside the reserved bytes.", "prefix_tokens"),
}
_COUNTERS = {
    "dgemma_requests_admitted": ("Requests that got a place in the engine.", "admitted"),
    "dgemma_prompt_tokens": ("Tokens in: prompts of admitted requests, reused tokens included.", "prompt_tokens"),
    "dgemma_committed_tokens": ("Tokens out.", "committed_tokens"),
    "dgemma_canvases": ("Committed canvases.", "canvases"),
    "dgemma_shared_passes": ("Forward passes that are counted as both kinds.", "shared_passes"),
    "dgemma_prefix_hits": ("Requests whose prompt began with kept tokens.", "prefix_hits"),
    "dgemma_prefix_misses": ("Requests that looked for kept tokens and found none.", "prefix_misses"),
    "dgemma_prefix_reused_tokens": ("Prompt tokens that were not encoded again.", "prefix_reused_tokens"),
}
# Per kind of forward pass. A denoise row is one step of one canvas: rows per second are steps per second.
_PASSES = {
    "dgemma_forward_passes": ("Forward passes.", ("encode_passes", "denoise_passes")),
    "dgemma_forward_rows": ("Requests in forward passes: rows / passes is the batch.", ("encode_rows", "denoise_rows")),
    "dgemma_forward_tokens": ("Positions in forward passes.", ("encoded_tokens", "denoised_tokens")),
}  # fmt: skip


class Metrics:
    """Counts for one server with one engine. Every method may be called from any thread and returns at once."""

    def __init__(self, llm: LLM) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineLoad(lambda: llm.engine.load))
        ProcessCollector(registry=self._registry)
        self._open = Gauge("dgemma_requests_open", "Client requests begun and not over.", registry=self._registry)
        self._requests = Counter(
            "dgemma_requests", "Client requests that are over.", ("route", "status"), registry=self._registry
        )
        self._seconds = self._histogram("dgemma_request_seconds", "Duration of client requests.", _SECONDS, ("route",))
        self._first = self._histogram("dgemma_first_text_seconds", "Until the first text is sent.", _SECONDS)
        self._canvas_seconds = self._histogram(
            "dgemma_canvas_seconds", "From one committed canvas (or the request's begin) to the next.", _SECONDS
        )
        self._canvas_steps = self._histogram("dgemma_canvas_steps", "Denoising steps of committed canvases.", _STEPS)
        self._rejected = Counter("dgemma_rejected", "Client requests refused.", ("reason",), registry=self._registry)
        self._cancelled = Counter("dgemma_cancelled", "Client requests given up.", registry=self._registry)

    def started(self, route: str) -> None:
        """A client request has begun; `finished` with the same route must follow, whatever happens."""
        self._open.inc()

    def first_text(self, seconds: float) -> None:
        """The first text of a request was sent, `seconds` after it began."""
        self._first.observe(seconds)

    def canvas(self, seconds: float, steps: int) -> None:
        """A canvas was committed after `steps`, `seconds` after the one before it or the request's begin."""
        self._canvas_seconds.observe(seconds)
        self._canvas_steps.observe(steps)

    def finished(self, route: str, status: int, seconds: float) -> None:
        """A client request is over. `route` is a template such as /v1/models/{id}, never a client's own path."""
        self._open.dec()
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """A request was refused; `reason` is one word of a fixed few, such as full, draining, key, body or invalid."""
        self._rejected.labels(reason).inc()

    def cancelled(self) -> None:
        """A client went away before its answer was complete."""
        self._cancelled.inc()

    def render(self) -> bytes:
        """Everything in Prometheus's text format; serve it as `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, bounds: Iterable[float], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(name, text, labels, buckets=tuple(bounds), registry=self._registry)


class _EngineLoad(Collector):
    """Reads the engine once per scrape, so that all its numbers are of one moment."""

    def __init__(self, read: Callable[[], Load]) -> None:
        self._read = read

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        load = self._read()
        for name, (text, field) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(load, field))
        for name, (text, field) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(load, field))
        for name, (text, kinds) in _PASSES.items():
            family = CounterMetricFamily(name, text, labels=("kind",))
            for kind, field in zip(("encode", "denoise"), kinds, strict=True):
                family.add_metric((kind,), getattr(load, field))
            yield family
