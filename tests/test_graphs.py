"""Recorded steps: the same answers as step by step, by a recording that never asks Python again (`tape`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import CANVAS, WINDOW, of, request, run, tiny_model, tokens
from tape import tape
from triton_kit import DEVICE, Random

from dgemma import kernels
from dgemma.config import EngineConfig
from dgemma.control import Control
from dgemma.engine import Engine
from dgemma.engine.graphs import CudaRecorder
from dgemma.events import Committed, Event
from dgemma.kernels import reference
from dgemma.kernels.triton_table import ROW
from dgemma.model import DiffusionGemma

RECORD = CudaRecorder() if DEVICE.type == "cuda" else tape
PLAIN = {op: getattr(reference, op) for op in ROW if op != "middle"}
LANES = EngineConfig(graph_rows=2, graph_tokens=64, prefix_cache_tokens=0)
CALM = {"t_min": 0.4, "t_max": 0.8}
LAYERS = tiny_model().config.layers[:2]


def model() -> DiffusionGemma:
    return tiny_model(layers=LAYERS, num_experts=0, top_k_experts=0, expert_size=0).to(DEVICE)


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """The reference's ops and no experts: what counts here is what a recording knows, not how it computes."""
    with kernels.use(PLAIN):
        yield


def engine(config: EngineConfig = LANES) -> Engine:
    return Engine(model(), config, record=RECORD)


def ordinary(config: EngineConfig = LANES) -> Engine:
    return Engine(model(), replace(config, graph_rows=0))


def same(got: list[Event], expected: list[Event]) -> bool:
    """Tokens, steps and reasons are equal; probabilities nearly, because a mask may add in another order."""
    assert [type(event) for event in got] == [type(event) for event in expected]
    for left, right in zip(got, expected, strict=True):
        for name in left.__slots__:
            ours, theirs = getattr(left, name), getattr(right, name)
            numbers = isinstance(theirs, tuple) and theirs and isinstance(theirs[0], float)
            assert ours == (pytest.approx(theirs, abs=1e-4) if numbers else theirs), name
    return True


