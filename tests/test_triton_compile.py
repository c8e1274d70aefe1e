"""Every Triton kernel compiles for an H100 at the shapes of the released model, and fits it. No device is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_kit  # noqa: F401  (it skips where there is no triton)

SCRIPT = Path(__file__).with_name("triton_compile.py")
SHARED = 227 * 1024
"""Bytes of shared memory that a block of threads may have on an H100."""


@pytest.fixture(scope="module", params=["bfloat16", pytest.param("float32", marks=pytest.mark.soak)])
def needs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What each kernel needs, the most of its variants."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(SCRIPT), request.param]
    ran = subprocess.run(command, env=own, cwd=SCRIPT.parent.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_every_kernel_compiles_and_fits(needs: dict[str, dict[str, int]]) -> None:
    assert {name.partition(".")[0] for name in needs} >= {
        "triton_attention", "triton_experts", "triton_norms", "triton_rope", "triton_route", "triton_vocab",
    }  # fmt: skip
    assert {name: need["shared"] for name, need in needs.items() if need["shared"] > SHARED} == {}


def test_registers_hold_what_kernels_keep(needs: dict[str, dict[str, int]], request: pytest.FixtureRequest) -> None:
    """Nothing that a thread keeps goes to memory; products in IEEE float32 may."""
    if "[float32]" in request.node.name:
        pytest.skip("slow by choice")
    ours = {name: need["stack"] for name, need in needs.items() if not name.startswith("triton_experts")}
    assert set(ours.values()) == {0}, ours
