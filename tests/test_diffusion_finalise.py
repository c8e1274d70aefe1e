"""What a canvas leaves: the first end token wherever it stands, as transformers finalises it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import EosTokenCriteria, StoppingCriteriaList
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    DiffusionGemmaGenerationMixin,
)

from dgemma.diffusion.finalise import finalise, padded

RELEASED = (1, 106, 50)
PAD = 0


@pytest.mark.parametrize("end", RELEASED)
def test_every_end_token_ends(end: int) -> None:
    assert finalise([7, 8, end, 9, 1], RELEASED) == ((7, 8, end), True)


def test_the_first_of_several_counts_and_it_stays() -> None:
    assert finalise([7, 106, 1, 50], RELEASED) == ((7, 106), True)
    assert finalise([1], RELEASED) == ((1,), True)


def test_without_an_end_token_everything_stays() -> None:
    assert finalise([7, 8, 9], RELEASED) == ((7, 8, 9), False)
    assert finalise([1, 106, 50], ()) == ((1, 106, 50), False), "no stop tokens: never ends by itself"
    assert finalise([PAD, 7], RELEASED) == ((PAD, 7), False), "a pad is a token like others"
    assert finalise([], RELEASED) == ((), False)


def test_padding_to_the_width() -> None:
    assert padded((7, 1), 4, PAD) == (7, 1, 0, 0)
    assert padded((7, 1), 2, PAD) == (7, 1)


@given(st.lists(st.lists(st.sampled_from([1, 5, 6, 7, 50, 106]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_equals_transformers(canvases: list[list[int]]) -> None:
    """Rows of one batch; the two tokens of prompt contain an end token, which must not count."""
    ids = torch.tensor([[9, 1, *canvas] for canvas in canvases])
    theirs, finished = DiffusionGemmaGenerationMixin._finalize_canvas(
        input_ids=ids,
        finished_sequences=torch.zeros(len(canvases), dtype=torch.bool),
        generation_config=DiffusionGemmaGenerationConfig(eos_token_id=list(RELEASED), pad_token_id=PAD),
        stopping_criteria=StoppingCriteriaList([EosTokenCriteria(list(RELEASED))]),
        canvas_length=6,
        eos_tensor=torch.tensor(RELEASED),
    )
    for row, canvas in enumerate(canvases):
        kept, ended = finalise(canvas, RELEASED)
        assert list(padded(kept, 6, PAD)) == theirs[row, 2:].tolist()
        assert ended == bool(finished[row])
