"""Bias, penalties and top-p: what they do to an answer, in both modes, alone and in company."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from engine_kit import CANVAS, NO_REUSE, VOCAB, config, of, request, run, tiny_model, tokens
from naive import NaiveCache, encode
from slow_answer import added, canvases
from torch import Tensor

from dgemma import kernels
from dgemma.config import EngineConfig, GenerationConfig
from dgemma.engine import Engine
from dgemma.engine.shaping import bias_row, biases
from dgemma.errors import RequestError
from dgemma.events import Draft

MODEL, EXACT = tiny_model(), tiny_model(torch.float64)
SHAPES: dict[str, dict[str, Any]] = {
    "bias": {"logit_bias": {5: 3.0, 40: -2.5, 41: -100, 77: 1.0}},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.75},
    "reward": {"presence_penalty": -0.5, "frequency_penalty": -2.0},
    "top_p": {"top_p": 0.7},
    "all": {"logit_bias": {5: 3.0, 41: -100}, "presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.8},
    "all, and the draw": {"logit_bias": {9: 2.0}, "top_p": 0.9, "temperature": 0.6, "top_k": 9},
}


# -- what is added -------------------------------------------------------------------


def test_biases_add_up_and_bans_stay_bans() -> None:
    chosen = config(logit_bias={3: 2.0, 4: -100, 5: -150.0}, presence_penalty=0.5, frequency_penalty=0.25)
    counts = Counter({3: 2, 4: 3, 9: 1})
    assert biases(chosen, counts) == {3: 1.0, 4: -math.inf, 5: -math.inf, 9: -0.75}
    assert chosen.banned == {4, 5}
    row = bias_row(chosen, counts, 12, torch.device("cpu"))
    assert row is not None and row.tolist() == [0, 0, 0, 1.0, -math.inf, -math.inf, 0, 0, 0, -0.75, 0, 0]
    assert bias_row(config(), counts, 12, torch.device("cpu")) is None
    assert bias_row(config(presence_penalty=1.0), Counter(), 12, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"logit_bias": {1: 100.5}}, r"at most 100 .*got \(1, 100\.5\)"),
        ({"logit_bias": {1: math.nan}}, r"got \(1, nan\)"),
        ({"logit_bias": {"1": 1.0}}, r"got \('1', 1\.0\)"),
        ({"logit_bias": {-1: 1.0}}, r"pairs of a token id .*got \(-1, 1\.0\)"),
        ({"logit_bias": ((True, 1.0),)}, r"got \(True, 1\.0\)"),
        ({"logit_bias": (5, 1.0)}, "pairs of a token id .*got 5"),
        ({"logit_bias": 5}, "pairs of a token id .*got 5"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "name a token once, got 1 twice"),
        ({"presence_penalty": 2.5}, "presence_penalty must be a number at least -2 and at most 2, got 2.5"),
        ({"frequency_penalty": -2.5}, "frequency_penalty must be a number at least -2 and at most 2, got -2.5"),
        ({"frequency_penalty": True}, "frequency_penalty must be a number .*got True"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        config(**changes)


def test_a_bias_may_be_a_mapping_or_pairs() -> None:
    assert config(logit_bias={3: 1}).logit_bias == config(logit_bias=[[3, 1.0]]).logit_bias == ((3, 1.0),)
    assert hash(config(logit_bias={3: 1})) == hash(config(logit_bias=((3, 1.0),)))
    assert GenerationConfig(logit_bias={7: -math.inf}).banned == {7}


# -- against the slow obvious way ----------------------------------------------------


@pytest.mark.parametrize("sampler", ["entropy_bound", "ancestral"])
@pytest.mark.parametrize("shape", SHAPES)
def test_diffusion_equals_the_slow_loop(shape: str, sampler: str) -> None:
    item = request(9, seed=3, sampler=sampler, max_new_tokens=4 * CANVAS, **SHAPES[shape])
    wanted = [token for part, _ in canvases(EXACT, list(item.prompt), item.config) for token in part]
    assert tokens(run(Engine(EXACT, NO_REUSE), [item])) == wanted
    plain = request(9, seed=3, sampler=sampler, max_new_tokens=4 * CANVAS)
    assert tokens(run(Engine(EXACT, NO_REUSE), [plain])) != wanted, "the shape matters here"


@pytest.mark.parametrize("shape", ["bias", "penalties", "reward"])
def test_ar_equals_the_slow_loop(shape: str) -> None:
    item = request(7, mode="ar", temperature=0.0, max_new_tokens=16, **SHAPES[shape])
    answer: list[int] = []
    for _ in range(16):
        logits = EXACT.logits(encode(EXACT, NaiveCache(EXACT.config), torch.tensor([*item.prompt, *answer])))[-1]
        answer.append(int((logits + added(item.config, answer, VOCAB)).argmax()))
    assert tokens(run(Engine(EXACT, NO_REUSE), [item])) == answer
    plain = request(7, mode="ar", temperature=0.0, max_new_tokens=16)
    assert tokens(run(Engine(EXACT, NO_REUSE), [plain])) != answer, "the shape matters here"


# -- what it does to an answer -------------------------------------------------------


ALLOWED = {3, 17, 90}
ONLY = {"logit_bias": {token: -100 for token in range(VOCAB) if token not in ALLOWED}}


NOISY = {"convention": "jax", "entropy_bound": 1e-9, "t_max": 2.0, "confidence_threshold": None}  # commits fresh noise


@pytest.mark.parametrize("changes", [{"mode": "ar"}, {}, NOISY, {"sampler": "ancestral"}], ids=str)
def test_a_banned_token_is_never_committed_nor_predicted(changes: dict[str, Any]) -> None:
    item = request(9, seed=2, watch=True, max_new_tokens=5 * CANVAS, max_denoising_steps=3, **ONLY, **changes)
    events = run(Engine(MODEL, NO_REUSE), [item])
    assert set(tokens(events)) <= ALLOWED and len(tokens(events)) == 5 * CANVAS
    drafts = [event for event in events if isinstance(event, Draft)]
    assert {token for draft in drafts for token in draft.tokens} <= ALLOWED
    if changes is NOISY:
        assert any(not set(draft.canvas_tokens) <= ALLOWED for draft in drafts if draft.step == 3), "the case occurs"
    assert all(entropy <= math.log(3) + 1e-6 for draft in drafts for entropy in draft.entropy)


def test_the_soft_embedding_is_of_what_is_left() -> None:
    """With all tokens but one banned it is that token's embedding, so the next step is conditioned on it alone."""
    one = {"logit_bias": {token: -100 for token in range(VOCAB) if token != 17}}
    engine = Engine(MODEL, NO_REUSE)
    number = engine.add(request(9, max_denoising_steps=5, confidence_threshold=None, **one))
    engine.tick()
    canvas = engine._running[number].canvas
    assert canvas is not None and canvas.soft is not None
    assert torch.allclose(canvas.soft, MODEL.embed.weight[17].expand(CANVAS, -1), atol=1e-6)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_hundred_forces_a_token(mode: str) -> None:
    item = request(9, seed=2, mode=mode, max_new_tokens=2 * CANVAS, logit_bias={33: 100})
    assert set(tokens(run(Engine(MODEL, NO_REUSE), [item]))) == {33}


