"""The peer at its best: matmul precision "medium", and glibc's allocator tuned so that large temporaries cost no page
faults. The allocator is set by a process's environment, so this side runs in a process of its own and takes its turns
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgemma.bench.child import TUNED, Child
from dgemma.bench.machine import Memory
from dgemma.bench.runs import Run
from dgemma.config import GenerationConfig
from dgemma.errors import DgemmaError


class TunedPeer:
    """A side whose runs happen in a child process, one at a time, at the parent's number of threads."""

    name = "transformers (medium, tuned)"

    def __init__(self, folder: Path, dtype: torch.dtype, width: int, version: str) -> None:
        self.version = version
        self._child = Child(TUNED)
        try:
            self._child.call("start", side="transformers", threads=torch.get_num_threads())
            name = str(dtype).removeprefix("torch.")
            facts = self._child.call("load", folder=str(folder), dtype=name, width=width, medium=True)
        except BaseException as error:
            self.__exit__(error)
            raise
        self.settings: dict[str, str] = facts["settings"]

    def run(self, prompt: Sequence[int], config: GenerationConfig) -> Run:
        facts: dict[str, Any] = self._child.call("run", prompt=list(prompt), config=asdict(config))
        return Run(**{**facts, "step_seconds": tuple(facts["step_seconds"])})

    def rehearse(self, prompt: Sequence[int], config: GenerationConfig) -> Memory:
        return Memory(**self._child.call("rehearse", prompt=list(prompt), config=asdict(config)))

    def encode(self, prompt: Sequence[int]) -> Tensor:
        raise DgemmaError("hidden states do not cross a process; ask the peer in this one")

    def __enter__(self) -> TunedPeer:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.__exit__(*error)
