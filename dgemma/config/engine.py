"""How much an engine takes on at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dgemma.config.checks import is_whole
from dgemma.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on at once. None of these changes an answer's law.

    Of all only `block` (and so an `encode_chunk` below it) may change last bits.
    """

    max_batch_rows: int = 64
    """Requests that advance together (and hold a cache); later ones wait in the order they came."""
    max_batch_tokens: int = 4096
    """Tokens in one forward pass; a single canvas or chunk that is longer still runs, alone."""
    max_requests: int = 1024
    """Requests held in all, waiting ones included; one more is a `CapacityError`."""
    encode_chunk: int = 512
    """Tokens of one request that one pass encodes; a long prompt takes several passes."""
    prefix_cache_tokens: int = 32_768
    """Tokens whose keys and values are kept for requests that begin with the same ones; 0 keeps none."""
    kv_bytes: int = 0
    """Bytes of keys and values that admitted requests may need at most, all together; later ones wait. 0 is no limit.

    Counted are prompt and whole budget. What `prefix_cache_tokens` keeps and what a pass needs come on top.
    """
    prefix_block: int = 32
    """Tokens that are encoded, kept and reused together. Smaller ones find longer beginnings, larger ones cost less."""

    canvas_cost: float | None = None
    """What a pass over a canvas costs, in autoregressive tokens: with it mode "verified" reckons whether drafts pay.
    None: as this engine's own passes turn out.
    """

    @property
    def block(self) -> int:
        """Tokens of a block: no more than a pass takes."""
        return min(self.prefix_block, self.encode_chunk)

    def __post_init__(self) -> None:
        cost = self.canvas_cost
        if cost is not None and (isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < 1e6):
            raise ConfigError(f"canvas_cost must be a number above 0, or None, got {cost!r}")
        for field in fields(self):
            if field.name == "canvas_cost":
                continue
            value, low = getattr(self, field.name), 0 if field.name in ("prefix_cache_tokens", "kv_bytes") else 1
            if not is_whole(value, low):
                raise ConfigError(f"{field.name} must be a whole number of at least {low}, got {value!r}")
