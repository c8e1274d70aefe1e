"""Watches what each program of a Triton launch reads and writes, byte by byte, while the interpreter runs it.

The interpreter runs programs one after the other, so numbers alone cannot show that they hang on an order a device does
not keep. Here a launch fails that holds

* bytes outside the storages of the tensors it was given;
* bytes that two programs write, or that one writes and another reads;
* a store that names a byte twice, with different values;
* bytes that a program stores and loads, in either order, with no barrier between: its threads each hold a part. Only
  a tile that is stored as it was loaded is in the same hands.

Threads that share a tile on the way (shared memory, shuffles) are the compiler's affair, unseen. Atomics are refused:
no kernel has any, and an order of theirs is what it should not hang on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

MANY = -1


class Launch:
    """The memory of a launch as one row of bytes; for each byte who was there: a program's number from 1, or MANY."""

    def __init__(self, name: str, arguments: Any) -> None:
        self.name = name
        held: dict[int, int] = {}
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                held[storage.data_ptr()] = max(storage.nbytes(), held.get(storage.data_ptr(), 0))
        self._starts = np.array(sorted(held), dtype=np.uint64)
        self._sizes = np.array([held[int(start)] for start in self._starts], dtype=np.int64)
        self._at = np.concatenate([[0], self._sizes.cumsum()])
        self._readers, self._writers = (np.zeros(self._at[-1], dtype=np.int32) for _ in range(2))
        # After how many barriers the byte was last read and written.
        self._read, self._written = (np.zeros(self._at[-1], dtype=np.int32) for _ in range(2))
        self._tiles: set[bytes] = set()
        self.barriers = 0
        self.program = 0

    def begin(self) -> None:
        self.program += 1
        self.barrier()

    def barrier(self) -> None:
        self.barriers += 1
        self._tiles.clear()

    def _bytes(self, pointers: np.ndarray, size: int) -> np.ndarray:
        """Places in the row, (numbers, size)."""
        which = np.searchsorted(self._starts, pointers, side="right") - 1
        inside = which >= 0
        offsets = (pointers - self._starts[np.maximum(which, 0)]).astype(np.int64)
        inside &= offsets + size <= self._sizes[which]
        assert inside.all(), f"{self.name}: program {self.program} goes beyond its tensors"
        return (self._at[which] + offsets)[:, None] + np.arange(size)

    def load(self, pointers: np.ndarray, size: int) -> None:
        places = self._bytes(pointers, size).ravel()
        self._tiles.add(pointers.tobytes())
        self._check(places, self._writers, self._written, False, "reads what {} writes")
        readers = self._readers[places]
        self._readers[places] = np.where((readers == 0) | (readers == self.program), self.program, MANY)
        self._read[places] = self.barriers

    def store(self, pointers: np.ndarray, values: np.ndarray) -> None:
        places = self._bytes(pointers, values.itemsize)
        order = np.argsort(places, axis=None, kind="stable")
        places, content = places.ravel()[order], np.ascontiguousarray(values).view(np.uint8).ravel()[order]
        twice = (places[1:] == places[:-1]) & (content[1:] != content[:-1])
        assert not twice.any(), f"{self.name}: program {self.program} stores two values in one place"
        in_place = pointers.tobytes() in self._tiles
        self._check(places, self._readers, self._read, in_place, "writes what {} reads")
        others = self._writers[places]
        self._refuse((others != 0) & (others != self.program), others, "writes what {} writes")
        self._writers[places] = self.program
        self._written[places] = self.barriers

    def _check(self, places: np.ndarray, who: np.ndarray, when: np.ndarray, own: bool, what: str) -> None:
        """Nobody else was there, and not this program since its last barrier but for its `own` tile."""
        others = who[places]
        again = (when[places] == self.barriers) & (not own)
        self._refuse((others != 0) & ((others != self.program) | again), others, what)

    def _refuse(self, bad: np.ndarray, others: np.ndarray, what: str) -> None:
        if bad.any():
            other = int(others[bad][0])
            said = what.format({MANY: "others", self.program: "it"}.get(other, f"program {other}"))
            raise AssertionError(f"{self.name}: program {self.program} {said} ({int(bad.sum())} bytes)")


def watch() -> None:
    """Every launch of this process, from now on."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, _get_np_dtype

    now: list[Launch] = []
    run, place, barrier = GridExecutor.__call__, InterpreterBuilder.set_grid_idx, InterpreterBuilder.create_barrier
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        now.append(Launch(executor.fn.__name__, (args, kwargs)))
        try:
            run(executor, *args, **kwargs)
        finally:
            now.pop()

    def placed(builder: Any, x: int, y: int, z: int) -> None:
        now[-1].begin()
        place(builder, x, y, z)

    def passed(builder: Any) -> None:
        now[-1].barrier()
        barrier(builder)

    def loaded(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        now[-1].load(taken(pointers, mask), _get_np_dtype(pointers.get_element_ty()).itemsize)
        return load(builder, pointers, mask, *rest)

    def stored(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        now[-1].store(taken(pointers, mask), taken(value, mask))
        return store(builder, pointers, value, mask, *rest)

    def refused(*args: Any) -> None:
        raise AssertionError(f"{now[-1].name} has an atomic operation")

    GridExecutor.__call__, InterpreterBuilder.set_grid_idx, InterpreterBuilder.create_barrier = launched, placed, passed
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = loaded, stored
    InterpreterBuilder.create_atomic_rmw = InterpreterBuilder.create_atomic_cas = refused


def taken(values: Any, mask: Any) -> np.ndarray:
    """What a mask lets through, in one dimension."""
    return values.data[np.broadcast_to(mask.data, values.data.shape)]
