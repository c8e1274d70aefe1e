"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Triton asks for it when a kernel is defined, which whoever is imported first may cause.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import text_kit
import torch
from hypothesis import HealthCheck, settings

from dgemma.api import LLM

# A machine that does something else for a while is no fault of the code: no test is judged by its time.
settings.register_profile("dgemma", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dgemma")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws without a generator of their own are a test's own, whatever ran before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Three threads cut the work at odd places."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random model."""
    return text_kit.save_model(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder, threads=1)


@pytest.fixture(scope="module")
def brief_rates() -> Iterator[None]:
    """Floors of little precision, for benchmarks that need one of any kind."""
    from dgemma.bench.parts import replaced
    from dgemma.bench.rates import Rates

    with replaced(Rates, "seconds", 0.001), replaced(Rates, "least", 2), replaced(Rates, "buffer", 8_000_000):
        yield
