"""A process of its own for what a process cannot change or measure about itself: its allocator, its memory.

Parent and child speak JSON, a line each way: `{"do": name, ...}` and `{"result": ...}` or `{"error": text}`. Between
calls the child sleeps, so that parent and child can take turns as two sides in one process do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from dgemma.errors import DgemmaError

TUNED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
"""glibc keeps freed memory instead of giving it back: large temporaries then cost no page faults."""


class Child:
    """The parent's end. Entered, it runs; `call` waits for the answer."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        more = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dgemma.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **more},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, do: str, **arguments: Any) -> Any:
        """The result of one of `Worker`'s methods; its failure is a `DgemmaError` here."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError):  # its end of the pipe is closed, or ours
            line = ""
        if not line:
            raise DgemmaError(f"the benchmark's child process ended with status {self._process.wait()} at {do!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise DgemmaError(f"the benchmark's child process failed at {do!r}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        self._process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if any(error):
            self._process.kill()
        self.close()


class Worker:
    """What a child can do. `start` imports a side's libraries, `load` its weights; then it runs."""

    def __init__(self) -> None:
        self._side: Any = None
        self._nbytes = 0
        self._kind = ""

    def start(self, side: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._kind = side
        if side == "dgemma":
            pass
        else:
            import transformers

            _ = transformers.DiffusionGemmaForBlockDiffusion

    def load(self, folder: str, dtype: str, width: int, medium: bool = False) -> dict[str, Any]:
        """Facts of the side: bytes of its weights, and settings where it has any."""
        import torch

        if self._kind == "dgemma":
            from dgemma.api import LLM
            from dgemma.bench.runs import Ours, weight_bytes

            llm = LLM.load(folder, device="cpu", dtype=dtype)
            self._side = Ours(llm.engine)
            return {"nbytes": weight_bytes(llm.engine.runner.model), "settings": {}}
        from dgemma.bench.peer import MediumPeer, Peer
        from dgemma.checkpoint.files import read_json
        from dgemma.config import ModelConfig

        config = ModelConfig.from_hf(read_json(Path(folder) / "config.json"))
        peer = Peer(Path(folder), config, getattr(torch, dtype), torch.device("cpu"), width)
        self._side = MediumPeer(peer) if medium else peer
        return {"nbytes": peer.nbytes, "settings": self._side.settings}

    def run(self, prompt: Sequence[int], config: Mapping[str, Any]) -> dict[str, Any]:
        return asdict(self._side.run(prompt, _generation(config)))

    def rehearse(self, prompt: Sequence[int], config: Mapping[str, Any]) -> dict[str, Any]:
        return asdict(self._side.rehearse(prompt, _generation(config)))


def _generation(config: Mapping[str, Any]) -> Any:
    from dgemma.config import GenerationConfig

    return GenerationConfig(**{**config, "stop_tokens": tuple(config["stop_tokens"])})


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer until the parent hangs up."""
    worker = Worker()
    for line in commands:
        arguments = json.loads(line)
        method: Callable[..., Any] = getattr(worker, arguments.pop("do"))
        try:
            answer = {"result": method(**arguments)}
        except Exception as error:  # the parent tells it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What libraries print must not get between the answers.
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, private)
