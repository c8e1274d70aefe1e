"""An engine in a thread of its own, for callers in any number of threads and event loops.

The thread lives while there is work. It alone ticks, so an interrupt that hits a caller never hits a
half-done pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from dgemma.engine.loop import Engine
from dgemma.engine.request import Request
from dgemma.events import Event, Finished

Deliver = Callable[[Event | BaseException], None]


class Worker:
    """`submit` and `abort` return at once; events come through each request's `deliver`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._listeners: dict[int, Deliver] = {}
        self._aborted: list[int] = []
        self._thread: threading.Thread | None = None

    def submit(self, request: Request, deliver: Deliver) -> int:
        """Queue a request (errors of `Engine.add`). `deliver` runs in the worker's thread and must not block.

        It gets the request's events, `Finished` last, or instead the exception that stopped the engine or its hook.
        """
        with self._lock:
            number = self.engine.add(request)
            self._listeners[number] = deliver
            self._wake()
        return number

    def abort(self, request: int) -> None:
        """Drop a request after the current tick; nothing more is delivered. No error if it is over."""
        with self._lock:
            if self._listeners.pop(request, None) is not None:
                self._aborted.append(request)
                self._wake()

    @property
    def inside(self) -> bool:
        """Whether the caller runs in the worker's own thread, which would wait for itself."""
        return self._thread is threading.current_thread()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dgemma-engine")
            self._thread.start()

    def _run(self) -> None:
        while self._clear_aborted() and not _deserted():
            try:
                events = self.engine.tick()
            except BaseException as error:  # out of memory, say: whoever waits must hear of it
                self._fail(error)
                continue
            for event in events:
                with self._lock:
                    last = isinstance(event, Finished)
                    deliver = (self._listeners.pop if last else self._listeners.get)(event.request, None)
                fault = self.engine.faults.pop(event.request, None) if last else None
                if deliver is not None:
                    deliver(fault or event)

    def _clear_aborted(self) -> bool:
        """Between ticks: drop what was aborted. False (and the thread ends) when nothing is left."""
        with self._lock:
            for request in self._aborted:
                self.engine.abort(request)
            self._aborted.clear()
            if not self.engine.has_work:
                self._thread = None
                return False
            return True

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._aborted += self._listeners
            listeners, self._listeners = self._listeners, {}
        for deliver in listeners.values():
            deliver(error)


def _deserted() -> bool:
    """Whether the interpreter is ending and no thread is left that could read an event.

    The thread is no daemon, because ending the interpreter in the middle of a pass aborts the process.
    """
    own = threading.current_thread()
    others = (thread for thread in threading.enumerate() if thread is not own and thread.is_alive())
    return not threading.main_thread().is_alive() and all(thread.daemon for thread in others)
