"""How much an engine takes on at once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dgemma.config.checks import is_whole
from dgemma.errors import ConfigError

KV_CACHE_DTYPES = ("auto", "fp8")
_MAY_BE_NONE = ("prefix_cache_tokens", "kv_bytes", "graph_rows", "graph_ahead")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on at once. None of these changes an answer's law, but for `kv_cache_dtype`.

    Of the others only `block` (and so an `encode_chunk` below it) may change last bits.
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
    kv_cache_dtype: str = "auto"
    """How keys and values are kept: "auto", in the model's type; "fp8", as e4m3 codes and a float32 scale a vector.
    That is little more than half of bfloat16, and rounds what attention sees (`docs/engine.md`).
    """
    prefix_block: int = 32
    """Tokens that are encoded, kept and reused together. Smaller ones find longer beginnings, larger ones cost less."""

    fuse: bool = True
    """Encode and denoise in one forward pass, where both are due. Without, the weights are read once more for each
    prompt and each canvas that another one follows: 4 canvases of N steps take 4 N + 4 forward passes instead of 4 N.
    """
    graph_rows: int = 4
    """On a CUDA device: canvases that take recorded steps (`docs/gpu.md`), each with a cache of `graph_tokens`."""
    graph_tokens: int = 8192
    """Prompt and budget that such a cache holds; longer requests take the ordinary path."""
    graph_ahead: int = 0
    """Steps that are launched before it is known whether the one before them was a canvas's last."""

    canvas_cost: float | None = None
    """What a pass over a canvas costs, in autoregressive tokens: with it mode "verified" reckons whether drafts pay.
    None: as this engine's own passes turn out.
    """

    @property
    def block(self) -> int:
        """Tokens of a block: no more than a pass takes."""
        return min(self.prefix_block, self.encode_chunk)

    def __post_init__(self) -> None:
        if not isinstance(self.fuse, bool):
            raise ConfigError(f"fuse must be True or False, got {self.fuse!r}")
        cost = self.canvas_cost
        if cost is not None and (isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < 1e6):
            raise ConfigError(f"canvas_cost must be a number above 0, or None, got {cost!r}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            wanted = ", ".join(KV_CACHE_DTYPES)
            raise ConfigError(f"kv_cache_dtype must be one of {wanted}, got {self.kv_cache_dtype!r}")
        for field in fields(self):
            if field.name in ("canvas_cost", "kv_cache_dtype", "fuse"):
                continue
            value, low = getattr(self, field.name), 0 if field.name in _MAY_BE_NONE else 1
            if not is_whole(value, low):
                raise ConfigError(f"{field.name} must be a whole number of at least {low}, got {value!r}")
