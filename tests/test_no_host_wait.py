"""A denoise pass through the GPU's row asks the device nothing: no op in it makes the host wait for an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, prompt, request, tiny_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_kit import DEVICE

from dgemma import kernels
from dgemma.bench.gpu_model import quantise
from dgemma.engine import Engine
from dgemma.engine.batch import CanvasBatch
from dgemma.engine.runner import Draws
from dgemma.kernels.triton_table import ROW

WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "_unique2", "equal"}
"""Ops whose answer, or its size, the host must know before it can go on."""


class Asking(TorchDispatchMode):
    """Names of all ops, and of those that wait. Copies to the host count."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(op.overloadpacket.__name__)
        if self.seen[-1] == "index":
            # A mask as an index: how many rows there will be is the device's secret.
            self.seen += ["nonzero" for at in args[1] if at is not None and at.dtype in (torch.bool, torch.uint8)]
        return op(*args, **(kwargs or {}))

    @property
    def waits(self) -> set[str]:
        return WAITING & set(self.seen)


def one_pass(kind: str | None, dtype: torch.dtype, top_k: Tensor | None) -> Asking:
    """Ops of one step of two canvases behind prompts of unlike lengths, as the engine has it done."""
    model = tiny_model(dtype=dtype, layers=tiny_config().layers[:2]).to(DEVICE)
    if kind is not None:
        quantise(model, kind)
    widths = 8, 5
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 128, (width,), generator=generator).to(DEVICE) for width in widths]
    soft = [torch.randn(widths[0], 24, generator=generator).to(DEVICE, dtype), None]
    draws = Draws(
        temperature=torch.full((13,), 0.7, device=DEVICE),
        uniforms=torch.rand(13, 1, dtype=torch.float64, generator=generator).to(DEVICE),
        draw_temperature=torch.ones(13, device=DEVICE),
        top_k=top_k,
    )
    with kernels.use(ROW):
        engine = Engine(model, NO_REUSE)
        caches = [engine.new_cache(), engine.new_cache()]
        for cache, length in zip(caches, (7, 4), strict=True):
            engine.runner.encode([(cache, prompt(length))])
        with Asking() as asking:
            engine.runner.denoise(list(zip(caches, ids, strict=True)), soft, draws)
    return asking


CASES = [(None, torch.float32), ("fp8", torch.bfloat16), ("int4wo", torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_step_asks_nothing(kind: str | None, dtype: torch.dtype) -> None:
    asking = one_pass(kind, dtype, None)
    assert not asking.waits, asking.waits
    assert {"embedding", "cat"} <= set(asking.seen), "the mode sees the pass"


def test_a_question_is_seen() -> None:
    """Top-k is one: which rows want it must be known before their logits are computed anew."""
    asking = one_pass(None, torch.float32, torch.zeros(13, dtype=torch.int64, device=DEVICE))
    assert asking.waits
    with Asking() as asking:
        mask = torch.arange(4, device=DEVICE) > 1
        mask[mask]
    assert asking.waits == {"nonzero"}


@pytest.mark.parametrize(("limits", "given"), [((0, 0), None), ((0, 3), [0] * CANVAS + [3] * CANVAS)])
def test_top_k_is_given_only_where_a_row_asks(
    limits: tuple[int, int], given: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Draws] = []
    real = CanvasBatch.draws
    monkeypatch.setattr(CanvasBatch, "draws", lambda self: (made.append(real(self)), made[-1])[1])
    engine = Engine(tiny_model(), NO_REUSE)
    for number, limit in enumerate(limits):
        engine.add(request(4, number, top_k=limit))
    while not made:
        engine.tick()
    top_k = made[0].top_k
    assert (None if top_k is None else top_k.tolist()) == given


def test_no_top_k_is_a_top_k_of_nothing() -> None:
    """Same results of every row of the table, so a row does not notice who asks beside it."""
    generator = torch.Generator().manual_seed(0)
    hidden, embed = torch.randn(6, 24, generator=generator), torch.randn(300, 24, generator=generator)
    uniforms = torch.rand(6, 1, dtype=torch.float64, generator=generator)
    given = hidden, embed, 30.0, torch.full((6,), 0.7), uniforms, torch.ones(6)
    for row in (kernels.TABLE["cpu"], {}):
        with kernels.use(row):
            without, zero = (kernels.vocab(*given, limit) for limit in (None, torch.zeros(6, dtype=torch.int64)))
        assert all(torch.equal(value, getattr(zero, name)) for name, value in vars(without).items())
