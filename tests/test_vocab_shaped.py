"""The vocabulary op with a bias and top-p: the reference against plain lists, the faster op against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from chance import SURE, fits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vocab_kit import CAP, example, run, uniforms

from dgemma import kernels
from dgemma.kernels import DRAW_BLOCK, cpu_vocab, reference, shaped
from dgemma.kernels.reference import vocab


def shapes(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """A bias with bans `[T, V]`, the most likely tokens among them, and top-p of every size `[T]`."""
    random = torch.Generator().manual_seed(8)
    bias = torch.randn(rows, size, generator=random) * 2
    bias[torch.rand(rows, size, generator=random) < 0.2] = -math.inf
    top_p = torch.tensor([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64).repeat(rows // 6 + 1)[:rows]
    return bias, top_p


def test_bias_and_top_p_by_plain_lists() -> None:
    states, embed, temperature = example(rows=30, size=300)
    bias, top_p = shapes(30, 300)
    stats = run(states, embed, temperature, bias=bias, top_p=top_p)
    logits = np.tanh(states.double().numpy() @ embed.double().numpy().T / CAP) * CAP
    sizes = set()
    for row in range(30):
        shaped = (logits[row] + bias[row].double().numpy()) / float(temperature[row])
        weights = np.exp(shaped - shaped.max())
        kept, mass = [], 0.0
        for token in np.argsort(-weights, kind="stable"):
            if mass < float(top_p[row]) * weights.sum() and weights[token]:
                kept.append(token)
            mass += weights[token]
        probs = np.zeros(300)
        probs[kept] = weights[kept] / weights[kept].sum()
        sizes.add(len(kept))
        logp = np.log(np.maximum(probs, 1e-300))
        assert float(stats.entropy[row]) == pytest.approx(-(probs * logp).sum(), abs=2e-5)
        assert int(stats.argmax[row]) == probs.argmax()
        assert float(stats.top_logprob[row]) == pytest.approx(logp.max(), abs=2e-5)
        assert float(stats.draw_logprob[row]) == pytest.approx(logp[stats.draw[row]], abs=2e-5)
        np.testing.assert_allclose(stats.soft[row], probs @ embed.double().numpy(), rtol=2e-5, atol=2e-5)
    assert 1 in sizes and max(sizes) > 200 and len(sizes) > 10


@pytest.mark.parametrize("op", ["reference", "shaped"])
def test_shaped_draws_follow_the_shaped_distribution(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "DRAW_BLOCK", 2)
    rows, bias = 200_000, torch.tensor([0.0, -math.inf, 1.0, 0.0, -0.5])
    logits, top_p = torch.tensor([1.0, 3.0, 0.0, 0.5, -1.0]), torch.full((rows,), 0.8, dtype=torch.float64)
    call = vocab if op == "reference" else kernels.vocab
    stats = call(
        logits.expand(rows, -1), torch.eye(5), CAP, torch.ones(rows), uniforms(rows, 5, block=2), bias=bias, top_p=top_p
    )
    law = torch.softmax(reference.softcap(logits, CAP).double() + bias, 0)
    law[4] = 0.0  # the others have 0.93; without token 3 it were 0.73
    counts = torch.bincount(stats.draw, minlength=5)
    assert fits(counts, law) > SURE and counts[4] == 0 and counts[1] == 0 and counts[3] > 0


def test_ties_at_the_end_of_a_nucleus_go_to_the_lowest_ids() -> None:
    logits = torch.zeros(5, 10)
    logits[1, 5:] = 1.0
    logits[2, [2, 4, 6]] = -math.inf
    logits[4, :8] = -math.inf  # one of two reaches one half exactly
    top_p = torch.tensor([0.35, 0.35, 0.5, 1.0, 0.5], dtype=torch.float64)
    parts = logits[[0, 1, 2, 4]], top_p[[0, 1, 2, 4]]  # without a row that stays whole, which takes the long way
    assert torch.equal(shaped.nucleus(*parts), reference.nucleus(*parts))
    for nucleus in (reference.nucleus, shaped.nucleus):
        kept = nucleus(logits, top_p) > -math.inf
        assert [row.nonzero().flatten().tolist() for row in kept] == [
            [0, 1, 2, 3], [5, 6, 7], [0, 1, 3, 5], list(range(10)), [8]
        ]  # fmt: skip


@pytest.mark.parametrize("likely", [8, 512])
def test_the_short_way_to_a_nucleus_keeps_the_same_tokens(likely: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped, "_LIKELY", likely)
    random = torch.Generator().manual_seed(9)
    logits = torch.randn(200, 3000, generator=random) * torch.linspace(0.1, 8, 200)[:, None]
    logits = (logits * 4).round() / 4  # many ties
    for top_p in (0.05, 0.5, 0.95):
        wanted = torch.full((200,), top_p, dtype=torch.float64)
        assert torch.equal(shaped.nucleus(logits, wanted), reference.nucleus(logits, wanted))
        for part in logits.split(7):
            few = wanted[: len(part)]
            assert torch.equal(shaped.nucleus(part, few), reference.nucleus(part, few))


def test_the_highest_are_in_order_and_ties_by_the_lowest_id() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0], [0.0] * 6])
    best, ids = kernels.highest(values, 4)
    assert ids.tolist() == [[1, 3, 2, 4], [0, 1, 2, 3]] and best.tolist() == [[3.0, 3.0, 2.0, 2.0], [0.0] * 4]
    assert kernels.highest(values, 99)[1].shape == (2, 6)


@pytest.mark.parametrize("at_once", [1, 5 * 1500, shaped.LOGITS_AT_ONCE])
def test_the_shaped_op_is_the_reference(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows it takes at a time, with one bias for all rows or one each, and with what shapes the draw."""
    monkeypatch.setattr(shaped, "LOGITS_AT_ONCE", at_once)
    states, embed, temperature = example(rows=31)
    bias, top_p = shapes(31, 1500)
    noise, own, top_k = uniforms(31, 1500), torch.arange(31) % 3 * 0.7, torch.arange(31) % 2 * 4
    for options in ({"bias": bias, "top_p": top_p}, {"bias": bias[0]}, {"top_p": top_p}):
        wanted = run(states, embed, temperature, noise=noise, draw_temperature=own, top_k=top_k, **options)
        for head in (embed, cpu_vocab.PackedHead(embed)):
            got = kernels.vocab(states, head, CAP, temperature, noise, own, top_k, **options)
            assert torch.equal(got.argmax, wanted.argmax) and torch.equal(got.draw, wanted.draw)
            for name in ("entropy", "top_logprob", "draw_logprob", "soft"):
                torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)


