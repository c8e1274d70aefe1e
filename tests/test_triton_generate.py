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
from dgemma.bench.gpu_model import quantise
from dgemma.engine import Engine
from dgemma.kernels import reference, scaled
from dgemma.kernels.triton_table import ROW
from dgemma.model import DiffusionGemma
from dgemma.model.device import DeviceStack, _Beside
from dgemma.quant import fp8

OPS = {
    "rms_norm", "linear", "heads", "stored_attention", "canvas_attention", "geglu", "middle", "close", "choose",
    "experts", "vocab",
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
    layers, passes = model.config.num_layers, calls["heads"] // model.config.num_layers
    assert calls["heads"] == calls["middle"] == calls["choose"] == calls["experts"] == layers * passes
    assert calls["canvas_attention"] + calls["stored_attention"] == calls["close"] > layers * passes, (
        "halves of shared passes"
    )
    assert calls["vocab"] == calls["canvas_attention"] // layers == passes, "one a step, and no pass without"


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
    """Hidden states of an encode pass and of a conditioned canvas; the weights stay those of the model.

    Rounding to bfloat16 may turn a near tie between two experts, as in a few of a hundred random canvases;
    this one has none.
    """
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9, 33])
def test_fp8_products_of_the_same_rows_are_one(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the products apart; rows rounded once; the matrices keep views, so nothing is there twice."""
    model = twins(dtype=dtype)[0]
    quantise(model, "fp8")
    attention = model.layers[0].attention  # type: ignore[union-attr]
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]  # type: ignore[union-attr, list-item]
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
    rounded: list[int] = []
    real = scaled.round_rows
    with torch.inference_mode(), kernels.use(ROW):
        apart = torch.cat([linear(x) for linear in linears], dim=-1)
        beside = _Beside(linears)
        monkeypatch.setattr(fp8, "round_rows", lambda x: (rounded.append(len(x)), real(x))[1])
        together = beside(x)
        assert rounded == [rows]
        again = torch.cat([linear(x) for linear in linears], dim=-1)
    if DEVICE.type == "cpu":
        assert torch.equal(together, apart)
    assert torch.equal(again, apart) and together.dtype is dtype
    matrix = beside._matrix
    assert isinstance(matrix, fp8.Fp8Matrix) and matrix.shape == (64, 24)
    begin, step = matrix._codes.data_ptr(), matrix._codes.stride(0)
    assert [linear.matrix._codes.data_ptr() for linear in linears] == [begin, begin + 32 * step, begin + 48 * step]
    assert torch.equal(matrix.dense(), torch.cat([linear.matrix.dense() for linear in linears]))


def test_matrices_of_unlike_kinds_are_not_one() -> None:
    model = twins()[0]
    mlp = model.layers[0].mlp  # type: ignore[union-attr]
    quantise(model, "int8wo")
    x = torch.randn(5, 24, device=DEVICE)
    with torch.inference_mode(), kernels.use(ROW):
        beside = _Beside([mlp.gate_proj, mlp.up_proj])  # type: ignore[union-attr, list-item]
        want = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=-1)  # type: ignore[union-attr, operator]
        assert beside._matrix is None and torch.equal(beside(x), want)


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
