"""The floor: what an op must do is counted right, every candidate computes the op it is timed for, and the formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from engine_kit import tiny_config, tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dgemma.bench import rates
from dgemma.bench.floor import PARTS, Op, Routing, denoise_ops, encode_floor, encode_ops, measure_floor, step_floor
from dgemma.bench.rates import Core, Product, Rates, Timing
from dgemma.cache import KVCache
from dgemma.config import ModelConfig
from dgemma.engine import Runner
from dgemma.engine.attend import DenoiseAttend
from dgemma.kernels.packed import has_bfloat16

CPU = torch.device("cpu")


class Known(Rates):
    """A machine of 1 GFLOP/s, `memory` bytes a second, and caches ten times as fast."""

    def __init__(self, memory: float) -> None:
        super().__init__(CPU, torch.float32)
        self._memory = memory

    def time(self, what: Product | Core) -> Timing:
        return Timing(what.flops / 1e9, "known")

    def bandwidth(self, size: int | None = None) -> float:
        return self._memory if size is None else 10 * self._memory


def flops(config: ModelConfig, prefix: int, widths: list[int], hit: float | None = None) -> float:
    ops = denoise_ops(config, prefix, widths, 4, Routing(hit=hit))
    return sum(op.count * op.work.flops for op in ops if op.work)


@pytest.mark.parametrize(("prefix", "widths"), [(5, [16]), (40, [16]), (40, [8, 8])])
def test_flops_are_those_that_torch_counts(prefix: int, widths: list[int]) -> None:
    """One step of the reference path in float64, head and soft embedding included."""
    config = tiny_config()
    model = tiny_model().double()
    runner, caches = Runner(model), []
    for _ in widths:
        cache = KVCache(config, CPU, torch.float64, 64)
        runner.encode([(cache, list(range(3, 3 + prefix)))])
        cache.length = prefix
        caches.append(cache)
    rows = sum(widths)
    ids, soft = torch.arange(3, 3 + rows), torch.randn(rows, config.hidden_size, dtype=torch.float64)
    counts = []
    handles = [
        block.router.register_forward_hook(lambda module, x, out: counts.append(out[1].unique().numel()))
        for block in model.layers
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.denoise(ids, torch.arange(prefix, prefix + rows), DenoiseAttend(caches, widths), soft)
        model.soft_embedding(model.logits(hidden))
    for handle in handles:
        handle.remove()
    # Rounding experts' rows to a mean is the only thing that is not exact.
    loose = 4.0 * len(model.layers) * config.num_experts * config.hidden_size * config.expert_size * 3
    assert flops(config, prefix, widths, sum(counts) / len(counts)) == pytest.approx(
        counter.get_total_flops(), abs=loose
    )
    assert loose < 0.05 * counter.get_total_flops()


def test_sliding_layers_see_their_window_only() -> None:
    config = tiny_config()
    seen = {
        op.work.keys for op in denoise_ops(config, 100, [16], 4) if isinstance(op.work, Core) and "sliding" in op.name
    }
    assert seen == {config.sliding_window - 1 + 16}
    full = {op.work.keys for op in denoise_ops(config, 100, [16], 4) if isinstance(op.work, Core) and "full" in op.name}
    assert full == {116}


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 50])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (5, 5), (4, 9)])
def test_pairs_are_those_the_mask_leaves(queries: int, keys: int, window: int | None) -> None:
    core = Core(queries, keys, 4, 2, 8, causal=True, window=window)
    q, k = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    seen = (k <= q) & (k > q - (window or keys + 1))
    assert core.pairs == int(seen.sum())
    mask = core.mask(CPU)
    assert queries == 1 or (mask is not None and torch.equal(mask, seen))
    assert core.flops == 4.0 * 4 * 8 * core.pairs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [Product(7, 24, 16), Product(16, 8, 40, turned=True)])
def test_every_product_is_the_same_product(shape: Product, dtype: torch.dtype) -> None:
    found = {name: call() for name, call, _ in rates._products(shape, CPU, dtype)}
    onednn = {"oneDNN", "oneDNN, prepacked"} if dtype is torch.float32 or has_bfloat16() else {"oneDNN, float32"}
    assert {"F.linear", "mm(out=)"} | onednn == set(found)
    for out in found.values():
        assert isinstance(out, Tensor) and out.shape == (shape.rows, shape.outputs)
        assert (out - found["F.linear"]).abs().max() < 1e-4 if dtype is torch.float32 else 0.3


@pytest.mark.parametrize(
    "core",
    [
        Core(6, 11, 4, 2, 8),
        Core(6, 6, 4, 1, 8, causal=True),
        Core(6, 11, 4, 2, 8, causal=True),
        Core(6, 11, 4, 2, 8, causal=True, window=4),
    ],
)
def test_every_attention_is_the_same_attention(core: Core) -> None:
    found = {}
    for name, call, _ in rates._cores(core, CPU, torch.float32):
        out = call()
        whole = torch.stack(out) if isinstance(out, list) else out
        assert isinstance(whole, Tensor)
        found[name] = whole.reshape(core.heads, core.queries, core.dim)
    assert len(found) == 4
    for out in found.values():
        assert (out - found["SDPA"]).abs().max() < 1e-5


def test_an_op_costs_the_larger_of_its_work_and_its_bytes() -> None:
    work = Product(10, 100, 1000)  # 2 MFLOP: 2 ms
    ops = [
        Op(part="mlp", name="computes", count=3, work=work, bytes=1e6),
        Op(part="mlp", name="reads", count=2, work=work, bytes=5e6),
        Op(part="norms", name="moves", near=4e7),
    ]
    floor = measure_floor(ops, Known(1e9), 10, 0)
    assert [line.ms for line in floor.lines] == pytest.approx([3 * 2.0, 2 * 5.0, 4.0])
    assert [line.by for line in floor.lines] == ["known", "memory", "cache"]
    assert floor.ms == pytest.approx(20) and floor.parts["mlp"] == pytest.approx(16)
    assert floor.lines[0].gflops == pytest.approx(0.006) and floor.lines[0].megabytes == pytest.approx(3)


def test_floor_knows_every_part_and_grows_with_the_work() -> None:
    config, machine = tiny_config(), Known(1e15)
    floor = step_floor(config, machine, 20, [16])
    assert set(floor.parts) == set(PARTS) and math.isclose(sum(floor.parts.values()), floor.ms)
    assert min(floor.parts[part] for part in PARTS if part != "norms") > 0
    twice = step_floor(replace(config, vocab_size=2 * config.vocab_size), machine, 20, [16])
    assert twice.parts["vocabulary"] == pytest.approx(2 * floor.parts["vocabulary"], rel=1e-6)
    assert twice.parts["mlp"] == floor.parts["mlp"]
    assert step_floor(config, machine, 40, [16]).parts["attention"] > floor.parts["attention"]
    dense = step_floor(replace(config, num_experts=0, top_k_experts=0, expert_size=0), machine, 20, [16])
    assert dense.parts["experts"] == 0


def test_a_batch_reads_weights_once() -> None:
    slow = Known(1e3)  # so that bytes decide
    config = tiny_config()
    one, four = (step_floor(config, slow, 20, [4] * count, Routing(hit=4)) for count in (1, 4))
    for part in ("projections", "mlp", "experts", "vocabulary"):
        assert four.parts[part] == pytest.approx(one.parts[part], rel=1e-4)
    assert four.parts["attention"] == pytest.approx(4 * one.parts["attention"])


def test_encoding_has_no_head_and_no_signal() -> None:
    floor = encode_floor(tiny_config(), Known(1e15), 0, 20)
    assert floor.parts["vocabulary"] == 0 and floor.parts["mlp"] > 0
    names = {op.name for op in encode_ops(tiny_config(), 0, 20, 4)}
    assert not any("self-conditioning" in name for name in names)


def test_chance_hits_as_many_experts_as_it_should() -> None:
    config = tiny_config()
    torch.manual_seed(0)
    for rows in (1, 2, 40):
        picks = [
            torch.rand(rows, config.num_experts).topk(config.top_k_experts).indices.unique().numel() for _ in range(400)
        ]
        hit, each = Routing().of(config, rows)
        assert abs(hit - sum(picks) / 400) < 0.6
        assert abs(hit * each - rows * config.top_k_experts) <= hit


def test_a_long_product_counts_all_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, seen = Rates(CPU, torch.float32), []
    monkeypatch.setattr(rates, "CHUNK", 16)
    monkeypatch.setattr(rates, "_products", lambda shape, *_: seen.append(shape) or iter([]))
    monkeypatch.setattr(machine, "_best", lambda _: Timing(1.0, "x"))
    assert machine.time(Product(4, 16, 8)).seconds == 1.0
    assert machine.time(Product(4, 64, 8)).seconds == 1.0  # in one piece it was faster than 4 pieces
    assert seen[1:] == [Product(4, 16, 8), Product(4, 64, 8)]
    monkeypatch.setattr(rates, "_WHOLE", 0)
    assert machine.time(Product(4, 8, 72, turned=True)).seconds == 4.5
    assert seen[-1] == Product(4, 8, 16, turned=True)


def test_the_better_of_two_measurements_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, times = Rates(CPU, torch.float32), iter([3.0, 2.0, 5.0])
    monkeypatch.setattr(machine, "_best", lambda _: Timing(next(times), "x"))
    what = Product(2, 2, 2)
    assert machine.time(what).seconds == 3.0
    machine.again()
    assert machine.time(what).seconds == 2.0
    machine.again()
    assert machine.time(what).seconds == 2.0


def test_measured_rates_are_of_this_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "buffer", 16_000_000)
    machine = Rates(CPU, torch.float32)
    assert 2e8 < machine.bandwidth() < 2e12
    product = Product(64, 256, 256)
    assert 1e8 < product.flops / machine.time(product).seconds < 1e13
