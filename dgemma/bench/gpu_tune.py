"""Which way to cut a kernel's work is fastest on the device at hand: a few candidates each, at a model's own shapes.

A candidate that does not run, or whose result is not the reference's, is named and left out. Knows no files.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dgemma import kernels
from dgemma.bench.gpu_parts import timings
from dgemma.config import LayerConfig
from dgemma.errors import DgemmaError
from dgemma.kernels import reference, tuning
from dgemma.model import DiffusionGemma
from dgemma.model.moe import Experts

Change = Callable[[Any], Any]
CHANGES: dict[str, Sequence[Change]] = {
    "experts": (
        lambda shipped: replace(shipped, outputs=2 * shipped.outputs),
        lambda shipped: replace(shipped, rows=16),
        lambda shipped: replace(shipped, inputs=2 * shipped.inputs, stages=3),
    ),
    "vocab": (
        lambda shipped: replace(shipped, rows=2 * shipped.rows, stages=2),
        lambda shipped: replace(shipped, shares=3),
        lambda shipped: replace(shipped, inputs=2 * shipped.inputs, stages=2),
    ),
    "attention": (
        lambda shipped: replace(shipped, share=shipped.share // 2),
        lambda shipped: replace(shipped, share=2 * shipped.share),
        lambda shipped: replace(shipped, keys=2 * shipped.keys),
    ),
}
"""What is tried beside the shipped blocks, by kernel (`triton_{kernel}.py`)."""
Tensors = Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One kernel at one shape. `calls` take turns, so that no cache of the device holds what the next one reads."""

    kernel: str
    about: str
    shipped: Any
    calls: Sequence[Callable[[], Tensors]]
    want: Callable[[], Tensors]
    """What the first of them should give."""
    tolerance: float = 0.02
    """Of a relative error."""

    def candidates(self, few: bool) -> list[Any]:
        return [self.shipped, *(change(self.shipped) for change in CHANGES[self.kernel][: 1 if few else None])]


@torch.inference_mode()
def tune(trial: Trial, device: torch.device, few: bool) -> tuple[dict[str, Any], list[tuple[str, tuning.Key, Any]]]:
    """Milliseconds of a call under each candidate, and what `tuning.keep` takes of the fastest.

    `few`: two candidates and one call, for a run that only shows that it works.
    """
    want = trial.want()
    times, skipped, asked = dict[str, float](), dict[str, str](), set[tuning.Key]()
    candidates = {_label(blocks): blocks for blocks in trial.candidates(few)}
    for label, blocks in candidates.items():
        with tuning.trying(trial.kernel, blocks) as keys:
            try:
                begun = time.perf_counter()
                got = trial.calls[0]()
                first = time.perf_counter() - begun
                error = max(_error(*pair) for pair in zip(got, want, strict=True))
                if not error <= trial.tolerance:
                    raise DgemmaError(f"relative error {error:.2g}")
                sweeps = [first] if few else timings(partial(_sweep, trial.calls), device, 1)
            except Exception as failure:  # too much shared memory for this device, or no such product
                skipped[label] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
                continue
        times[label] = 1000 * statistics.median(sweeps) / len(trial.calls)
        asked |= keys
    if not times:
        raise DgemmaError(f"{trial.about}: no candidate ran: {skipped}")
    best = min(times, key=lambda label: times[label])
    found = {"ms": times, "best": asdict(candidates[best]), "skipped": skipped}
    return found, [(trial.kernel, key, candidates[best]) for key in sorted(asked, key=str)]


def trials(model: DiffusionGemma, row: kernels.Row, rows: int, prefix: int, experts_only: bool) -> Iterator[Trial]:
    """The kernels of a step of one canvas of `rows` behind `prefix` tokens."""
    generator = torch.Generator(model.embed.weight.device).manual_seed(0)
    if model.config.num_experts:
        yield _experts(model, row, rows, generator)
    if experts_only:
        return
    yield _vocab(model, row, rows, generator)
    for layer in dict.fromkeys(model.config.layers):
        yield _attention(model, row, layer, rows, prefix, generator)


def _experts(model: DiffusionGemma, row: kernels.Row, rows: int, generator: torch.Generator) -> Trial:
    config, dtype = model.config, model.embed.weight.dtype
    x = _normal(generator, rows, config.hidden_size).to(dtype)
    scores = torch.rand(rows, config.num_experts, device=x.device, generator=generator)
    weights, ids = scores.topk(config.top_k_experts)
    ids, order = ids.sort(dim=-1)
    given = x, weights.gather(1, order), ids
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    stacks = [one.matrices or (one.gate_up_proj, one.down_proj) for one in layers]
    calls = [partial(_one, row["experts"], *given, *stack) for stack in stacks]
    module = import_module("dgemma.kernels.triton_experts")
    kind = module.stacked_of(stacks[0][0]).kind
    return Trial(
        kernel="experts",
        about=f"experts, {kind}",
        shipped=module.shipped_blocks(kind, dtype),
        calls=calls,
        want=partial(_one, reference.experts, *given, *stacks[0]),
        tolerance=0.05 if kind == "fp8" else 0.02,  # a code of e4m3 that tips over is a step of 6 %
    )


def _vocab(model: DiffusionGemma, row: kernels.Row, rows: int, generator: torch.Generator) -> Trial:
    embed, config = model.embed.weight.detach(), model.config
    hidden = _normal(generator, rows, config.hidden_size).to(embed.dtype)
    draws = -(-config.vocab_size // kernels.DRAW_BLOCK)
    uniforms = torch.rand(rows, draws, dtype=torch.float64, device=embed.device, generator=generator)
    given = hidden, embed, config.softcap, torch.full((rows,), 0.6, device=embed.device), uniforms

    def statistics_of(vocab: Callable[..., kernels.VocabStats], **more: Any) -> Tensors:
        found = vocab(*given, **more)
        return found.entropy, found.soft

    return Trial(
        kernel="vocab",
        about="vocab",
        shipped=import_module("dgemma.kernels.triton_vocab").shipped_blocks(embed.dtype),
        calls=[partial(statistics_of, row["vocab"])],
        want=partial(statistics_of, reference.vocab, matmul=lambda x, w: reference.linear(x.float(), w.float())),
    )


def _attention(
    model: DiffusionGemma, row: kernels.Row, layer: LayerConfig, rows: int, prefix: int, generator: torch.Generator
) -> Trial:
    config, dtype, dim = model.config, model.embed.weight.dtype, layer.head_dim
    seen = min(prefix, config.sliding_window - 1) if layer.kind == "sliding" else prefix
    given = []
    for _ in range(config.layers.count(layer)):
        q = _normal(generator, rows, config.num_heads, dim) * (2 * dim**-0.5)
        stored = (_normal(generator, count, layer.num_kv_heads, dim) for count in (rows, rows, seen, seen))
        given.append([x.to(dtype) for x in (q, *stored)])
    return Trial(
        kernel="attention",
        about=f"canvas_attention, {layer.kind}",
        shipped=import_module("dgemma.kernels.triton_attention").shipped_blocks(dim, dtype),
        calls=[partial(_one, row["canvas_attention"], *tensors, 0, seen) for tensors in given],
        want=partial(_one, reference.canvas_attention, *(x.float() for x in given[0]), 0, seen),
    )


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, device=generator.device, generator=generator)


def _one(op: Callable[..., Tensor], *given: Any) -> Tensors:
    return (op(*given),)


def _sweep(calls: Sequence[Callable[[], Tensors]]) -> None:
    for call in calls:
        call()


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def _label(blocks: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(blocks).items())
