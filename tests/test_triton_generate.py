"""The whole of `generate` through the GPU's row of the kernel table, on a tiny model with experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, WINDOW, request, run, tiny_config, tiny_model, tokens
from triton_kit import DEVICE, poisoned

from dgemma import kernels
from dgemma.engine import Engine
from dgemma.kernels import reference
from dgemma.kernels.triton_table import ROW
from dgemma.model import DiffusionGemma
from dgemma.model.device import DeviceStack

OPS = {
    "rms_norm", "linear", "heads", "attention", "canvas_attention", "geglu", "middle", "close", "choose", "experts",
    "vocab",
}  # fmt: skip


# Without what a stack of its own would need: so the plain layers run, by the reference's ops only.
REAL = {op: getattr(reference, op) for op in ROW if op != "middle"}


def counted(calls: Counter[str]) -> Mapping[str, Any]:
    """The row, counting who is called."""

    def counting(op: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[op] += 1
            return ROW[op](*args, **kwargs)

        return call

    return {op: counting(op) for op in ROW}


@contextmanager
def no_fall_back(row: Mapping[str, Any] = ROW) -> Iterator[None]:
    """The row serves, and every op of the reference that has a kernel fails when called."""
    with pytest.MonkeyPatch.context() as patch, kernels.use(row):
        for op in set(ROW) - {"linear", "softcap"}:

            def fail(*args: Any, op: str = op, **kwargs: Any) -> Any:
                raise AssertionError(f"reference.{op} was called")

            patch.setattr(reference, op, fail)
        yield


def twins(**changes: Any) -> tuple[DiffusionGemma, DiffusionGemma]:
    """The same model twice: a stack moves its weights about."""
    changes = {"layers": BOTH} | changes
    return tiny_model(**changes).to(DEVICE), tiny_model(**changes).to(DEVICE)


BOTH = tiny_config().layers[:2]  # a sliding and a full one
LENGTHS = [1, WINDOW, 3 * WINDOW]
# A random model at low temperatures triples a difference at every step; these few steps amplify none past a decision.
CALM = {"t_min": 0.4, "t_max": 0.8, "max_denoising_steps": 4, "max_new_tokens": CANVAS + 2}


@pytest.fixture(scope="module")
def by_reference() -> dict[int, list[Any]]:
    """Events of each prompt length, by the reference's ops only."""
    model = twins()[0]
    with kernels.use(REAL):
        return {length: run(Engine(model, NO_REUSE), [request(length, **CALM)]) for length in LENGTHS}


@pytest.mark.parametrize("length", LENGTHS)
def test_generate_equals_the_reference_with_no_fall_back(length: int, by_reference: dict[int, list[Any]]) -> None:
    calls: Counter[str] = Counter()
    model = twins()[0]
    with no_fall_back(counted(calls)):
        events = run(Engine(model, NO_REUSE), [request(length, **CALM)])
    assert tokens(events) == tokens(by_reference[length]) and tokens(events)
    assert [type(event) for event in events] == [type(event) for event in by_reference[length]], "the same steps"
    assert set(calls) == OPS
    layers, passes = model.config.num_layers, calls["close"] // model.config.num_layers
    assert calls["heads"] == calls["middle"] == calls["choose"] == calls["experts"] == layers * passes
    assert calls["canvas_attention"] + calls["attention"] == layers * passes
    assert calls["vocab"] == calls["canvas_attention"] // layers, "one a step"


def test_several_requests_at_once_equal_the_reference() -> None:
    """Prompts of unlike lengths, a temperature and a top-k of their own; with prefix reuse."""
    items = [request(4, **CALM), request(9, **(CALM | {"temperature": 0.5})), request(2, **(CALM | {"top_k": 3}))]
    ours, theirs = twins()
    with no_fall_back():
        got = run(Engine(ours), items)
    with kernels.use(REAL):
        expected = run(Engine(theirs), items)
    for number in range(1, 4):
        assert tokens(got, number) == tokens(expected, number)


def test_a_model_without_experts() -> None:
    ours, theirs = twins(num_experts=0, top_k_experts=0, expert_size=0)
    with no_fall_back():
        got = run(Engine(ours, NO_REUSE), [request(7, **CALM)])
    with kernels.use(REAL):
        expected = run(Engine(theirs, NO_REUSE), [request(7, **CALM)])
    assert tokens(got) == tokens(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stack_equals_the_plain_layers(dtype: torch.dtype) -> None:
    """Hidden states of an encode pass and of a conditioned canvas; the weights stay those of the model."""
    model, other = twins(dtype=dtype)
    stack, ids = DeviceStack(model), torch.arange(3, 12, device=DEVICE)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    positions, soft = torch.arange(9, device=DEVICE), torch.randn(9, 24, device=DEVICE).to(dtype)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernels.attention(q, k, v)

    with torch.inference_mode(), poisoned(), kernels.use(ROW):
        got = model.encode(ids, positions, attend, stack), model.denoise(ids, positions, attend, soft, None, stack)
    with torch.inference_mode(), kernels.use(REAL):
        expected = other.encode(ids, positions, attend), other.denoise(ids, positions, attend, soft)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype is dtype
        bound = 1e-4 if dtype is torch.float32 else 0.1
        assert float((ours - theirs).abs().max()) < bound


def test_the_plain_layers_run_through_the_row_too() -> None:
    model, ids = twins()[0], torch.arange(3, 12, device=DEVICE)
    calls: Counter[str] = Counter()
    with torch.inference_mode(), no_fall_back(counted(calls)):
        model.encode(ids, torch.arange(9, device=DEVICE), lambda layer, q, k, v: kernels.attention(q, k, v))
    assert {"rms_norm", "rope", "gelu", "route", "experts", "attention"} <= set(calls)


def test_the_row_is_used_inside_only() -> None:
    with pytest.raises(ZeroDivisionError), kernels.use({"gelu": lambda x: 1 / 0}):
        kernels.gelu(torch.ones(2))
    assert kernels.find("gelu", "cpu") is kernels.TABLE["cpu"]["gelu"]
    assert kernels.row_of("cuda") == ROW and kernels.row_of("meta") == {}
    assert set(ROW) <= set(dir(reference))
