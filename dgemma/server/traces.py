"""Recorded traces: made while a request runs, kept in memory or in a folder, the newest ones only.

A trace that cannot be kept is lost with a line in the log; the answer it belongs to is not touched.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from pathlib import Path

from dgemma.server.logs import warn

_MEMORY = 64 << 20  # bytes of all traces that are kept in memory
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
_SUFFIX = ".jsonl"


class Traces:
    """`keep` and `get` traces by id; at most `count` of them."""

    def __init__(self, folder: Path | None, count: int) -> None:
        self._folder, self._count = folder, count
        self._held: OrderedDict[str, bytes] = OrderedDict()

    async def keep(self, name: str, lines: list[str]) -> None:
        """Store a trace of whole lines."""
        data = "".join(lines).encode("utf-8")
        if self._folder is None:
            self._held[name] = data
            while self._held and (len(self._held) > self._count or sum(map(len, self._held.values())) > _MEMORY):
                self._held.popitem(last=False)
            return
        try:
            await asyncio.to_thread(self._write, self._folder, name, data)
        except OSError as error:
            warn(event="trace lost", trace=name, error=error.strerror or str(error))

    async def get(self, name: str) -> bytes | None:
        """A trace, or None where there is none (any more)."""
        if not _ID.fullmatch(name):
            return None
        if self._folder is None:
            return self._held.get(name)
        try:
            return await asyncio.to_thread((self._folder / f"{name}{_SUFFIX}").read_bytes)
        except OSError:
            return None

    def _write(self, folder: Path, name: str, data: bytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / f".{name}.part"
        try:
            begun.write_bytes(data)
            begun.rename(folder / f"{name}{_SUFFIX}")
        except OSError:
            begun.unlink(missing_ok=True)
            raise
        kept = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[: max(0, len(kept) - self._count)]:
            path.unlink(missing_ok=True)