REQUESTS = {
    "stops by itself": {},
    "fixed steps": {"stability_threshold": None, "max_denoising_steps": 4},
    "stops at the first": {"stability_threshold": 0, "confidence_threshold": 99.0},
    "jax": {"convention": "jax"},
    "confidence": {"sampler": "confidence", "max_denoising_steps": 5},
    "ancestral, drawn": {"sampler": "ancestral", "temperature": 0.7, "max_denoising_steps": 4},
    "a choice and a large seed": {"choice": 3, "seed": (1 << 64) - 5},
    "ends": {"stop_tokens": tuple(range(0, 128, 3))},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_is_the_same(name: str) -> None:
    changes: dict[str, Any] = {"max_denoising_steps": 6, "max_new_tokens": CANVAS + 3} | CALM | REQUESTS[name]
    for length in (1, WINDOW + CANVAS) if name == "stops by itself" else (WINDOW,):
        item = request(length)
        item = replace(item, config=item.config.with_(**changes))
        recorded, plain = engine(), ordinary()
        got, expected = run(recorded, [item]), run(plain, [item])
        assert same(got, expected) and tokens(got)
        steps = sum(event.steps for event in got if isinstance(event, Committed))
        assert recorded.graphs is not None and recorded.graphs.replayed == steps - 1, "all but that with the prompt"
        canvases = sum(isinstance(event, Committed) for event in got)
        assert recorded.load == plain.load and recorded.counters.shared_passes == canvases


TWO = {"max_denoising_steps": 3, "max_new_tokens": CANVAS}
AFTER = {"max_denoising_steps": 2, "max_new_tokens": 2 * CANVAS, "stability_threshold": None}


@pytest.mark.parametrize(("lengths", "changes", "dtype"), [
    ((3, WINDOW + CANVAS), TWO, "auto"), ((CANVAS,), AFTER, "auto"), ((CANVAS,), AFTER, "fp8")
])  # fmt: skip
def test_the_kernels_give_the_same_bits(lengths: tuple[int, ...], changes: dict[str, Any], dtype: str) -> None:
    """Through the GPU's row, with experts: two canvases a pass, and a canvas that is encoded in two blocks with the
    first step of the next. Nothing is rounded otherwise than step by step.
    """
    items = [request(n, seed=n, **(changes | CALM)) for n in lengths]
    config = replace(LANES, kv_cache_dtype=dtype, prefix_block=CANVAS // 2, prefix_cache_tokens=100)
    with kernels.use(ROW):
        recorded, plain = (
            Engine(tiny_model(layers=LAYERS).to(DEVICE), replace(config, graph_rows=rows), record=RECORD)
            for rows in (2, 0)
        )
        assert run(recorded, items) == run(plain, items)
    assert recorded.prefixes.tokens == plain.prefixes.tokens > 0
    assert recorded.graphs is not None and recorded.graphs.replayed == 4 - len(items)


def test_many_canvases_of_growing_widths() -> None:
    """Over and over the ring of a sliding layer; a canvas of another width than the one that is encoded with it."""
    item = request(2, max_denoising_steps=2, narrow="adaptive", max_new_tokens=50, canvas_length=16, **CALM)
    recorded, plain = engine(), ordinary()
    got = run(recorded, [item])
    assert same(got, run(plain, [item])) and recorded.load == plain.load
    widths = [len(event.tokens) for event in got if isinstance(event, Committed)]
    assert len({*widths}) > 1 and len(widths) > 3
    assert recorded.graphs is not None and recorded.graphs.replayed == 2 * len(widths) - 1


@pytest.mark.parametrize(
    ("config", "replayed"),
    [({"fuse": False}, 4), ({"max_batch_tokens": 2 * CANVAS - 1}, 4), ({"encode_chunk": CANVAS - 1}, 5)],
)
def test_passes_that_are_not_to_be_shared_are_not(config: dict[str, Any], replayed: int) -> None:
    """Where a chunk is shorter than a canvas, only its end is encoded with the next one."""
    item = request(2, max_denoising_steps=3, stability_threshold=None, max_new_tokens=2 * CANVAS, **CALM)
    recorded, plain = (make(replace(LANES, **config)) for make in (engine, ordinary))
    assert same(run(recorded, [item]), run(plain, [item])) and recorded.load == plain.load
    assert recorded.graphs is not None and recorded.graphs.replayed == replayed


@pytest.mark.parametrize("start, count", [(0, 0), (0, 1), (3, 5), (5, 6), (7, 7), (2, 3)])
def test_attention_reads_on_the_device_where_a_prefix_lies(start: int, count: int) -> None:
    """Bit for bit as when it is told, whatever stands in free slots; the reference nearly."""
    fresh = Random(start + count)
    q, k, v = fresh(3, 4, 8), fresh(3, 2, 8), fresh(3, 2, 8)
    old_k, old_v = (torch.full((8, 2, 8), float("nan"), device=DEVICE) for _ in range(2))
    seen = [(start + place) % 8 for place in range(count)]
    old_k[seen], old_v[seen] = fresh(count, 2, 8), fresh(count, 2, 8)
    where = torch.tensor([start, count], device=DEVICE)
    with kernels.use(ROW):
        told = kernels.canvas_attention(q, k, v, old_k, old_v, start, count)
        for most in (8, 2000):  # more shares than it has keys for
            asked = kernels.canvas_attention(q, k, v, old_k, old_v, 0, most, where=where)
            assert torch.equal(asked, told)
    exact = reference.canvas_attention(q, k, v, old_k, old_v, 0, 8, where=where)
    assert torch.allclose(told, exact, atol=1e-5)


def test_many_at_once_and_one_after_the_other() -> None:
    """More than lanes, joining and leaving, with settings of their own, some that no recording serves."""
    items = [
        request(4, **CALM), request(9, seed=1, sampler="confidence", **CALM), request(2, seed=2, top_k=3, **CALM),
        request(7, seed=3, watch=True, **CALM), request(20, seed=4, max_new_tokens=5, **CALM),
    ]  # fmt: skip
    items = [replace(item, config=item.config.with_(max_denoising_steps=4)) for item in items]
    items.append(replace(items[0], control=Control(pins=((1, 5), (9, 6)))))
    joins = dict(enumerate(items[1:], start=2))
    got, expected = run(engine(), items[:1], joins), run(ordinary(), items[:1], joins)
    for number in range(1, len(items) + 1):
        assert same(of(got, number), of(expected, number))


@pytest.mark.parametrize("ahead", [1, 2])
def test_late_steps_change_nothing(ahead: int) -> None:
    item = request(5, max_denoising_steps=8, max_new_tokens=2 * CANVAS, **CALM)
    late, plain = engine(replace(LANES, graph_ahead=ahead)), engine()
    assert same(run(late, [item]), run(plain, [item]))
    assert late.graphs is not None and plain.graphs is not None
    assert plain.graphs.replayed <= late.graphs.replayed <= plain.graphs.replayed + 2 * ahead


def test_a_lane_is_free_again_after_an_abort() -> None:
    """And the next one there sees nothing of the one before."""
    own = engine(replace(LANES, graph_rows=1))
    own.add(request(11, max_denoising_steps=40, stability_threshold=None, **CALM))
    own.tick()
    own.tick()
    assert own.graphs is not None and own.graphs.replayed == 8, "a tick takes no more steps than that"
    own.abort(1)
    item = request(3, seed=9, max_denoising_steps=4, **CALM)
    got = [event for event in run(own, [item]) if event.request == 2]
    assert same(of(got, 2), run(ordinary(), [item]))
    assert own.graphs.replayed > 8


def test_what_is_too_long_for_a_lane_takes_the_ordinary_path() -> None:
    own, item = engine(), request(60, max_denoising_steps=3, max_new_tokens=6, **CALM)
    assert same(run(own, [item]), run(ordinary(), [item]))
    assert own.graphs is not None and own.graphs.replayed == 0


def test_recordings_are_few() -> None:
    """One serves every canvas of a width, whatever its request, step and prefix."""
    made = []

    def counting(launches: Any) -> Any:
        made.append(launches)
        return RECORD(launches)

    own = Engine(model(), LANES, record=counting)
    items = [request(n, seed=n, max_denoising_steps=3, max_new_tokens=CANVAS, **CALM) for n in (1, 5, 12)]
    for item in items:
        run(own, [item])
    assert len(made) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the tape")
def test_the_tape_knows_no_python() -> None:
    x, n = torch.zeros(3), [1]
    replay = tape(lambda: x.add_(n[0]).mul_(torch.arange(3)))
    n[0] = 100
    replay()
    assert x.tolist() == [0, 2, 6], "(x + 1) * [0, 1, 2], twice"
    for wrong in (lambda: bool(x.sum()), lambda: x[x > 0], lambda: x.add_(torch.tensor([1.0, 2.0, 3.0]))):
        with pytest.raises(AssertionError):
            tape(wrong)
