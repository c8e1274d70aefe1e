"""Triton's vocabulary op against the reference over float64 logits: statistics, draws, soft embedding, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_kit import CLOSE, DEVICE, DTYPES, Random, error, poisoned, same_row
from vocab_kit import CAP, uniforms

from dgemma.kernels import DRAW_BLOCK, PackedHead, reference, triton_vocab
from dgemma.kernels.reference import VocabStats

SIZES = [1, 127, 1024, 1500, 2 * DRAW_BLOCK + 129]
NEAR = 2e-6
"""A uniform so near to a boundary of the draw may fall on either side."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, shares without tiles, several groups of rows."""
    real = triton_vocab.blocks_of
    small = {"rows": 32, "chunk": DRAW_BLOCK, "columns": 32, "shares": 3, "most": 32}
    monkeypatch.setattr(triton_vocab, "blocks_of", lambda embed: replace(real(embed), **small))


def example(rows: int, size: int, dtype: torch.dtype, hidden: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows from flat to peaked, with NaN around them; `hidden, embed, temperature, uniforms`."""
    random = Random(rows + size, dtype)
    states = random.gaps(rows, hidden)
    states *= torch.linspace(0.01, 3.0, rows, device=DEVICE).to(dtype)[:, None]
    heat = torch.linspace(0.4, 0.8, rows, device=DEVICE)
    return states, random.gaps(size, hidden), heat, uniforms(rows, size).to(DEVICE)


def expected(states: Tensor, embed: Tensor, heat: Tensor, noise: Tensor, *own: Tensor) -> VocabStats:
    """`reference.vocab`, without its float32 softcap."""
    states, embed, heat, noise, *own = (x.cpu().double() for x in (states, embed, heat, noise, *own))
    logits = torch.tanh(states @ embed.T / CAP) * CAP / heat[:, None]
    return reference.prediction(logits, noise, own[0] if own else None, None, lambda probs: probs @ embed)


def moved(states: Tensor, embed: Tensor, heat: Tensor, noise: Tensor, *own: Tensor) -> Tensor:
    """Rows whose draw changes if all their uniforms are moved by NEAR."""
    draws = [expected(states, embed, heat, (noise + by).clamp(0, 1 - 2**-53), *own).draw for by in (-NEAR, NEAR)]
    return draws[0] != draws[1]


def check(got: VocabStats, exact: VocabStats, dtype: torch.dtype, unsure: Tensor) -> None:
    for name in ("entropy", "top_logprob"):
        difference = getattr(got, name).cpu().double() - getattr(exact, name)
        assert getattr(got, name).dtype is torch.float32
        assert bool((difference.abs() < 2e-5).all()), (name, difference.abs().max())
    same = got.draw.cpu() == exact.draw
    assert bool((same | unsure).all()), (got.draw, exact.draw)
    assert int(unsure.sum()) <= 1 + len(same) // 20, "the draw would not be tested"
    difference = (got.draw_logprob.cpu().double() - exact.draw_logprob)[same]
    assert bool((difference.abs() < 5e-5).all())
    assert torch.equal(got.argmax.cpu(), exact.argmax)
    assert got.soft.dtype is dtype and error(got.soft, exact.soft) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 37])
def test_statistics_draw_and_soft_embedding(rows: int, size: int, dtype: torch.dtype, small: None) -> None:
    args = example(rows, size, dtype)
    with poisoned():
        got = triton_vocab.vocab(args[0], args[1], CAP, *args[2:])
    check(got, expected(*args), dtype, moved(*args))


def test_with_the_blocks_that_are_used() -> None:
    args = example(66, 300, torch.bfloat16, 200)
    with poisoned():
        got = triton_vocab.vocab(args[0], args[1], CAP, *args[2:])
    check(got, expected(*args), torch.bfloat16, moved(*args))


def test_the_draw_has_its_own_temperature(small: None) -> None:
    args = example(40, 2 * DRAW_BLOCK, torch.float32)
    own = torch.tensor([0.0, 0.01, 0.5, 1.0, 3.0], device=DEVICE).repeat(8)
    got = triton_vocab.vocab(args[0], args[1], CAP, *args[2:], own)
    check(got, expected(*args, own), torch.float32, moved(*args, own))
    assert torch.equal(got.draw[own == 0], got.argmax[own == 0])
    assert torch.equal(got.draw_logprob[own == 0], got.top_logprob[own == 0])


def test_top_k_restricts_the_draw_only(small: None) -> None:
    args = example(24, 1100, torch.float32)
    top_k = torch.tensor([0, 1, 3], device=DEVICE).repeat(8)
    plain, got = (triton_vocab.vocab(args[0], args[1], CAP, *args[2:], None, limit) for limit in (None, top_k))
    assert torch.equal(got.draw[top_k == 1], got.argmax[top_k == 1])
    for name in ("entropy", "argmax", "soft"):
        assert torch.equal(getattr(got, name), getattr(plain, name))
    assert torch.equal(got.draw[top_k == 0], plain.draw[top_k == 0])
    exact = reference.vocab(args[0].cpu(), args[1].cpu(), CAP, *(x.cpu() for x in args[2:]), None, top_k.cpu())
    assert int((got.draw.cpu() != exact.draw).sum()) <= 1


def test_ties_go_to_the_lowest_id(small: None) -> None:
    """The same row of the embedding in several tiles, blocks and chunks."""
    states, embed, heat, noise = example(16, 2 * DRAW_BLOCK + 129, torch.float32)
    best = states.sum(0) * 0 + 1
    states = (states.abs() * 16).round() / 16 + 0.125  # exact sums: numpy's product has its own order at every column
    for token in (2000, 130, 1025, 131):
        embed[token] = best * 3
    got = triton_vocab.vocab(states, embed, CAP, heat, noise)
    assert got.argmax.tolist() == [130] * 16
    zero = triton_vocab.vocab(states * 0, embed, CAP, heat, noise)
    assert zero.argmax.tolist() == [0] * 16
    assert torch.allclose(zero.entropy, torch.full_like(zero.entropy, len(embed)).log(), atol=1e-6)


def test_a_row_does_not_depend_on_the_others(small: None) -> None:
    states, embed, heat, noise = example(50, 1100, torch.bfloat16, 16)
    whole = triton_vocab.vocab(states, embed, CAP, heat, noise)
    for rows in (slice(0, 1), slice(7, 40)):
        part = triton_vocab.vocab(states[rows], embed, CAP, heat[rows], noise[rows])
        for name, value in vars(part).items():
            assert same_row(value, getattr(whole, name)[rows]), name


@pytest.mark.parametrize("number", [2.0**-53, 0.5, 1 - 2.0**-53])
def test_a_certain_token_is_drawn_whatever_the_uniform(number: float, small: None) -> None:
    """Logits 60 above the rest at temperature 0.4: e to the -150 has no place beside it."""
    size = 2 * DRAW_BLOCK + 5
    for token in (0, 127, 128, DRAW_BLOCK, size - 1):
        embed = torch.full((size, 16), -20.0, device=DEVICE)
        embed[token] = 20.0
        states, heat = torch.ones(2, 16, device=DEVICE), torch.full((2,), 0.4, device=DEVICE)
        noise = torch.full((2, 3), number, dtype=torch.float64, device=DEVICE)
        assert triton_vocab.vocab(states, embed, CAP, heat, noise).draw.tolist() == [token] * 2


def test_numbers_of_a_row_that_lie_apart(small: None) -> None:
    states, embed, heat, noise = example(3, 300, torch.float32)
    plain = triton_vocab.vocab(states, embed, CAP, heat, noise)
    turned = [x.t().contiguous().t() for x in (states, embed, noise)]
    got = triton_vocab.vocab(turned[0], turned[1], CAP, heat, turned[2])
    for name, value in vars(got).items():
        assert torch.equal(value, getattr(plain, name)), name


def test_no_rows() -> None:
    states, embed, heat, noise = example(0, 1500, torch.float32)
    got = triton_vocab.vocab(states, embed, CAP, heat, noise)
    assert got.soft.shape == (0, 24) and all(len(value) == 0 for value in vars(got).values())


def test_softcap_keeps_the_digits_of_small_logits() -> None:
    """Through a vocabulary of two: the log-odds of the draw are the difference of the logits."""
    for raw in (1e-4, 0.1, 3.0, 14.9, 15.1, 29.0, 90.0):
        states = torch.tensor([[raw]], device=DEVICE).repeat(1, 16) / 16
        embed = torch.stack([torch.ones(16), torch.zeros(16)]).to(DEVICE)
        heat, noise = torch.ones(1, device=DEVICE), torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
        got = triton_vocab.vocab(states, embed, CAP, heat, noise)
        logit = torch.tanh(states.double().sum() / CAP) * CAP
        assert got.entropy.item() == pytest.approx(
            entropy_of(logit.item()), rel=2e-5, abs=2e-7
        )  # sums of a tile are float32
        assert got.argmax.item() == 0


def test_small_logits_that_differ_by_a_ten_thousandth_are_told_apart() -> None:
    embed = (1e-3 * (1 + 1e-4 * torch.arange(50.0)))[:, None].expand(50, 16).contiguous().to(DEVICE) / 16
    heat, noise = torch.ones(1, device=DEVICE), torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    assert triton_vocab.vocab(torch.ones(1, 16, device=DEVICE), embed, CAP, heat, noise).argmax.item() == 49


def entropy_of(logit: float) -> float:
    p = torch.tensor([logit, 0.0], dtype=torch.float64).log_softmax(0)
    return float(-(p.exp() * p).sum())


def test_memory_does_not_hold_rows_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(*args, **kwargs)
        made.append(tensor.nbytes)
        return tensor

    rows, size = 16, 64 * DRAW_BLOCK
    states, embed, heat, noise = example(rows, size, torch.float32, 16)
    blocks = triton_vocab.blocks_of(embed)
    monkeypatch.setattr(triton_vocab, "blocks_of", lambda embed: replace(blocks, chunk=4 * DRAW_BLOCK))
    monkeypatch.setattr(torch, "empty", counted)
    for name in ("_score", "_mix", "_finish", "_join"):
        monkeypatch.setattr(triton_vocab, name, Nothing())
    triton_vocab.vocab(states, embed, CAP, heat, noise)
    assert sum(made) < 4 * rows * size / 4, "a quarter of the logits"


class Nothing:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


def test_other_heads_and_types_take_torch() -> None:
    states, embed, heat, noise = (x.double() for x in example(3, 300, torch.float32))
    got = triton_vocab.vocab(states, embed, CAP, heat.float(), noise)
    assert got.soft.dtype is torch.float64
    if DEVICE.type == "cpu":
        packed = PackedHead(embed.float(), [lambda x: x @ embed.float().T])  # type: ignore[list-item]
        other = triton_vocab.vocab(states.float(), packed, CAP, heat.float(), noise)
        assert torch.equal(other.argmax, got.argmax)
