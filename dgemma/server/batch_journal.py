"""The journal of a batch: what is answered so far, in `OUT.partial`, so that a killed run goes on where it was.

One JSON object a line: first what the batch is, then an answer each, in the order in which they came. The output is
written from it, whole, in input order, when nothing is missing. Knows no model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dgemma.errors import DataError
from dgemma.server.batch_lines import Answered

_SYNC_S = 1.0


class Journal:
    """A context manager: enter it, ask `done`, `add` what is new, `finish`."""

    def __init__(self, target: Path, job: Mapping[str, Any], total: int) -> None:
        """`job` says what makes the answers what they are; a journal of another job is a `DataError`."""
        self.target, self.path = target, target.with_name(target.name + ".partial")
        self._job, self._total = dict(job), total
        self._places: dict[int, tuple[int, int]] = {}  # line -> offset and length of its record
        self.failed = 0
        self._synced = time.monotonic()
        self._file: BinaryIO

    def __enter__(self) -> Journal:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from None
        self._file = os.fdopen(descriptor, "r+b")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DataError(f"{self.path} is in use: another run writes this batch") from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._sync()
            if not self._places:
                self.path.unlink()  # nothing to go on from
        self._file.close()

    @property
    def done(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def add(self, answer: Answered) -> bool:
        """Write an answer down. False if the line has one already: the first one stays."""
        if answer.number in self._places:
            return False
        record = {"line": answer.number, "failed": answer.failed, "out": answer.text}
        self._append(answer.number, record)
        self.failed += answer.failed
        if time.monotonic() - self._synced > _SYNC_S:
            self._sync()
        return True

    def finish(self) -> None:
        """Write the output in input order, in one stroke, and drop the journal."""
        missing = self._total - self.done
        assert missing == 0, f"{missing} lines have no answer"
        self._sync()
        whole = self.target.with_name(self.target.name + ".whole")
        try:
            with open(whole, "wb") as file:
                for number in range(self._total):
                    offset, length = self._places[number]
                    self._file.seek(offset)
                    file.write(json.loads(self._file.read(length))["out"].encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(whole, self.target)
            self.path.unlink()
        except OSError as error:
            raise DataError(f"{self.target} cannot be written: {error.strerror}; {self.path} keeps all") from None

    def _read(self) -> None:
        """Take over what a former run left. A record that was cut off in writing is dropped."""
        self._file.seek(0)
        offset = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            try:
                record = json.loads(raw)
            except ValueError:
                raise DataError(f"{self.path} is damaged at byte {offset}; remove it to begin anew") from None
            if offset == 0:
                self._check(record)
            else:
                self._places[record["line"]] = (offset, len(raw))
                self.failed += bool(record["failed"])
            offset += len(raw)
        self._file.truncate(offset)
        self._file.seek(offset)
        if offset == 0:
            self._append(None, self._job)
            self._sync()

    def _check(self, found: Any) -> None:
        if not isinstance(found, dict):
            raise DataError(f"{self.path} is no journal of a batch; remove it or choose another output")
        unlike = [name for name in {**found, **self._job} if found.get(name) != self._job.get(name)]
        if unlike:
            raise DataError(
                f"{self.path} was begun with other {', '.join(unlike)}: "
                + "; ".join(f"{name} {found.get(name)!r}, now {self._job.get(name)!r}" for name in unlike)
                + ". Repeat that, or remove it to begin anew"
            )

    def _append(self, number: int | None, record: Mapping[str, Any]) -> None:
        raw = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(raw)
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error.strerror}") from None
        if number is not None:
            self._places[number] = (offset, len(raw))

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()