def test_a_shaped_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(shaped, "LOGITS_AT_ONCE", 4 * 100_003)
    states, embed, temperature = example(rows=9, size=100_003, hidden=8)
    bias, top_p = shapes(9, 100_003)
    noise = uniforms(9, 100_003)
    for kept in (None, top_p):  # without top-p sums are long, and a lone one is split among threads
        whole = kernels.vocab(states, embed, CAP, temperature, noise, bias=bias, top_p=kept)
        for rows in (slice(2, 5), slice(1, 9), *(slice(row, row + 1) for row in range(9))):
            own = None if kept is None else kept[rows]
            some = kernels.vocab(states[rows], embed, CAP, temperature[rows], noise[rows], bias=bias[rows], top_p=own)
            for name, value in vars(some).items():
                assert torch.equal(value, getattr(whole, name)[rows]), name


def test_shaped_rows_never_have_all_their_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped, "LOGITS_AT_ONCE", 4 * 6000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple) else (out,)
            largest = max([largest, *(x.numel() for x in made if isinstance(x, Tensor))])
            return out

    states, embed, temperature = example(rows=64, size=6000, hidden=2)
    top_p, noise = torch.full((64,), 0.9, dtype=torch.float64), uniforms(64, 6000)
    with Watch():
        kernels.vocab(states, embed, CAP, temperature, noise, bias=torch.zeros(6000), top_p=top_p)
    assert 4 * 6000 <= largest <= 4 * (6000 + DRAW_BLOCK)
