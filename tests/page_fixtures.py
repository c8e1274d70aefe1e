"""Fixtures of the tests of the page: the shipped model, its server, a browser, and readers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from page_kit import Reader, browsing, missing, serving

from dgemma.api import LLM


@pytest.fixture(scope="module")
def llm() -> LLM:
    model = LLM.load("default")
    model.generation = model.generation.with_(max_new_tokens=64)  # four canvases are enough to walk through
    return model


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with serving(llm) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if lack := missing():
        pytest.skip(lack)
    with browsing() as browser:
        yield browser


@pytest.fixture
def reader(browser: Any, url: str) -> Iterator[Callable[..., Reader]]:
    """Opens readers; whatever they did, the page stayed at home and broke nothing."""
    opened: list[Reader] = []

    def open_reader(address: str = url, **context: Any) -> Reader:
        # Colours are read at once: no transition may be under way.
        opened.append(Reader(browser, address, **({"reduced_motion": "reduce"} | context)))
        return opened[-1]

    yield open_reader
    for one in opened:
        one.context.close()
        assert one.outside == []
        assert one.faults == []
