"""The vocabulary op by token classes against plain lists."""

from __future__ import annotations

import math

import pytest
import torch
from chance import SURE, fits
from torch import Tensor
from vocab_kit import CAP, example, uniforms

from dgemma.kernels import PackedHead, shaped
from dgemma.kernels.classes import Head, class_stats, weighted

SIZE, ROWS, KINDS = 300, 7, 5


def parts(rows: int = ROWS) -> tuple[Head, Tensor, Tensor]:
    """Hidden rows, the class of each token (none in class 4), and log-probabilities by float64."""
    states, embed, temperature = example(rows=rows, size=SIZE)
    of = torch.randint(0, 4, (SIZE,), generator=torch.Generator().manual_seed(1))
    bias = torch.zeros(SIZE)
    bias[of == 3] = -math.inf
    head = Head(states, embed, CAP, temperature, bias=bias)
    logits = torch.tanh(states.double() @ embed.double().T / CAP) * CAP + bias
    return head, of, torch.log_softmax(logits / temperature[:, None].double(), dim=-1)


def test_what_each_class_has() -> None:
    head, of, logp = parts()
    logsum, best = class_stats(head, of, KINDS)
    for kind in range(KINDS):
        if kind >= 3:  # banned, and empty
            assert bool((logsum[:, kind] == -math.inf).all()) and bool((best[:, kind] == -math.inf).all())
            continue
        torch.testing.assert_close(logsum[:, kind], logp[:, of == kind].logsumexp(dim=1), atol=2e-5, rtol=0)
        torch.testing.assert_close(best[:, kind], logp[:, of == kind].amax(dim=1), atol=2e-5, rtol=0)


def test_an_unlikely_class_is_not_lost() -> None:
    logits = torch.tensor([[25.0, -25.0, -26.0], [0.0, 0.0, 0.0]])
    head = Head(logits, torch.eye(3), 1000.0, torch.tensor([0.1, 0.1]))
    logsum, best = class_stats(head, torch.tensor([0, 1, 1]), 2)
    assert float(logsum[0, 1]) == pytest.approx(-499.8 + math.log1p(math.exp(-10)), abs=0.3)
    assert float(logsum[0, 1]) > float(best[0, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_weights_make_another_distribution(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped, "LOGITS_AT_ONCE", 3 * SIZE)
    head, of, logp = parts()
    if packed:
        head = Head(head.hidden, PackedHead(head.table), head.cap, head.temperature, bias=head.bias)
    weight = torch.randn(ROWS, KINDS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    weight[:, 0] = -math.inf
    emitted, drawn = torch.tensor([1, 2, 1, 2, 1, 2, 1]), torch.tensor([2, 2, 1, 1, 2, 1, 2])
    stats = weighted(head, of, weight, emitted, drawn, uniforms(ROWS, SIZE))
    told = torch.log_softmax(logp + weight[:, of], dim=-1)
    probs = told.exp()
    entropy = -(probs * told.clamp(min=-1e9)).sum(dim=1)
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=5e-5, rtol=0)
    torch.testing.assert_close(stats.soft.double(), probs @ head.table.double(), atol=5e-5, rtol=0)
    for row in range(ROWS):
        inside = logp[row].masked_fill(of != emitted[row], -math.inf)
        assert int(stats.argmax[row]) == int(inside.argmax())
        assert int(of[stats.draw[row]]) == int(drawn[row])
        assert float(stats.top_logprob[row]) == pytest.approx(float(told[row, stats.argmax[row]]), abs=5e-5)
        assert float(stats.draw_logprob[row]) == pytest.approx(float(told[row, stats.draw[row]]), abs=5e-5)


def test_draws_inside_a_class_follow_the_model() -> None:
    rows = 100_000
    logits = torch.tensor([1.0, 0.0, 2.0, 0.5])
    head = Head(logits.expand(rows, -1), torch.eye(4), 1000.0, torch.ones(rows))
    of, one = torch.tensor([0, 1, 1, 1]), torch.ones(rows, dtype=torch.int64)
    stats = weighted(head, of, torch.zeros(rows, 2, dtype=torch.float64), one, one, uniforms(rows, 4))
    law = torch.softmax(logits.double(), 0)
    law[0] = 0
    assert fits(torch.bincount(stats.draw, minlength=4), law) > SURE


def test_ties_go_to_the_lowest_id_and_a_row_does_not_depend_on_others() -> None:
    head = Head(torch.zeros(1, 4), torch.eye(4), 30.0, torch.ones(1))
    of, one = torch.tensor([1, 0, 0, 1]), torch.zeros(1, dtype=torch.int64)
    stats = weighted(head, of, torch.zeros(1, 2, dtype=torch.float64), one, one, uniforms(1, 4))
    assert int(stats.argmax[0]) == 1
    many, kinds, _ = parts(rows=16)
    logsum, best = class_stats(many, kinds, KINDS)
    alone = Head(many.hidden[:1], many.table, many.cap, many.temperature[:1], bias=many.bias)
    assert shaped.LOGITS_AT_ONCE // SIZE > 16
    torch.testing.assert_close(class_stats(alone, kinds, KINDS)[0], logsum[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(class_stats(alone, kinds, KINDS)[1], best[:1], atol=1e-5, rtol=0)


def test_the_plain_soft_embedding_is_the_unconstrained_one() -> None:
    head, of, logp = parts()
    raw = Head(head.hidden, head.embed, head.cap, head.temperature, bias=head.bias, plain_soft=True)
    one = torch.ones(ROWS, dtype=torch.int64)
    weight = torch.full((ROWS, KINDS), -math.inf, dtype=torch.float64)
    weight[:, 1] = 0.0
    stats = weighted(raw, of, weight, one, one, uniforms(ROWS, SIZE))
    torch.testing.assert_close(stats.soft.double(), logp.exp() @ head.table.double(), atol=5e-5, rtol=0)
