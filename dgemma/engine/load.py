"""What an engine has done and is doing, as numbers that any thread may read. Knows no metrics format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dgemma.events import Committed, Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A snapshot. The first five are of now, the others count since the engine began.

    Rows of a pass are requests that shared it, so rows / passes over an interval is how well batching fills.
    A denoise row is one denoising step of one canvas.
    """

    waiting: int = 0
    running: int = 0
    kv_reserved: int = 0
    """Bytes of keys and values that the running requests may need at most; see `EngineConfig.kv_bytes`."""
    kv_limit: int = 0
    """`EngineConfig.kv_bytes`; 0 is no limit."""
    prefix_tokens: int = 0
    """Tokens that the prefix store holds; not part of `kv_reserved`."""
    admitted: int = 0
    prompt_tokens: int = 0
    """Of admitted requests, reused ones included."""
    committed_tokens: int = 0
    canvases: int = 0
    """Committed ones."""
    canvas_steps: int = 0
    """Denoising steps that the committed canvases took together."""
    encode_passes: int = 0
    encode_rows: int = 0
    encoded_tokens: int = 0
    denoise_passes: int = 0
    denoise_rows: int = 0
    denoised_tokens: int = 0
    shared_passes: int = 0
    """Passes that are counted both as an encode and as a denoise pass; `EngineConfig.fuse`."""
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_reused_tokens: int = 0


@dataclass(slots=True)
class Totals:
    """The counts of `Load` that only the engine's own loop knows; written by the thread that ticks."""

    admitted: int = 0
    prompt_tokens: int = 0
    committed_tokens: int = 0
    canvases: int = 0
    canvas_steps: int = 0
    encode_rows: int = 0
    denoise_rows: int = 0

    def admit(self, prompt_tokens: int) -> None:
        self.admitted += 1
        self.prompt_tokens += prompt_tokens

    def events(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Committed):
                self.committed_tokens += len(event.tokens)
                if event.stop != "ar":
                    self.canvases += 1
                    self.canvas_steps += event.steps
