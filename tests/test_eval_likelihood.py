"""Likelihoods of token documents: windows, the encoder's numbers, canvas losses and the bound, on tiny models."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_kit import VOCAB, tiny_model
from torch import Tensor

from dgemma.errors import DataError
from dgemma.eval.documents import Document, byte_lengths, cut, estimate, load_documents
from dgemma.eval.likelihood import Canvas, autoregressive, canvas_cross_entropy, diffusion_bound
from dgemma.model import DiffusionGemma
from dgemma.train.attend import BlockAttend, Layout

LENGTHS = (5, 30, 17, 9, 24, 12)
STORY = Canvas(width=4, region=16, context=16, fill=1)


def documents(lengths: tuple[int, ...] = LENGTHS, vocab: int = VOCAB) -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(np.append(2, rng.integers(3, vocab, n)), np.append(0, np.full(n, 3))) for n in lengths]


def unsure_model() -> DiffusionGemma:
    """Every logit is zero."""
    model = tiny_model()
    model.embed.weight.zero_()
    return model


def test_windows_score_every_token_once_after_the_asked_context() -> None:
    docs = documents((5, 30, 40))
    seen = [np.zeros(len(doc.ids), dtype=int) for doc in docs]
    for window in cut(docs, region=8, context=10):
        ids, at = docs[window.document].ids, int(seen[window.document].sum()) + 1
        seen[window.document][at : at + window.tokens] += 1
        np.testing.assert_array_equal(ids[at - window.start : at + window.tokens], window.ids)
        assert window.start == (1 if at == 1 else min(at, 10)) and window.bytes == 3 * window.tokens <= 24
    assert all(count[0] == 0 and (count[1:] == 1).all() for count in seen)


def test_windows_leave_out_or_fill_an_incomplete_block() -> None:
    (doc,) = documents((10,))
    (whole,) = cut([doc], region=8, context=8, block=8)
    assert whole.tokens == 8 and len(whole.ids) == 9
    _, rest = cut([doc], region=8, context=8, block=4, fill=1)
    assert (rest.start, rest.tokens, list(rest.ids[-2:])) == (8, 2, [1, 1])


def test_wrong_windows_are_refused() -> None:
    with pytest.raises(DataError, match="multiple of the block width 8, got 12"):
        cut(documents(), region=12, context=8, block=8)
    with pytest.raises(DataError, match="at least 1 token, got 0"):
        cut(documents(), region=8, context=0)
    with pytest.raises(DataError, match="shorter than one block"):
        autoregressive(tiny_model(), documents((3,)), Canvas(8, 8, 8))


def test_ratio_and_its_error() -> None:
    """Bytes and nats in exact proportion leave no error; the error of equal sizes is that of a mean."""
    sizes = np.array([10.0, 20.0, 40.0])
    assert estimate(sizes * 2, sizes, sizes).nats_per_token_se == 0
    nats = np.array([1.0, 2.0, 4.0, 5.0])
    got = estimate(nats, np.ones(4), np.full(4, 2.0))
    assert got.nats_per_token == 3.0
    assert got.nats_per_token_se == pytest.approx(nats.std(ddof=1) / 2)
    assert got.bits_per_byte == pytest.approx(1.5 / math.log(2))


def test_bytes_of_tokens_and_files(tmp_path) -> None:
    pieces = ["", " a", "é", "\ufffd"]
    assert list(byte_lengths(lambda ids: pieces[ids[0]], 4)) == [0, 2, 2, 1]
    ids = np.array([2, 5, 6, 2, 7], dtype=np.uint16)
    np.savez(tmp_path / "chat.npz", ids=ids, offsets=np.array([0, 3, 5]), prompt_len=np.array([2, 1]))
    first, second = load_documents(tmp_path / "chat.npz", np.arange(10), end_token=1)
    assert list(first.ids) == [2, 5, 6, 1] and first.given == 2 and list(second.bytes) == [2, 7, 1]
    with pytest.raises(DataError, match="build it first"):
        load_documents(tmp_path / "none.npz", np.arange(10))


def test_encoder_likelihood_equals_one_plain_pass_per_document() -> None:
    model, docs = tiny_model(), documents()
    total = 0.0
    for doc in docs:
        ids = torch.from_numpy(doc.ids)[None]
        attend = BlockAttend(model.config, Layout(torch.tensor([1]), len(doc.ids), 1, 1), torch.float32)
        logits = model.logits(model.encode(ids, torch.arange(len(doc.ids))[None], attend.encode))
        total += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
    for canvas in (Canvas(1, 64, 64), Canvas(1, 8, 64)):
        for size in (4096, 20):
            got = autoregressive(model, docs, canvas, batch_tokens=size)
            assert got.nats == pytest.approx(total, rel=1e-5)
            assert (got.tokens, got.bytes, got.documents) == (sum(LENGTHS), 3 * sum(LENGTHS), len(LENGTHS))


def test_less_context_changes_the_number() -> None:
    model, docs = tiny_model(), documents()
    whole, short = (autoregressive(model, docs, Canvas(1, 8, context)).nats for context in (64, 2))
    assert abs(whole - short) > 0.1


def test_a_model_that_knows_nothing_costs_log_v_everywhere() -> None:
    model, docs = unsure_model(), documents((60,) * 20)
    known = math.log(VOCAB)
    assert autoregressive(model, docs).nats_per_token == pytest.approx(known, rel=1e-6)
    for loss in canvas_cross_entropy(model, docs, STORY):
        assert (loss.every, loss.replaced) == pytest.approx((known, known), rel=1e-6)
    bound = diffusion_bound(model, docs, STORY, rounds=2, grid=(0.0,))
    assert bound.raw.nats_per_token == bound.calibrated.nats_per_token
    assert abs(bound.raw.nats_per_token - known) < 3 * bound.raw.nats_per_token_se < 1


def test_canvas_losses_know_the_noise_level() -> None:
    """At level 0 nothing is replaced; at level 1 everything is, and every position counts as replaced."""
    clean, noise = canvas_cross_entropy(tiny_model(), documents(), STORY, levels=(0.0, 1.0))
    assert clean.replaced == clean.accuracy == 0
    assert noise.every == pytest.approx(noise.replaced, rel=1e-6)


@pytest.mark.parametrize("signal", [False, True])
def test_bound_is_a_function_of_its_seed(signal: bool) -> None:
    model, docs = tiny_model(), documents()
    canvas = Canvas(4, 16, 16, 1, signal)
    first, again, other = (diffusion_bound(model, docs, canvas, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    # 4 tokens a block, the last one filled: ceil(tokens / 4) blocks in each document.
    assert first.blocks == sum(-(-n // 4) for n in LENGTHS)
    assert first.raw.tokens == sum(LENGTHS)


def test_signal_reaches_the_network() -> None:
    model, docs = tiny_model(), documents()
    plain, told = (canvas_cross_entropy(model, docs, Canvas(4, 16, 16, 1, s), levels=(0.5,)) for s in (False, True))
    assert abs(plain[0].every - told[0].every) > 1e-4


LAW = torch.tensor([0.0, 0.0, 0.0, 0.6, 0.2, 0.1, 0.07, 0.03], dtype=torch.float64)


class Denoiser:
    """Knows the law of i.i.d. tokens and the token it looks at, but no noise level: its trust is a fixed logit."""

    def __init__(self) -> None:
        layers = (SimpleNamespace(kind="full"),)
        self.config = SimpleNamespace(vocab_size=len(LAW), layers=layers, sliding_window=4)
        self.embed = SimpleNamespace(weight=torch.zeros(1))

    def encode(self, ids: Tensor, positions: Tensor, attend: object) -> Tensor:
        return ids[..., None].float()

    def denoise(self, ids: Tensor, positions: Tensor, attend: object, soft: object, places: Tensor) -> Tensor:
        return ids[..., None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        own = torch.nn.functional.one_hot(hidden[..., 0].long(), len(LAW))
        return (LAW + 1e-6).log().float() + 6.0 * own


def test_calibration_finds_the_law_behind_a_denoiser() -> None:
    rng = np.random.default_rng(0)
    draws = rng.choice(len(LAW), (200, 128), p=LAW.numpy())
    docs = [Document(np.append(2, row), np.append(0, np.ones(128, dtype=int))) for row in draws]
    bound = diffusion_bound(Denoiser(), docs, Canvas(32, 128, 128), rounds=2)
    entropy = float(-(LAW[3:] * LAW[3:].log()).sum())
    assert all(shift == -6 for half in bound.shifts for shift in half[2:])
    assert abs(bound.calibrated.nats_per_token - entropy) < 4 * bound.calibrated.nats_per_token_se < 0.2
    assert bound.raw.nats_per_token > entropy + 0.5
