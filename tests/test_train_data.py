"""Batches from token documents: the shipped recipe's draws, target spans, one block, packing, the held-out split."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from train_kit import CONFIG

from dgemma.diffusion.loss import cross_entropy, masked_mean
from dgemma.errors import ConfigError, DataError
from dgemma.model import DiffusionGemma
from dgemma.train.attend import BlockAttend, Layout
from dgemma.train.data.documents import PIECE, Source
from dgemma.train.data.mixture import Mixture, Phase
from dgemma.train.init import new_model
from dgemma.train.objective import Batch

EOS, PAD, TURN_END = 1, 0, 6


def mixture(source: Source, widths: Sequence[int] = (4,), **changes: object) -> Mixture:
    phases = (Phase(0, (1,), (1,) * len(widths)),)
    made = Mixture((source,), widths, phases, tokens=256, max_prefix=4, eos=EOS, pad=PAD, seed=5)
    return replace(made, **changes)  # type: ignore[arg-type]


def texts(lengths: Sequence[int], seed: int = 0) -> Source:
    ids = np.random.default_rng(seed).integers(7, 97, sum(lengths)).astype(np.uint16)
    return Source("texts", ids, np.cumsum([0, *lengths]), None, True, EOS)


def conversations(turns: Sequence[Sequence[tuple[int, int]]]) -> Source:
    """Documents of (question tokens, answer tokens): a question is 10s, the n-th answer of a document 20 + n, end 6."""
    ids: list[int] = []
    offsets, spans = [0], []
    for turn in turns:
        for number, (asked, answered) in enumerate(turn):
            ids += [10] * asked
            spans.append((len(ids), len(ids) + answered))
            ids += [20 + number] * (answered - 1) + [TURN_END]
        offsets.append(len(ids))
    return Source("chats", np.array(ids), np.array(offsets), np.array(spans), True, None, answer_only=True)


# -- what the shipped recipe drew ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "digest"),
    [("text", "e86a9e858f2efcad"), ("chat", "6d5b5ca0d310e6b6"), ("prose", "5a4bc15a9f165afe")],
)
def test_old_sources_give_the_old_batches(name: str, digest: str) -> None:
    """Digests of the class as it was when the first `default` was trained: stories, one-answer chats, prose."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, 300, 40)
    ids = rng.integers(3, 97, lengths.sum()).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    prompts = rng.integers(1, np.minimum(lengths, 17))
    spans = np.stack([offsets[:-1] + prompts, offsets[1:]], axis=1) if name == "chat" else None
    source = Source(name, ids, offsets, spans, name != "prose", TURN_END if name == "chat" else EOS)
    drawn = mixture(source, (16, 32, 128), tokens=1024, max_prefix=16)
    whole = hashlib.sha256()
    for step in range(20):
        batch, one = drawn.batch(step), hashlib.sha256()
        layout = batch.layout
        for value in (batch.ids, batch.valid, layout.start):
            one.update(value.numpy().tobytes())
        one.update(repr((layout.length, layout.region, layout.width)).encode())
        whole.update(one.hexdigest()[:16].encode())
        assert batch.encoder_valid is None and layout.segments is None
    assert whole.hexdigest()[:16] == digest


# -- spans ---------------------------------------------------------------------------------


