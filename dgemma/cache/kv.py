"""Keys and values of one request's clean tokens. Knows positions and windows, no masks, no ids, no network.

Full layers keep everything; sliding layers keep a ring of `W - 1 + slack` slots. The slack is what makes
roll-back and chunked encoding possible: while up to `slack` new tokens are written, the W - 1 tokens before
them stay readable.

With `fp8` every stored vector is rounded to e4m3 codes with a scale of its own (`kernels.vectors`), and all who read it
see code * scale, those who have just appended it too: so it does not matter in how many passes tokens are encoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap

import torch
from torch import Tensor

from dgemma.config import ModelConfig
from dgemma.kernels.scaled import E4M3
from dgemma.kernels.vectors import restore, round_vectors


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Copies of what is stored of consecutive tokens, all layers end to end; `KVCache` knows the layout.

    Blocks live long and end one by one. Tensors that do so, or only their headers, among the temporaries of passes
    leave a heap full of holes; so on a CPU this is memory of its own, which goes back to the system whole.
    """

    tokens: int
    memory: mmap | Tensor


_FIRST = 64  # slots of a fresh buffer; doubled when full
_SCALE = torch.float32
_ALIGNED = 8  # bytes


class KVCache:
    """One request's cache. Tensors are `[S, K, D]`: S tokens by position, K key/value heads, D head dim.

    Encoding n tokens is `append(layer, ...)` for every layer, then `advance(n)`. Until `advance`, nothing has
    happened: an interrupted pass may be run again. Denoising only calls `prefix`.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        slack: int,
        most: int | None = None,
        fp8: bool = False,
    ) -> None:
        """`most`: no more tokens than this are expected, so buffers do not grow beyond it for the sake of growth.

        `dtype` is of what is appended and read; `fp8` stores it as e4m3.
        """
        assert slack >= 1
        self.length = 0
        self.slack = slack
        self._window = config.sliding_window
        kind = _Fp8Layer if fp8 else _Layer
        self._layers: list[_Layer | _Fp8Layer] = [
            kind(
                self._window - 1 + slack if layer.kind == "sliding" else None,
                torch.empty(0, layer.num_kv_heads, layer.head_dim, device=device, dtype=dtype),
                most,
            )
            for layer in config.layers
        ]

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store fresh `k, v [n, K, D]` at positions length .. length + n - 1 of one layer, n <= slack."""
        assert 1 <= k.shape[0] <= self.slack
        self._layers[layer].write(self.length, k, v)

    def put(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """`append` for who knows only on the device where: `slots [n]`, in reserved memory (`slots`)."""
        self._layers[layer].put(slots, k, v)

    def advance(self, count: int) -> None:
        """Make the `count` tokens that were just appended to every layer part of the prefix."""
        self.length += count
        for table in self._tables():
            table.written = max(table.written, self.length)

    def prefix(self, layer: int, fresh: int = 0) -> tuple[Tensor, Tensor]:
        """The keys and values every canvas position may see: all (full), or the last W - 1 (sliding).

        With the `fresh` tokens behind them that were just appended: so whatever some of their queries may see.
        """
        store = self._layers[layer]
        return store.read(self._first(store), self.length + fresh)

    def stored(self, layer: int, fresh: int = 0) -> tuple[Tensor, Tensor, int, int, tuple[Tensor, Tensor] | None]:
        """`prefix` where it lies: buffers of keys and values, the slot of its first token, and how many there are.

        They follow each other, behind the last slot at slot 0 again. Last come the scales `[slots, K]` of keys and
        values, where the buffers are codes.
        """
        store = self._layers[layer]
        first = self._first(store)
        start = first if store.slots is None else first % store.slots
        return *store.buffers, start, self.length + fresh - first, store.scales

    def slots(self, layer: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """All buffers of `stored`. They stay where they are while no more tokens come than `reserve` was told."""
        return *self._layers[layer].buffers, self._layers[layer].scales

    @property
    def ring(self) -> int:
        """Slots of a sliding layer."""
        return self._window - 1 + self.slack

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens at once."""
        for table in self._tables():
            table.reserve(tokens)

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
        for table in self._tables():
            table.written = 0

    def segments(self, counts: Sequence[int]) -> list[KVCache]:
        """This cache seen from the beginning of each of consecutive parts of one pass, `counts` tokens long.

        All write here. Each part sees what those before it appended to the same layer, so they must be served in
        order, layer by layer; together they may be `slack` tokens long. Only `advance` of the cache itself counts.
        """
        assert sum(counts) <= self.slack
        views, start = [], self.length
        for count in counts:
            view = object.__new__(KVCache)
            view.__dict__.update(self.__dict__)
            view.length = start
            views.append(view)
            start += count
        return views

    def ahead(self, count: int) -> KVCache:
        """This cache as it will be with `count` tokens more; a layer may be read once they are appended to it."""
        return self.segments([count, 0])[1]

    def before(self, length: int) -> KVCache:
        """This cache as it was at `length` tokens, to be read; allowed where `can_truncate` says so."""
        if length == self.length:
            return self
        assert self.can_truncate(length)
        view = object.__new__(KVCache)
        view.__dict__.update(self.__dict__)
        view.length = length
        return view

    def can_truncate(self, length: int) -> bool:
        """Whether the rings still hold the W - 1 tokens before `length`."""
        return 0 <= length <= self.length and self._holds(max(0, length - (self._window - 1)))

    def truncate(self, length: int) -> None:
        """Roll back to `length`. Allowed where `can_truncate` says so: always for up to `slack` tokens."""
        assert self.can_truncate(length)
        self.length = length

    def copy(self, start: int, stop: int) -> Block | None:
        """Copies of tokens start .. stop - 1 of every layer; None if a ring has already overwritten some."""
        assert 0 <= start < stop <= self.length
        if not self._holds(start):
            return None
        block = Block(stop - start, self._block_memory(stop - start))
        for (k, v), table in zip(self._pieces(block), self._tables(), strict=True):
            old_k, old_v = table.read(start, stop)
            k.copy_(old_k)
            v.copy_(old_v)
        return block

    def load(self, blocks: Sequence[Block]) -> None:
        """Fill an empty cache with the tokens of consecutive `blocks`, the first of which begins at position 0."""
        assert self.length == 0
        tokens, start = sum(block.tokens for block in blocks), 0
        for block in blocks:
            for table, (k, v) in zip(self._tables(), self._pieces(block), strict=True):
                first = 0 if table.slots is None else max(0, tokens - table.slots)
                skipped = max(0, first - start)
                if skipped < block.tokens:
                    table.write(start + skipped, k[skipped:], v[skipped:])
            start += block.tokens
        self.length = tokens

    def _tables(self) -> Iterator[_Layer]:
        """Codes and scales as they are, layer by layer: so copies are exact."""
        for layer in self._layers:
            yield from layer.tables

    def _block_memory(self, tokens: int) -> mmap | Tensor:
        size = sum(2 * _span(table, tokens) for table in self._tables())
        empty = next(self._tables()).empty
        on_cpu = empty.device.type == "cpu"
        return mmap(-1, size) if on_cpu else empty.new_empty(size, dtype=torch.uint8)

    def _pieces(self, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values `[n, ...]` of a block, table by table; writing to them writes to the block."""
        memory = block.memory
        flat, start = memory if isinstance(memory, Tensor) else torch.frombuffer(memory, dtype=torch.uint8), 0
        for table in self._tables():
            shape, span = (block.tokens, *table.empty.shape[1:]), _span(table, block.tokens)
            size = math.prod(shape) * table.empty.element_size()
            k, v = (flat[at : at + size].view(table.empty.dtype).view(shape) for at in (start, start + span))
            yield k, v
            start += 2 * span

    def _holds(self, start: int) -> bool:
        """Whether no ring has overwritten position `start` or a later one."""
        return all(table.slots is None or table.written - table.slots <= start for table in self._tables())

    def _first(self, store: _Layer | _Fp8Layer) -> int:
        return 0 if store.slots is None else max(0, self.length - (self._window - 1))


def kv_bytes(config: ModelConfig, dtype: torch.dtype, slack: int, tokens: int, fp8: bool = False) -> int:
    """Bytes of a cache of this `slack` for `most = tokens` at most: a ring never outgrows its slots.

    While a buffer grows, the old one exists beside the new one for a moment; that is not counted.
    """
    ring = min(tokens, config.sliding_window - 1 + slack)
    total = 0
    for layer in config.layers:
        vector = layer.head_dim * E4M3.itemsize + _SCALE.itemsize if fp8 else layer.head_dim * dtype.itemsize
        total += 2 * layer.num_kv_heads * vector * (ring if layer.kind == "sliding" else tokens)
    return total


def _span(table: _Layer, tokens: int) -> int:
    """Bytes that the keys of a block have in one table, up to where a number of any type may begin."""
    size = tokens * math.prod(table.empty.shape[1:]) * table.empty.element_size()
    return -(-size // _ALIGNED) * _ALIGNED


class _Layer:
    """Two buffers `[S, ...]`: position p lives in slot p (`slots` None) or p mod slots. They grow by doubling up to
    `slots` and `most`.

    `written` is one past the highest position ever stored: it tells what a ring still holds.
    """

    def __init__(self, slots: int | None, empty: Tensor, most: int | None) -> None:
        self.slots, self._most = slots, most
        self.written = 0
        self.empty = self._k = self._v = empty

    @property
    def tables(self) -> tuple[_Layer, ...]:
        return (self,)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self._k, self._v

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        return None

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        self.reserve(start + k.shape[0])
        self.written = max(self.written, start + k.shape[0])
        done = 0
        for part in self._parts(start, start + k.shape[0]):
            count = part.stop - part.start
            self._k[part], self._v[part] = k[done : done + count], v[done : done + count]
            done += count

    def put(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        for buffer, x in ((self._k, k), (self._v, v)):
            _bytes(buffer).index_copy_(0, slots, _bytes(x))

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        parts = self._parts(start, stop)
        if len(parts) == 1:
            return self._k[parts[0]], self._v[parts[0]]
        return torch.cat([self._k[part] for part in parts]), torch.cat([self._v[part] for part in parts])

    def _parts(self, start: int, stop: int) -> list[slice]:
        """Slots of positions start .. stop - 1 in order: one slice, or two where the ring wraps."""
        if self.slots is None:
            return [slice(start, stop)]
        first, count = start % self.slots, stop - start
        rest = first + count - self.slots
        return [slice(first, first + count)] if rest <= 0 else [slice(first, self.slots), slice(0, rest)]

    def reserve(self, tokens: int) -> None:
        have = self._k.shape[0]
        need = tokens if self.slots is None else min(tokens, self.slots)
        if need <= have:
            return
        limits = [limit for limit in (self.slots, self._most) if limit is not None]
        size = max(need, min([2 * have, *limits] if have else [_FIRST, *limits]))
        self._k, self._v = _grown(self._k, size), _grown(self._v, size)


class _Fp8Layer:
    """A `_Layer` of codes beside one of their scales; in between, vectors of the type of `empty`."""

    def __init__(self, slots: int | None, empty: Tensor, most: int | None) -> None:
        self.slots, self._dtype = slots, empty.dtype
        self._codes = _Layer(slots, empty.to(E4M3), most)
        self._scales = _Layer(slots, empty[..., 0].to(_SCALE), most)

    @property
    def tables(self) -> tuple[_Layer, ...]:
        return self._codes, self._scales

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self._codes.buffers

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        return self._scales.buffers

    def write(self, start: int, k: Tensor, v: Tensor) -> None:
        (k, k_scale), (v, v_scale) = round_vectors(k), round_vectors(v)
        self._codes.write(start, k, v)
        self._scales.write(start, k_scale, v_scale)

    def put(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        (k, k_scale), (v, v_scale) = round_vectors(k), round_vectors(v)
        self._codes.put(slots, k, v)
        self._scales.put(slots, k_scale, v_scale)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        k, v = (
            restore(codes, scale, self._dtype)
            for codes, scale in zip(self._codes.read(start, stop), self._scales.read(start, stop), strict=True)
        )
        return k, v


def _grown(old: Tensor, size: int) -> Tensor:
    new = old.new_empty(size, *old.shape[1:])
    new[: old.shape[0]] = old
    return new


def _bytes(x: Tensor) -> Tensor:
    """e4m3 has few ops of its own."""
    return x.view(torch.uint8) if x.dtype is E4M3 else x
