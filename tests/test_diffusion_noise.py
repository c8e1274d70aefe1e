"""Laws of the noise: t = 0 is the identity, t = 1 the prior, same key same draw, other keys independent."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chance import SURE, fits, independent, uniformly
from torch import Tensor

from dgemma.diffusion.noise import corrupt, draw_uniforms, first_canvas, step_noise
from dgemma.kernels import DRAW_BLOCK

VOCAB, WIDTH = 997, 1 << 15
KEY = {"seed": 3, "choice": 0, "canvas": 1}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- corruption ----------------------------------------------------------------------


def test_no_noise_is_the_identity() -> None:
    ids = torch.randint(VOCAB, (4, 64), generator=generator())
    noisy, replaced = corrupt(ids, 0.0, VOCAB, generator())
    assert torch.equal(noisy, ids) and not replaced.any()


def test_full_noise_is_the_prior() -> None:
    noisy, replaced = corrupt(torch.full((4, 50_000), 5), 1.0, VOCAB, generator())
    assert replaced.all()
    assert uniformly(noisy, VOCAB) > SURE


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_share_of_noise_is_t_and_a_token_may_redraw_itself(t: float) -> None:
    vocab, ids = 4, torch.full((1, 200_000), 2)
    noisy, replaced = corrupt(ids, t, vocab, generator())
    law = torch.full((vocab,), t / vocab)
    law[2] += 1 - t
    assert fits(torch.bincount(noisy.flatten(), minlength=vocab), law) > SURE
    assert fits(torch.bincount(replaced.flatten().long()), torch.tensor([1 - t, t])) > SURE
    redrawn = replaced & (noisy == ids)
    assert fits(torch.bincount(redrawn[replaced].long()), torch.tensor([3.0, 1.0])) > SURE


def test_what_is_not_replaced_is_kept() -> None:
    ids = torch.randint(VOCAB, (8, 128), generator=generator())
    noisy, replaced = corrupt(ids, 0.5, VOCAB, generator())
    assert torch.equal(noisy[~replaced], ids[~replaced])


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 6)])
def test_t_is_per_example_or_per_position(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(3, 6, dtype=torch.int64)
    t = torch.tensor([0.0, 1.0, 0.0]).reshape(3, *(1,) * (len(shape) - 1)).expand(shape)
    _, replaced = corrupt(ids, t, VOCAB, generator())
    assert replaced.tolist() == [[False] * 6, [True] * 6, [False] * 6]


def test_one_t_per_example_is_not_one_per_position() -> None:
    """A square batch must not mix up its axes."""
    _, replaced = corrupt(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0.0, 1.0]), VOCAB, generator())
    assert replaced.tolist() == [[False, False], [True, True]]


def test_same_generator_same_corruption() -> None:
    ids = torch.randint(VOCAB, (4, 64), generator=generator())
    for a, b in zip(corrupt(ids, 0.5, VOCAB, generator(9)), corrupt(ids, 0.5, VOCAB, generator(9)), strict=True):
        assert torch.equal(a, b)


# -- keyed noise ---------------------------------------------------------------------


def test_the_first_canvas_is_the_prior_over_every_id() -> None:
    canvas = first_canvas(**KEY, width=200_000, vocab=VOCAB)
    assert canvas.shape == (200_000,) and canvas.dtype == torch.int64
    assert uniformly(canvas, VOCAB) > SURE
    assert set(canvas.tolist()) == set(range(VOCAB)), "control tokens are noise too"


def test_step_noise_is_uniform() -> None:
    tokens, uniforms = step_noise(**KEY, step=4, width=200_000, vocab=VOCAB)
    assert tokens.dtype == torch.int64 and uniforms.dtype == torch.float64
    assert uniformly(tokens, VOCAB) > SURE
    assert float(uniforms.min()) >= 0 and float(uniforms.max()) < 1
    assert uniformly((uniforms * 1000).long(), 1000) > SURE


@pytest.mark.parametrize(("vocab", "blocks"), [(1, 1), (DRAW_BLOCK, 1), (DRAW_BLOCK + 1, 2), (262_144, 256)])
def test_draw_uniforms_have_one_column_per_block(vocab: int, blocks: int) -> None:
    uniforms = draw_uniforms(**KEY, step=4, width=5, vocab=vocab)
    assert uniforms.shape == (5, blocks) and uniforms.dtype == torch.float64
    wide = draw_uniforms(**KEY, step=4, width=5, vocab=vocab + 3 * DRAW_BLOCK)
    assert torch.equal(wide[:, :blocks], uniforms), "a block's uniform does not depend on the vocabulary"


def draws(**changes: int) -> dict[str, Tensor]:
    """All keyed draws of one step as uniforms `[WIDTH]`."""
    words: dict[str, Any] = KEY | {"step": 4, "width": WIDTH, "vocab": VOCAB} | changes
    first = {name: value for name, value in words.items() if name != "step"}
    tokens, uniforms = step_noise(**words)
    return {
        "first": (first_canvas(**first).double() + 0.5) / VOCAB,
        "fresh": (tokens.double() + 0.5) / VOCAB,
        "uniform": uniforms,
        "draw": draw_uniforms(**words)[:, 0],
    }


def test_streams_of_one_step_are_independent() -> None:
    table = draws()
    names = list(table)
    for i, left in enumerate(names):
        for right in names[i + 1 :]:
            # 997 tokens fill 8 bins evenly to 0.5 %, below what 32 k draws can see.
            assert independent(table[left], table[right], 8) > SURE, (left, right)


@pytest.mark.parametrize("word", ["seed", "choice", "canvas", "step"])
def test_a_changed_word_gives_independent_noise(word: str) -> None:
    here, there = draws(), draws(**{word: 9})
    for name in here:
        if (name, word) != ("first", "step"):
            assert independent(here[name], there[name], 8) > SURE, name


def test_draw_blocks_are_independent() -> None:
    table = draw_uniforms(**KEY, step=4, width=WIDTH, vocab=3 * DRAW_BLOCK)
    assert independent(table[:, 0], table[:, 1]) > SURE
    assert independent(table[:-1, 0], table[1:, 2]) > SURE


@pytest.mark.parametrize("draw", [first_canvas, step_noise, draw_uniforms])
def test_same_key_same_draw_and_a_narrow_canvas_is_the_start_of_a_wide_one(draw: Callable[..., Any]) -> None:
    """So the noise of a row does not depend on who shares its batch, or on when it is made."""
    key = {**KEY, "vocab": VOCAB}
    if "step" in inspect.signature(draw).parameters:
        key["step"] = 7

    def make(width: int) -> tuple[Tensor, ...]:
        made = draw(**key, width=width)
        return made if isinstance(made, tuple) else (made,)

    for narrow, wide, again in zip(make(32), make(256), make(256), strict=True):
        assert torch.equal(wide, again)
        assert torch.equal(narrow, wide[:32])