def test_penalties_count_committed_canvases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bias a canvas, whatever its drafts hold: none for the first, of all canvases before it for the others."""
    seen: list[Tensor | None] = []
    real = kernels.vocab

    def watched(*args: Any, bias: Tensor | None = None, **kwargs: Any) -> Any:
        seen.append(bias)
        return real(*args, bias=bias, **kwargs)

    monkeypatch.setattr(kernels, "vocab", watched)
    changes = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "max_denoising_steps": 3}
    item = request(9, seed=2, max_new_tokens=3 * CANVAS, confidence_threshold=None, **changes)
    answer = tokens(run(Engine(MODEL, NO_REUSE), [item]))
    assert len(seen) == 9 and seen[:3] == [None] * 3
    for number in range(3, 9):
        bias, counts = seen[number], Counter(answer[: number // 3 * CANVAS])
        assert bias is not None and bias is seen[number // 3 * 3], "made once a canvas"
        assert bias.tolist() == [-(0.5 + 0.25 * counts[t]) if counts[t] else 0.0 for t in range(VOCAB)]


def test_a_penalty_makes_an_answer_less_repetitive() -> None:
    def kinds(**changes: float) -> int:
        item = request(9, seed=2, mode="ar", temperature=0.0, max_new_tokens=60, **changes)
        return len(set(tokens(run(Engine(MODEL, NO_REUSE), [item]))))

    assert kinds(frequency_penalty=2.0) > kinds() > kinds(frequency_penalty=-2.0)


def test_a_tiny_top_p_leaves_the_most_likely_token() -> None:
    item = request(9, seed=2, watch=True, top_p=1e-9)
    drafts = [event for event in run(Engine(MODEL, NO_REUSE), [item]) if isinstance(event, Draft)]
    assert drafts and all(draft.entropy == (0.0,) * CANVAS and all(draft.accepted) for draft in drafts)
    assert all(draft.canvas_tokens == draft.tokens for draft in drafts)


# -- company -------------------------------------------------------------------------


COMPANY = [
    request(3, seed=1, watch=True),
    *(request(5 + i, seed=2 + i, watch=True, **shape) for i, shape in enumerate(SHAPES.values())),
    request(30, seed=20, watch=True, top_k=3),
    request(8, seed=21, watch=True, top_p=0.5, canvas_length=1, max_new_tokens=3),
    request(8, seed=22, watch=True, canvas_length=19, **SHAPES["all"]),
    request(6, seed=23, mode="ar", **SHAPES["all"]),
    request(6, seed=24, mode="ar"),
    request(9, seed=25, watch=True, convention="jax", **ONLY),
]


@pytest.mark.parametrize("limits", [NO_REUSE, EngineConfig(prefix_cache_tokens=0, max_batch_tokens=25)])
def test_a_batch_equals_its_singles_bit_for_bit(limits: EngineConfig, threads: int) -> None:
    events = run(Engine(MODEL, limits), COMPANY)
    for number, item in enumerate(COMPANY, start=1):
        assert of(events, number) == run(Engine(MODEL, NO_REUSE), [item]), number


def test_joining_changes_nothing() -> None:
    joins = {2 * i: item for i, item in enumerate(COMPANY)}
    events = run(Engine(MODEL, NO_REUSE), joins=joins)
    for number, item in enumerate(COMPANY, start=1):
        assert of(events, number) == run(Engine(MODEL, NO_REUSE), [item]), number


def test_plain_rows_take_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request without bias or top-p is served by the streamed op, whoever is there, and the others are not."""
    plain_rows: list[int] = []
    real = kernels.TABLE["cpu"]["vocab"]

    def watched(hidden: Tensor, *args: Any) -> Any:
        plain_rows.append(len(hidden))
        return real(hidden, *args)

    monkeypatch.setattr(kernels, "find", lambda op, device: watched if op == "vocab" else kernels.TABLE["cpu"][op])
    once = {"max_denoising_steps": 1, "max_new_tokens": CANVAS}
    items = [
        request(4, **once),
        request(5, top_p=0.5, **once),
        request(6, **once),
        request(7, logit_bias={1: 1}, **once),
    ]
    run(Engine(MODEL, NO_REUSE), items)
    assert plain_rows == [2 * CANVAS]