def test_one_answer_is_the_target_and_all_before_it_the_context() -> None:
    drawn = mixture(conversations([[(3, 5), (2, 9)], [(4, 6), (1, 1), (2, 3)]]))
    seen = set()
    for step in range(40):
        batch = drawn.batch(step)
        assert batch.encoder_valid is not None
        for ids, valid, answers, start in zip(
            batch.ids.tolist(), batch.valid.tolist(), batch.encoder_valid.tolist(), batch.layout.start, strict=True
        ):
            at, n = int(start), sum(valid)
            assert not any(valid[:at]) and all(valid[at : at + n]) and n % 4 == 0
            end = ids.index(TURN_END, at)
            # The canvas of the end is filled up with EOS; the encoder learns answers, of all turns, and no fill.
            assert ids[end + 1 : at + n] == [EOS] * (at + n - end - 1) and n - (end + 1 - at) < 4
            assert answers == [token >= 20 or token == TURN_END for token in ids]
            seen.add((tuple(ids[:at]), tuple(ids[at : end + 1])))
    first, second = [10] * 3 + [20] * 4 + [6], [10] * 4 + [20] * 5 + [6]
    expected = {
        ((10,) * 3, (20, 20, 20, 20, 6)),
        ((*first, 10, 10), (*[21] * 8, 6)),
        ((10,) * 4, (20, 20, 20, 20, 20, 6)),
        ((*second, 10), (6,)),
        ((*second, 10, 6, 10, 10), (22, 22, 6)),
    }
    assert seen == expected


def test_long_contexts_and_answers_are_cut_to_the_limits() -> None:
    source = conversations([[(50, 43)], [(7, 12)]])
    drawn = mixture(source, max_context=10, max_region=16, tokens=64)
    stretches = set()
    for step in range(60):
        batch = drawn.batch(step)
        assert batch.layout.region <= 16 and int(batch.layout.start.max()) <= 10
        for ids, valid, start in zip(batch.ids, batch.valid, batch.layout.start, strict=True):
            shown = ids[int(start) : int(start) + 16]
            stretches.add((bool((shown == TURN_END).any()), int(start), int(valid.sum())))
    # The short one; the long one's beginning, some middle, and its end with one token of fill (43 = 10 * 4 + 3).
    assert stretches == {(True, 7, 12), (False, 10, 16), (True, 10, 16)}


def test_long_contexts_count_as_tokens_of_a_batch() -> None:
    drawn = mixture(conversations([[(100, 8)]] * 50), tokens=400)
    assert all(drawn.batch(step).ids.numel() <= 432 for step in range(5))


@pytest.mark.parametrize("whole", [True, False])
def test_one_random_block_of_every_example(whole: bool) -> None:
    source = replace(texts([40, 41, 60, 200]), whole=whole)
    every, one = mixture(source), mixture(source, blocks="one")
    offsets = set()
    for step in range(10):
        many, single = every.batch(step), one.batch(step)
        assert torch.equal(many.ids, single.ids) and torch.equal(many.valid, single.valid)
        assert single.layout.region == single.layout.width == 4
        ahead = single.layout.start - many.layout.start
        assert (ahead >= 0).all() and (ahead % 4 == 0).all() and (ahead < many.layout.region).all()
        chosen = single.valid.gather(1, single.layout.canvas_positions())
        assert chosen.any(dim=1).all() and (chosen.all() or not whole)
        offsets |= set(ahead.tolist())
    assert len(offsets) > 5
    with pytest.raises(ConfigError, match="all or one, got 'two'"):
        mixture(source, blocks="two")


# -- packing -------------------------------------------------------------------------------


@functools.cache
def _model() -> DiffusionGemma:
    return new_model(CONFIG, 3)


