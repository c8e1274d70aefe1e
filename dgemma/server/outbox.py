"""What a client is yet to be sent. A slow reader costs drafts, never text: old drafts go when too many wait."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

MAX_WAITING = 32_768  # positions of all waiting drafts, some 3 MB


class Outbox:
    """A queue within one event loop. `get` raises what was put as an exception."""

    def __init__(self) -> None:
        self._items: deque[list[Any]] = deque()
        self._drafts: deque[tuple[list[Any], int]] = deque()
        self._positions = 0
        self._filled = asyncio.Event()
        self.dropped = 0
        """Drafts that were given up."""

    def put(self, item: Any) -> None:
        """Add what must arrive."""
        self._items.append([item])
        self._filled.set()

    def put_draft(self, item: Any, positions: int) -> None:
        """Add what may be dropped; `positions` is its size."""
        entry = [item]
        self._items.append(entry)
        self._drafts.append((entry, positions))
        self._positions += positions
        while self._positions > MAX_WAITING and len(self._drafts) > 1:
            oldest, size = self._drafts.popleft()
            self._positions -= size
            # Drafts that were sent are empty already.
            self.dropped += bool(oldest)
            oldest.clear()
        self._filled.set()

    async def get(self) -> Any:
        """The next item, as soon as there is one."""
        while True:
            while self._items:
                entry = self._items.popleft()
                if not entry:
                    continue
                if self._drafts and self._drafts[0][0] is entry:
                    self._positions -= self._drafts.popleft()[1]
                item = entry[0]
                if isinstance(item, BaseException):
                    raise item
                return item
            self._filled.clear()
            await self._filled.wait()
