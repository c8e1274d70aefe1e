"""What the tests of the Triton kernels found, as a table: for each test how many cases, and its largest error.

An error is the largest difference from float64 (or from what the test compares with, where that is another kernel), as
a share of the largest number that should be there; of experts, the norm of the difference as a share of the norm.
Without a CUDA device the kernels run in Triton's interpreter.

    python scripts/interpreter_report.py [--json FILE] [-k EXPRESSION]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
FILES = [
    *sorted(map(str, TESTS.glob("test_triton_*.py"))),
    str(TESTS / "test_graphs.py"),
    str(TESTS / "test_no_host_wait.py"),
    str(TESTS / "test_pretend_cuda.py"),
]
sys.path[:0] = [str(ROOT), str(TESTS)]


class Report:
    """A pytest plugin that listens to what the tests call an error."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.worst: dict[str, dict[str, float]] = defaultdict(dict)
        self._now = ""

    def pytest_configure(self) -> None:
        import triton_kit

        for name in ("error", "norm_error"):
            setattr(triton_kit, name, partial(self._heard, getattr(triton_kit, name)))

    def _heard(self, measure: Callable[..., float], got: Any, exact: Any) -> float:
        value = measure(got, exact)
        kind, worst = str(got.dtype).removeprefix("torch."), self.worst[self._now]
        worst[kind] = max(value, worst.get(kind, 0.0))
        return value

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._now = nodeid.partition("[")[0].rpartition("/")[2]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.cases[self._now] += 1
            self.failed[self._now] += report.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("-k", default="", help="only tests whose names fit, as pytest has it")
    arguments = parser.parse_args()
    report = Report()
    status = pytest.main(["-q", "--no-header", "-k", arguments.k, *FILES], plugins=[report])
    rows = {
        name: {"cases": cases, "failed": report.failed[name], "worst": report.worst[name]}
        for name, cases in report.cases.items()
    }
    print("\n| test | cases | failed | worst, float32 | worst, bfloat16 |\n|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        file, _, test = name.partition("::")
        worst = [f"{row['worst'][kind]:.1e}" if kind in row["worst"] else "" for kind in ("float32", "bfloat16")]
        words = test.removeprefix("test_").replace("_", " ")
        part = file.removeprefix("test_").removeprefix("triton_").removesuffix(".py")
        print(f"| {part}: {words} | {row['cases']} | {row['failed']} | {worst[0]} | {worst[1]} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
