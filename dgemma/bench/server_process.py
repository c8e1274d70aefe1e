"""Our own server in a process of its own, for measurements and long tests: started, waited for, told to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx

from dgemma.errors import DgemmaError

_START_S, _STOP_S = 300.0, 120.0


class ServerProcess:
    """`dgemma serve` with `flags`; entered, it answers at `url`. Leaving it sends SIGTERM, as an operator would."""

    def __init__(self, model: str, flags: Sequence[str] = ()) -> None:
        self._flags = ["--model", model, *flags]
        self.url = ""
        self.status: int | None = None
        """Exit status, once it has ended."""

    def __enter__(self) -> ServerProcess:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log, self._home = tempfile.TemporaryFile(), tempfile.TemporaryDirectory()
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        # What it does is said by its flags alone, not by the settings of whoever measures.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DGEMMA_")}
        own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XDG_CONFIG_HOME": self._home.name}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgemma", "serve", "--host", "127.0.0.1", "--port", str(port), *self._flags],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=inherited | own,
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self.status = self._process.wait()
        self._log.close()
        self._home.cleanup()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def output(self) -> str:
        """What it has printed so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _wait(self) -> None:
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            if not self.alive:
                lines = self.output().strip().splitlines() or ["it printed nothing"]
                raise DgemmaError(f"the server ended with status {self._process.returncode}: {lines[-1]}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise DgemmaError(f"the server did not answer within {_START_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