def _outputs(batch: Batch, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the encoder `[B, L, V]` and of the canvases `[B, R, V]`."""
    model = _model()
    attend = BlockAttend(CONFIG, batch.layout, torch.float32)
    with torch.no_grad():
        clean = model.encode(batch.ids, torch.arange(batch.ids.shape[1]).expand_as(batch.ids), attend.encode)
        return model.logits(clean), model.logits(model.denoise(noisy, batch.layout.canvas_positions(), attend.denoise))


def _short() -> Source:
    return replace(texts([30, 5, 7, 9, 11, 13, 6, 8], seed=2), pack=True)


def _packed() -> Batch:
    batch = mixture(_short(), tokens=300).batch(2)
    assert batch.layout.segments is not None and int(batch.layout.segments.max()) >= 2
    return batch


def test_packed_documents_are_the_same_as_unpacked_ones() -> None:
    """Every logit of a packed batch, and its two losses, against each document alone in a row."""
    batch = _packed()
    layout, segments, answers = batch.layout, batch.layout.segments, batch.encoder_valid
    assert segments is not None and answers is not None
    places = layout.canvas_positions()
    noisy = torch.randint(97, places.shape, generator=torch.Generator().manual_seed(0))
    clean, canvas = _outputs(batch, noisy)
    sums = {"canvas": 0.0, "encoder": 0.0}
    owners = segments.gather(1, places)
    supervised = encoded = 0
    for row in range(len(batch.ids)):
        for owner in range(int(segments[row].max()) + 1):
            own, blocks = (segments[row] == owner).nonzero().flatten(), (owners[row] == owner).nonzero().flatten()
            begin, first = int(own[0]), int(places[row, blocks[0]])
            single = Layout(torch.tensor([first - begin]), len(own), len(blocks), layout.width)
            alone = Batch(batch.ids[row, own][None], batch.valid[row, own][None], single)
            apart_clean, apart_canvas = _outputs(alone, noisy[row, blocks][None])
            torch.testing.assert_close(clean[row, own], apart_clean[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(canvas[row, blocks], apart_canvas[0], atol=1e-5, rtol=0)
            assert alone.valid.all() and int(alone.ids[0, -1]) == EOS
            targets = alone.ids[:, int(single.start) :]
            sums["canvas"] += float(cross_entropy(apart_canvas, targets, torch.ones_like(targets, dtype=bool)).sum())
            nexts = alone.ids[:, 1:]
            sums["encoder"] += float(
                cross_entropy(apart_clean[:, :-1], nexts, torch.ones_like(nexts, dtype=bool)).sum()
            )
            supervised, encoded = supervised + targets.numel(), encoded + nexts.numel()
    valid = batch.valid.gather(1, places)
    assert int(valid.sum()) == supervised and int(answers[:, 1:].sum()) == encoded
    packed = masked_mean(cross_entropy(canvas, batch.ids.gather(1, places), valid), valid)
    assert float(packed) == pytest.approx(sums["canvas"] / supervised, abs=1e-5)
    packed = masked_mean(cross_entropy(clean[:, :-1], batch.ids[:, 1:], answers[:, 1:]), answers[:, 1:])
    assert float(packed) == pytest.approx(sums["encoder"] / encoded, abs=1e-5)


def test_packing_needs_its_segments() -> None:
    """Without them documents see each other: what the law above would find."""
    batch = _packed()
    noisy = torch.randint(97, (len(batch.ids), batch.layout.region))
    together = _outputs(batch, noisy)
    leaking = _outputs(replace(batch, layout=replace(batch.layout, segments=None)), noisy)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(together, leaking, strict=True))


def test_no_two_rows_fit_into_one_and_no_block_lies_across_documents() -> None:
    batch = _packed()
    layout, segments = batch.layout, batch.layout.segments
    assert segments is not None
    of_blocks = segments.gather(1, layout.canvas_positions()).view(len(batch.ids), -1, layout.width)
    assert (of_blocks == of_blocks[:, :, :1]).all()
    assert torch.equal(batch.valid, segments >= 0)
    many = replace(texts(np.random.default_rng(0).integers(10, 200, 100).tolist()), pack=True)
    for step in range(5):
        batch = mixture(many, tokens=2000).batch(step)
        used = sorted(batch.valid.sum(dim=1).tolist())
        longest = max(int((row == 0).sum()) for row in batch.layout.segments)  # the longest lies first in its row
        assert used[0] + used[1] > longest >= used[-1], "no two rows would have fitted into one"
    # One block of each document, and a shorter encoder input for who trains the canvas only.
    one = mixture(_short(), blocks="one").batch(0).layout
    assert one.segments is not None
    chosen = one.segments.gather(1, one.start)
    assert all(len(set(row)) == len(row) for row in ([s for s in line if s >= 0] for line in chosen.tolist()))
    short = layout.without_targets()
    assert short.length < layout.length and short.canvas_mask(5).shape[-1] == short.length + short.region


def test_a_layouts_examples_are_its_rows() -> None:
    layout = _packed().layout
    part = layout.examples(slice(1, None, 2))
    assert torch.equal(part.canvas_mask(5), layout.canvas_mask(5)[1::2])
    assert torch.equal(part.clean_mask(5), layout.clean_mask(5)[1::2])
    assert torch.equal(part.canvas_positions(), layout.canvas_positions()[1::2])


# -- the held-out split --------------------------------------------------------------------


def documents(source: Source) -> list[tuple[int, ...]]:
    return [tuple(source.document(index).tolist()) for index in range(len(source))]


def test_documents_are_held_out_by_what_they_say() -> None:
    source = texts([int(n) for n in np.random.default_rng(1).integers(4, 20, 400)])
    doubled = Source("two", np.tile(source.ids, 2), np.append(source.offsets, source.offsets[1:] + len(source.ids)),
                     None, True, EOS)  # fmt: skip
    train, held = source.split(0.1)
    assert held is not None and 20 <= len(held) <= 65
    assert sorted(documents(train) + documents(held)) == sorted(documents(source))
    assert not set(documents(train)) & set(documents(held))
    wide = replace(doubled, ids=doubled.ids.astype(np.uint32))
    for again in (doubled, wide):
        train_again, held_again = again.split(0.1)
        assert held_again is not None
        assert set(documents(held_again)) == set(documents(held)) and len(held_again) == 2 * len(held)
        assert set(documents(train_again)) == set(documents(train))
    assert source.split(0.0) == (source, None) and texts([9]).split(0.5)[1] is None
    with pytest.raises(DataError, match=r"less than 1, got 1\.5"):
        source.split(1.5)


def test_a_split_keeps_the_spans() -> None:
    source = conversations([[(3, 5 + n % 7), (2, 4)] for n in range(60)])
    train, held = source.split(0.2)
    assert held is not None
    for part in (train, held):
        for index in range(len(part)):
            targets = part.targets(index)
            assert targets is not None and len(targets) == 2
            for number, (begin, end) in enumerate(targets):
                span = part.document(index)[begin:end]
                assert set(span[:-1]) == {20 + number} and span[-1] == TURN_END


def test_a_single_long_text_is_split_in_stretches() -> None:
    source = replace(texts([PIECE * 20 + 100]), whole=False)
    train, held = source.split(0.01)
    assert held is not None and len(held) == 1
    left = PIECE * 20 + 100 - len(held.ids)
    assert len(train.ids) == left and len(train) <= 2, "what remains in one piece stays in one piece"
    joined = source.ids.tobytes()
    assert all(bytes(train.document(index)) in joined for index in range(len(train)))


# -- token files ---------------------------------------------------------------------------


def test_token_files_come_back_and_bad_ones_are_named(tmp_path: Path) -> None:
    source = conversations([[(3, 5), (2, 9)], [(4, 6)]])
    source.save(tmp_path / "chats.npz")
    loaded = Source.load(tmp_path / "chats.npz", whole=True, end_token=None)
    assert documents(loaded) == documents(source) and loaded.spans is not None and source.spans is not None
    assert np.array_equal(loaded.spans, source.spans)
    assert [file.name for file in tmp_path.iterdir()] == ["chats.npz"]
    data = (tmp_path / "chats.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "offsets.npz", ids=np.arange(5), offsets=np.array([0, 9]))
    np.savez(tmp_path / "prompts.npz", ids=np.arange(5), offsets=np.array([0, 2, 5]), prompt_len=np.array([1, 3]))
    for name, reason in (("half", "not a token file"), ("offsets", "number of ids, 5"), ("prompts", "span")):
        with pytest.raises(DataError, match=f"{name}.*{reason}"):
            Source.load(tmp_path / f"{name}.npz", whole=True, end_token=EOS)
    for spans in ([[0, 3]], [[3, 3]], [[6, 10]], [[3, 8], [7, 12]], [[3, 8], [14, 18]]):
        with pytest.raises(DataError, match="span"):
            replace(source, spans=np.array(spans))
