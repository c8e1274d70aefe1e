"""The compiled row ops and the stack that uses them, against the reference; and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_kit import CONFIG

from dgemma import kernels
from dgemma.cache import KVCache
from dgemma.config import ModelConfig
from dgemma.engine import Runner
from dgemma.engine.runner import Draws
from dgemma.kernels import cpu, cpu_vocab, native, reference
from dgemma.kernels.packed import Packed
from dgemma.kernels.reference_attention import inside
from dgemma.model import DiffusionGemma
from dgemma.train.init import new_model

EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16]
ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(native.load() is None, reason="no C++ compiler here; the torch ops serve")


def compiled() -> native.Native:
    found = native.load()
    assert found is not None
    return found


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(one: Tensor, two: Tensor, ulps: float = 2.0) -> None:
    """Within some units of the type's last place, measured at the largest value."""
    assert one.dtype is two.dtype and one.shape == two.shape
    unit = torch.finfo(one.dtype).eps * two.double().abs().max()
    assert (one.double() - two.double()).abs().max() <= ulps * unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(1, 24), (9, 40), (33, 257)])
def test_the_ops_between_products(dtype: torch.dtype, rows: int, size: int) -> None:
    x, y, z = (normal(rows, size, seed=seed, dtype=dtype) for seed in range(3))
    a, b, c, d = (normal(size, seed=seed, dtype=dtype) for seed in range(3, 7))
    scalar = torch.tensor([0.7], dtype=dtype)
    call = compiled()
    close(call.norm(x, a, EPS), reference.rms_norm(x, a, EPS))
    close(call.norm(x, None, EPS), reference.rms_norm(x, None, EPS))
    out, dense, mixed, routed = call.middle(x, y, a, b, EPS, c, d)
    wanted = x + reference.rms_norm(y, a, EPS)
    close(out, wanted)
    close(dense, reference.rms_norm(out, b, EPS))
    assert mixed is not None and routed is not None
    close(mixed, reference.rms_norm(out, c, EPS))
    close(routed, reference.rms_norm(out, None, EPS) * d * size**-0.5)
    both = reference.rms_norm(y, a, EPS) + reference.rms_norm(z, b, EPS)
    for branch, sum_ in ((z, both), (None, y)):
        out, normed = call.close(x, y, branch, (a, b, c), scalar, d, EPS)
        close(out, (x + reference.rms_norm(sum_, c, EPS)) * scalar)
        close(normed, reference.rms_norm(out, d, EPS))
    gate_up = normal(rows, 2 * size, dtype=dtype, scale=3.0)
    gate, up = gate_up.chunk(2, dim=-1)
    close(call.geglu(gate_up), reference.gelu(gate) * up)
    scores = normal(rows, size, dtype=dtype, scale=4.0)
    scores[:, size // 2] = -torch.inf
    soft = call.softmax_(scores.clone())
    close(
        soft, torch.softmax(scores, -1, dtype=torch.float32).to(dtype), ulps=3
    )  # narrower vectors add in another order
    assert (soft[:, size // 2] == 0).all(), "what is masked is exactly nothing"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_v", [True, False])
def test_heads_are_normed_and_turned(dtype: torch.dtype, has_v: bool) -> None:
    rows, queries, keys, dim = 11, 4, 2, 16
    packed = normal(rows, (queries + keys * (2 if has_v else 1)) * dim, dtype=dtype)
    qw, kw = normal(dim, seed=1, dtype=dtype), normal(dim, seed=2, dtype=dtype)
    cos, sin = reference.rope_tables(torch.arange(rows) * 7, reference.rope_frequencies(dim, 1e4, 1.0, 1.0), dtype)
    q, k, v = compiled().heads(packed, qw, kw, cos, sin, EPS, (queries, keys), has_v)
    parts = packed.unflatten(-1, (-1, dim)).split([queries, keys] + [keys] * has_v, dim=1)
    close(q, reference.rope(reference.rms_norm(parts[0], qw, EPS), cos, sin))
    close(k, reference.rope(reference.rms_norm(parts[1], kw, EPS), cos, sin))
    close(v, reference.rms_norm(parts[-1], None, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts, top_k", [(4, 1), (8, 2), (8, 8), (32, 4)])
def test_routing_groups_rows_and_puts_them_back(dtype: torch.dtype, experts: int, top_k: int) -> None:
    rows = 19
    scores, scale = normal(rows, experts, dtype=dtype, scale=2.0), normal(experts, seed=1, dtype=dtype)
    weights, order, place, counts = compiled().route(scores, scale, top_k)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
    kept, ids = probs.topk(top_k, dim=-1)
    ids, by_id = ids.sort(dim=-1)
    wanted = (kept / kept.sum(-1, keepdim=True)).gather(-1, by_id) * scale[ids]
    assert torch.allclose(weights, wanted.float(), atol=1e-6)
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=experts))
    expert_at = torch.repeat_interleave(torch.arange(experts), counts)
    assert torch.equal(expert_at[place.view(rows, top_k)], ids)
    assert torch.equal(order[place].view(rows, top_k), torch.arange(rows)[:, None].expand(rows, top_k))
    parts = normal(rows * top_k, 12, dtype=dtype)
    close(
        compiled().combine(parts, place, weights),
        sum((parts[place.view(rows, top_k)[:, n]] * weights[:, n, None]).to(dtype) for n in range(top_k)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled_pass", [True, False])
@pytest.mark.parametrize("vocab, size, rows", [(1500, 24, 7), (3 * cpu_vocab.CHUNK + 100, 16, 20), (1024, 8, 1)])
def test_the_streamed_vocabulary_op_is_the_reference(
    dtype: torch.dtype, compiled_pass: bool, vocab: int, size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every statistic, over chunks that rise and fall, with the request's own temperatures and without."""
    if not compiled_pass:
        monkeypatch.setattr(native, "load", lambda: None)
    hidden, embed = normal(rows, size, dtype=dtype, scale=2.0), normal(vocab, size, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    temperature = torch.rand(rows, generator=generator) + 0.5
    uniforms = torch.rand(rows, -(-vocab // 1024), dtype=torch.float64, generator=generator)
    for own in (None, torch.tensor([0.0, 1.0, 0.7, 1.3, 1e-3]).repeat(4)[:rows]):
        wanted = reference.vocab(hidden, embed, 30.0, temperature, uniforms, own)
        got = cpu_vocab.vocab(hidden, embed, 30.0, temperature, uniforms, own)
        assert torch.equal(got.argmax, wanted.argmax) and torch.equal(got.draw, wanted.draw)
        for name in ("entropy", "top_logprob", "draw_logprob"):
            assert (getattr(got, name) - getattr(wanted, name)).abs().max() < 2e-5, name
        close(got.soft, wanted.soft, ulps=64 if dtype is torch.float32 else 2)


SIZES = {
    "experts": CONFIG,
    "dense": replace(CONFIG, num_experts=0, top_k_experts=0, expert_size=0),
}


def stacks(config: ModelConfig, dtype: torch.dtype) -> tuple[DiffusionGemma, Runner, Runner]:
    model = new_model(config, 3).to(dtype).eval().requires_grad_(False)
    for block in model.layers:
        block.decoder_scalar.fill_(0.8)
        block.encoder_scalar.fill_(0.9)
    fast, plain = Runner(model), Runner(model)
    assert fast._stack is not None
    plain._stack = None
    return model, fast, plain


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_the_fast_stack_is_the_block_by_block_one(size: str, dtype: torch.dtype) -> None:
    model, fast, plain = stacks(SIZES[size], dtype)
    config = model.config
    width, prompt = 16, list(range(3, 40))
    canvas = torch.randint(config.vocab_size, (width,), generator=torch.Generator().manual_seed(1))
    soft = normal(width, config.hidden_size, dtype=dtype, scale=0.1)
    draws = Draws(torch.ones(width), torch.rand(width, 1, dtype=torch.float64), torch.ones(width),
                  torch.zeros(width, dtype=torch.int64))  # fmt: skip
    found = []
    for runner in (fast, plain):
        cache = KVCache(config, runner.device, dtype, 64)
        (hidden,) = runner.encode([(cache, prompt)])
        found.append((hidden, *(runner.denoise([(cache, canvas)], [signal], draws).entropy for signal in (None, soft))))
    limit = 2e-5 if dtype is torch.float32 else 0.15
    for one, two in zip(*found, strict=True):
        assert (one - two).abs().max() < limit
    assert (found[0][1] - found[0][2]).abs().max() > 10 * limit * (dtype is torch.float32), "the signal matters"


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_an_encode_pass_knows_its_spans(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one pass, over the edges of the window: nothing is looked up in a mask, and no bit differs if it is."""
    _, fast, _ = stacks(CONFIG, dtype)
    window, counts, looks, asked = CONFIG.sliding_window, [5, 1, 7, CONFIG.sliding_window + 3], [], []
    find, attend = cpu._spans, cpu.attention

    def looked(mask: Tensor) -> Tensor | None:
        looks.append(mask.shape)
        return find(mask)

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spans: Tensor | None) -> Tensor:
        out = attend(q, k, v, mask, spans)
        if spans is not None:
            assert torch.equal(attend(q, k, v, inside(spans, torch.arange(len(k)))), out)
            asked.append(spans.shape)
        assert mask is None and (spans is not None or len(q) == 1)
        return out

    def encode() -> None:
        cache = KVCache(CONFIG, fast.device, dtype, 2 * window + 64)
        fast.encode([(cache, list(range(window - 1)))])
        ids = iter(range(3, 3 + sum(counts)))
        fast.encode(
            [(view, [next(ids) for _ in range(n)]) for view, n in zip(cache.segments(counts), counts, strict=True)]
        )

    monkeypatch.setattr(cpu, "_spans", looked)
    encode()
    assert not looks
    row = dict(kernels.TABLE["cpu"]) | {"stored_attention": partial(cpu.stored_attention, attend=watched)}
    monkeypatch.setattr(kernels, "TABLE", {"cpu": row})
    encode()
    compiled = native.load()
    assert compiled is not None and len(asked) == 4 * CONFIG.num_layers
    # Without products of our own attention takes torch's way, which looks at the mask itself.
    assert len(looks) == (len(asked) if compiled.multiplies(dtype, 8) else 0)


def test_weights_of_mixed_types_take_the_plain_way() -> None:
    model = new_model(CONFIG, 3).bfloat16().eval().requires_grad_(False)
    assert Runner(model)._stack is not None
    model.norm.float()
    assert Runner(model)._stack is None


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(2048, 70, 48), (60, 1, 1), (60, 33, 1100), (300, 9, 2048), (7, 130, 514)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_products_do_not_depend_on_the_other_rows(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, threads: int
) -> None:
    weight, x = normal(outputs, inputs, dtype=dtype), normal(rows, inputs, seed=1, dtype=dtype)
    packed = Packed(weight)
    whole = packed(x)
    close(
        whole, (x.double() @ weight.double().t()).to(dtype), ulps=max(8, inputs / 32) if dtype is torch.float32 else 1
    )
    assert packed.shape == (outputs, inputs) and torch.equal(packed.dense(), weight)
    for count in (1, 2, 3, 7, 16, 256):
        assert torch.equal(packed(x[5 : 5 + count]), whole[5 : 5 + count])


def test_it_works_without_the_library(tmp_path: Path) -> None:
    """A process that may not use it, and one that finds no compiler, generate the same text as this one."""
    code = (
        "from dgemma import LLM; from dgemma.kernels import native;"
        "print(native.load() is None, repr(LLM.load('default').generate('The cat', max_new_tokens=16, seed=1).text))"
    )
    texts = []
    for more in ({}, {"DGEMMA_NATIVE": "0"}, {"PATH": "/nowhere", "XDG_CACHE_HOME": str(tmp_path)}):
        env = {**os.environ, **more}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, cwd=ROOT
        )
        texts.append(done.stdout.split(" ", 1))
    assert [text[0] for text in texts] == ["False", "True", "True"]
    assert texts[0][1] == texts[1][1] == texts[2][1]
