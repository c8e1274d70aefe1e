"""One pass for what a tick encodes and for the step that it takes: every answer is what two passes give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, WINDOW, config, prompt, request, run, tiny_config, tiny_model, tokens
from test_constrained import ask as constrained

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.config import EngineConfig
from dgemma.control import Control
from dgemma.control.hooks import StepView
from dgemma.engine import Engine, Request, Runner
from dgemma.engine.runner import Draws
from dgemma.errors import ConfigError
from dgemma.events import Event, Finished, Scored
from dgemma.kernels import native
from dgemma.kernels.packed import has_bfloat16
from dgemma.model import DiffusionGemma
from dgemma.quant import make_format
from dgemma.quant.sites import install, weight_sites

DENSE = {"num_experts": 0, "top_k_experts": 0, "expert_size": 0}
COMPILED = native.load()
ABLE = has_bfloat16() or (COMPILED is not None and COMPILED.multiplies(torch.bfloat16, 2))
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not ABLE, reason="no bfloat16 products on this CPU"))
WARM = EngineConfig(prefix_block=4, encode_chunk=12)
LENGTHS = [1, WINDOW - 1, WINDOW, 12, 13, 3 * WINDOW, 25]
LAYERS = tiny_config().layers[:2]  # a sliding and a full one


def rounded(model: DiffusionGemma) -> DiffusionGemma:
    """The same in int8dyn."""
    kind, matrices = make_format("int8dyn", None), {}
    for name, shape in weight_sites(model).items():
        weights = model.get_parameter(name).detach().view(-1, *shape[-2:])
        matrices[name] = [kind.matrix(kind.quantize(weight), (shape[-2], shape[-1])) for weight in weights]
    install(model, matrices)
    return model


def pin_late(view: StepView) -> None:
    if (view.canvas, view.step) == (0, 2):
        view.pin(CANVAS + 1, 77)
        view.ban(9)


def mixed() -> list[Request]:
    """Prompts on both sides of chunks, blocks and the window; canvases of several widths, rules and demands."""
    items = [request(length, seed=length, max_new_tokens=CANVAS + 3, max_denoising_steps=3) for length in LENGTHS]
    items += [
        request(13, seed=1, max_new_tokens=3, narrow="short", canvas_length=16, watch=True),
        request(5, seed=2, max_new_tokens=40, narrow="adaptive", canvas_length=32),
        request(7, seed=3, sampler="confidence", convention="jax", top_k=5, top_p=0.9, stop_tokens=(5, 6, 7, 8)),
        request(9, seed=4, presence_penalty=1.0, max_denoising_steps=1, confidence_threshold=None, max_new_tokens=30),
        constrained("[A-Z]+[0-9]{2,4}", length=14, max_new_tokens=20, watch=True),
    ]
    for seed, control in enumerate([Control(pins=((2, 77), (CANVAS, 78))), Control(hook=pin_late)]):
        items.append(Request(prompt=prompt(10), config=config(seed=seed), watch=True, control=control))
    for length, count in ((1, 0), (12, 3), (30, 2)):
        items.append(replace(request(length, seed=5, max_new_tokens=2 * CANVAS + 1), logprobs=count))
    return items


def answers(model: DiffusionGemma, usual: EngineConfig, fuse: bool) -> tuple[Engine, list[Event]]:
    engine = Engine(model, replace(usual, fuse=fuse), identity="one")
    joins = {6 + number: item for number, item in enumerate(mixed()[:4])}
    return engine, run(engine, mixed(), joins)


def contents(engine: Engine) -> dict[bytes, list[torch.Tensor]]:
    """What the prefix store holds."""
    cache = engine.new_cache()
    return {
        key: [part.clone() for piece in cache._pieces(node.kv) for part in piece]
        for key, node in engine.prefixes._nodes.items()
    }


@pytest.mark.parametrize("usual", [
    WARM, replace(WARM, max_batch_tokens=40, max_batch_rows=7), replace(WARM, kv_cache_dtype="fp8"),
    EngineConfig(prefix_cache_tokens=0, encode_chunk=5),
], ids=["warm", "tight", "fp8", "chunks of 5"])  # fmt: skip
def test_one_pass_gives_every_bit_of_two(usual: EngineConfig) -> None:
    """Events in their order, counts, and what stays for others."""
    model = tiny_model(layers=LAYERS)
    (one, got), (two, expected) = answers(model, usual, True), answers(model, usual, False)
    assert got == expected
    assert 0 < one.counters.shared_passes <= one.counters.encode_passes and two.counters.shared_passes == 0
    assert replace(one.counters, shared_passes=0) == two.counters
    assert replace(one.load, shared_passes=0) == two.load
    kept, wanted = contents(one), contents(two)
    assert kept.keys() == wanted.keys() and (kept or not usual.prefix_cache_tokens)
    for key, parts in kept.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, wanted[key], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("changes", [{}, DENSE, {"canvas_positions": 64}], ids=["experts", "dense", "places"])
@pytest.mark.parametrize("made", [lambda model: model, rounded], ids=["plain", "int8dyn"])
def test_so_it_does_on_other_models(
    made: Callable[[DiffusionGemma], DiffusionGemma], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model = made(tiny_model(dtype, layers=LAYERS, **changes))
    items = [
        replace(request(n, seed=n, max_new_tokens=CANVAS + 1, watch=True), logprobs=1) for n in (1, 13, 3 * WINDOW)
    ]
    got, expected = (run(Engine(model, replace(WARM, fuse=fuse)), items) for fuse in (True, False))
    assert got == expected


def test_the_plain_layers_agree_up_to_rounding() -> None:
    model = tiny_model(torch.float64, layers=LAYERS)
    with kernels.use({}):
        got, expected = (answers(model, WARM, fuse)[1] for fuse in (True, False))
    assert [(type(event), event.request) for event in got] == [(type(event), event.request) for event in expected]
    for number in {event.request for event in got}:
        assert tokens(got, number) == tokens(expected, number)
    scored = [
        [v for event in events if isinstance(event, Scored) for v in event.logprobs] for events in (got, expected)
    ]
    assert scored[0] == pytest.approx(scored[1], abs=1e-6) and scored[0]


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["experts", "dense"])
@torch.inference_mode()
def test_the_row_of_a_gpu_agrees_up_to_rounding(changes: dict[str, Any]) -> None:
    """A shared pass against an encode and a denoise pass: under an interpreter, whole answers would take minutes."""
    triton_kit = pytest.importorskip("triton_kit")
    from dgemma.kernels.triton_table import ROW

    found, device = [], triton_kit.DEVICE
    canvas, fresh = torch.arange(20, 20 + CANVAS, device=device), WINDOW + 1
    draws = Draws(torch.ones(CANVAS), torch.full((CANVAS, 1), 0.5, dtype=torch.float64), torch.ones(CANVAS),
                  torch.zeros(CANVAS, dtype=torch.int64))  # fmt: skip
    draws = Draws(
        *(getattr(draws, name).to(device) for name in ("temperature", "uniforms", "draw_temperature", "top_k"))
    )
    with kernels.use(ROW):
        runner = Runner(tiny_model(layers=LAYERS, **changes).to(device))
        for shared in (True, False):
            cache = KVCache(runner.model.config, device, runner.dtype, 2 * CANVAS)
            jobs = [(cache.segments([fresh])[0], prompt(fresh))]
            if shared:
                hidden, out = runner.both(jobs, [(cache.ahead(fresh), canvas)], [None], draws)
            else:
                hidden = runner.encode(jobs)
                cache.advance(fresh)
                out = runner.denoise([(cache, canvas)], [None], draws)
            found.append((hidden[0], out.hidden, out.entropy))
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() < 1e-4 * two.abs().max()


# -- what a pass is made of ----------------------------------------------------------


@pytest.mark.parametrize("fresh", [1, 2, WINDOW, CANVAS + 1])
@pytest.mark.parametrize("length", [0, 1, WINDOW - 1, WINDOW, 3 * WINDOW])
@torch.inference_mode()
def test_a_canvas_sees_what_the_same_pass_stores(length: int, fresh: int) -> None:
    """Behind rings that wrap; beside a canvas of another request and one more chunk."""
    runner, found = Runner(tiny_model(layers=LAYERS)), []
    canvas, soft = torch.arange(20, 20 + CANVAS), torch.linspace(-1, 1, CANVAS * 24).view(CANVAS, 24)
    rows = 2 * CANVAS
    draws = Draws(torch.ones(rows), torch.full((rows, 1), 0.5, dtype=torch.float64), torch.ones(rows),
                  torch.zeros(rows, dtype=torch.int64))  # fmt: skip
    for shared in (True, False):
        own, other, third = (KVCache(runner.model.config, runner.device, runner.dtype, 2 * CANVAS) for _ in range(3))
        for begin in range(0, length, CANVAS):
            runner.encode([(own, prompt(length)[begin : begin + CANVAS])])
        runner.encode([(other, prompt(5))])
        jobs = [(own.segments([fresh])[0], prompt(fresh, 1)), (third, prompt(7))]
        if shared:
            views, softs = [(own.ahead(fresh), canvas), (other, canvas)], [None, soft]
            hidden, out = runner.both(jobs, views, softs, draws)
            own.advance(fresh)
        else:
            hidden = runner.encode(jobs)
            own.advance(fresh)
            out = runner.denoise([(own, canvas), (other, canvas)], [None, soft], draws)
        stored = [part for layer in range(2) for part in own.prefix(layer)]
        found.append((*hidden, out.hidden, out.entropy, out.soft, *stored))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def counting(method: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return method(*args, **kwargs)

    return call


@pytest.mark.parametrize("canvases", [1, 4])
@pytest.mark.parametrize("steps", [1, 3])
def test_passes_are_as_many_as_steps(canvases: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for fuse, forwards in ((True, canvases * steps), (False, canvases * steps + canvases)):
        engine, calls = Engine(tiny_model(), replace(NO_REUSE, fuse=fuse)), []
        for name in ("encode", "denoise", "both"):
            monkeypatch.setattr(engine.runner.model, name, counting(getattr(engine.runner.model, name), calls))
        limits = {"max_denoising_steps": steps, "confidence_threshold": None, "max_new_tokens": canvases * CANVAS}
        run(engine, [request(5, **limits)])
        counted = engine.counters
        assert len(calls) == counted.encode_passes + counted.denoise_passes - counted.shared_passes == forwards
        assert counted.shared_passes == (canvases if fuse else 0)


def test_only_the_last_chunk_of_a_prompt_has_a_canvas() -> None:
    engine = Engine(tiny_model(), EngineConfig(prefix_cache_tokens=0, encode_chunk=12))
    engine.add(request(30, max_denoising_steps=2, confidence_threshold=None, max_new_tokens=CANVAS))
    seen = []
    while engine.has_work:
        engine.tick()
        counted = engine.counters
        seen.append((counted.encode_passes, counted.denoise_passes, counted.shared_passes))
    assert seen == [(1, 0, 0), (2, 0, 0), (3, 1, 1), (3, 2, 1)]


@pytest.mark.parametrize("mode", ["ar", "verified"])
def test_other_modes_keep_their_passes_apart(mode: str) -> None:
    """Two passes as long as one of them takes part; with it gone, one."""
    engine = Engine(tiny_model(), NO_REUSE)
    engine.add(request(5, mode=mode, max_new_tokens=4))
    engine.add(request(5, seed=1, max_new_tokens=9 * CANVAS, max_denoising_steps=1, confidence_threshold=None))
    gone = False
    while engine.has_work:
        before = engine.counters
        gone |= any(isinstance(event, Finished) and event.request == 1 for event in engine.tick())
        fresh = engine.counters.shared_passes - before.shared_passes
        assert not fresh or gone
    assert gone and engine.counters.shared_passes > 0


@pytest.mark.parametrize("limit", [4, 30])
def test_a_pass_for_both_is_no_longer_than_allowed(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), EngineConfig(prefix_cache_tokens=0, encode_chunk=10, max_batch_tokens=limit))
    both, sizes = engine.runner.both, []

    def seen(encode: Any, canvases: Any, *rest: Any) -> Any:
        sizes.append(sum(len(ids) for _, ids in encode) + sum(len(ids) for _, ids in canvases))
        return both(encode, canvases, *rest)

    monkeypatch.setattr(engine.runner, "both", seen)
    items = [request(length, seed=length) for length in (2, 9, 10, 25)]
    events = run(engine, items)
    assert events == run(Engine(engine.runner.model, replace(engine.config, fuse=False)), items)
    assert max(sizes, default=0) <= limit and bool(sizes) is (limit > CANVAS)


def test_a_shared_pass_that_failed_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has happened to caches and canvases, whether the network fell over or what comes behind it."""
    items = [request(length, seed=length) for length in (3, 13)]
    expected = run(Engine(tiny_model(), WARM), items)
    for name in ("canvas_attention", "vocab"):
        engine, calls = Engine(tiny_model(), WARM), []
        for item in items:
            engine.add(item)
        real = getattr(kernels, name)

        def failing(*args: Any, real: Any = real, calls: list[int] = calls, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise MemoryError
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, failing)
            with pytest.raises(MemoryError):
                while True:
                    engine.tick()
            assert run(engine) == expected


def test_the_option_is_a_yes_or_a_no() -> None:
    with pytest.raises(ConfigError, match="fuse must be True or False, got 1"):
        EngineConfig(fuse=1)  # type: ignore[arg-type]
