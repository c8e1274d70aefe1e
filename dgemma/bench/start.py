"""How long a process needs from its start to the first draft: imports, loading, the prompt's pass, one step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from dgemma.errors import DgemmaError, RequestError

FORMAT, VERSION = "dgemma-bench-start", 1
_PROMPT = "Once upon a time"


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """Medians in seconds since the process was started; the first start, which may find cold files, stands apart."""

    model: str
    threads: int
    starts: int
    imported: float
    loaded: float
    first_draft: float
    first_start: float

    def json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def run_start(
    model: str, dtype: str, threads: int, repeats: int = 3, say: Callable[[str], object] = lambda text: None
) -> StartReport:
    """Start `repeats` processes after a first one."""
    if repeats < 1:
        raise RequestError(f"repeats must be at least 1, got {repeats}")
    found = []
    for count in range(repeats + 1):
        say(f"start {count + 1} of {repeats + 1}")
        found.append(_start(model, dtype, threads))
    warm = found[1:]
    return StartReport(
        model=model,
        threads=threads,
        starts=repeats,
        imported=statistics.median(times["imported"] for times in warm),
        loaded=statistics.median(times["loaded"] for times in warm),
        first_draft=statistics.median(times["first_draft"] for times in warm),
        first_start=found[0]["first_draft"],
    )


def _start(model: str, dtype: str, threads: int) -> dict[str, float]:
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "dgemma.bench.start", model, dtype, str(threads)], capture_output=True, text=True
    )
    if done.returncode:
        raise DgemmaError(f"the process to be timed failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    moments: dict[str, float] = json.loads(done.stdout)
    return {name: moment - begun for name, moment in moments.items()}


def _child(model: str, dtype: str, threads: int) -> dict[str, float]:
    """What `dgemma generate` does until there is something to show."""
    import rich.live  # noqa: F401 - what shows a draft

    from dgemma.api import LLM

    imported = time.time()
    llm = LLM.load(model, dtype=dtype, threads=threads)
    loaded = time.time()
    events = llm.stream(_PROMPT)
    next(events)
    return {"imported": imported, "loaded": loaded, "first_draft": time.time()}


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
