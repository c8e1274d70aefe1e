"""Decision reads: the tree of labels equals brute force, rows equal singles, pins stand in every canvas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from engine_kit import VOCAB, tiny_model

from dgemma.api import LLM
from dgemma.config import EngineConfig
from dgemma.control.decide import Asked, Question, choice, prepare, score, yes_no
from dgemma.control.decision import CALIBRATION, Calibration, conclude, label_law
from dgemma.diffusion.noise import first_canvas
from dgemma.engine import Engine, token_logprobs
from dgemma.engine.deciding import decide, laws
from dgemma.engine.reading import Look, continuations, narrowest, read
from dgemma.errors import CheckpointError, RequestError
from dgemma.model import DiffusionGemma

WIDTH = 16
LABELS = ("red", "real", "rose", "blue", "bluish", "by", "it")
BEFORE = [2, *range(3, 90)]  # longer than the window and than two blocks


def encode(text: str) -> list[int]:
    """A token a character."""
    return [max(3, ord(character)) for character in text]


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return tiny_model(canvas_length=WIDTH)


@pytest.fixture
def engine(model: DiffusionGemma) -> Engine:
    return Engine(model)


def asked_for(template: str, questions: Sequence[Question], **options: Any) -> list[Asked]:
    return prepare(encode, template, questions, BEFORE, **options)


def brute_force(model: DiffusionGemma, asked: Asked, draws: int, seed: int, mistake: str = "") -> list[float]:
    """Label by label, without a tree and without the engine: explicit masks, one canvas at a time, float32."""
    cache = naive.NaiveCache(model.config)
    naive.encode(model, cache, torch.tensor(asked.lead))
    means = []
    for tail in asked.tails:
        by_draw = []
        for draw in range(draws):
            left, probability = [*asked.tails], 1.0
            while len(left) > 1:
                place = next(at for at in range(99) if len({row[at] for row in left}) > 1)
                canvas = first_canvas(seed + (mistake == "seed"), draw, 0, WIDTH, VOCAB)
                for at in range(min(map(len, left))):
                    here = {row[at] for row in left}
                    if len(here) == 1 and not (mistake == "no pins behind" and at > place):
                        canvas[at] = here.pop()
                logits = model.logits(naive.denoise(model, cache, canvas))[place + (mistake == "position")]
                options = sorted({row[place] for row in left})
                law = torch.softmax(logits if mistake == "unnormalised" else logits[options], -1)
                probability *= float(law[tail[place] if mistake == "unnormalised" else options.index(tail[place])])
                left = [row for row in left if row[place] == tail[place]]
            by_draw.append(probability)
        means.append(sum(by_draw) / draws)
    return means


@torch.inference_mode()
@pytest.mark.parametrize("text", ["It is [[answer]].", "[[answer]]!", "x  [[answer]] or so"])
def test_the_tree_equals_brute_force(model: DiffusionGemma, engine: Engine, text: str) -> None:
    (asked,) = asked_for(text, [choice(LABELS)])
    (decision,) = decide(engine, [asked], Calibration(), draws=3, seed=5)
    expected = brute_force(model, asked, 3, 5)
    assert [*decision.probabilities.values()] == pytest.approx(expected, abs=2e-6)
    assert sum(expected) == pytest.approx(1, abs=1e-6)
    assert decision.answer == LABELS[expected.index(max(expected))]


@torch.inference_mode()
@pytest.mark.parametrize("mistake", ["position", "unnormalised", "no pins behind", "seed"])
def test_brute_force_with_a_mistake_is_another_law(model: DiffusionGemma, engine: Engine, mistake: str) -> None:
    """What the comparison above could not see, it would not prove."""
    (asked,) = asked_for("It is [[answer]].", [choice(("red", "ran", "low"))])  # all of one length
    (decision,) = decide(engine, [asked], Calibration(), draws=3, seed=5)
    right, wrong = (brute_force(model, asked, 3, 5, kind) for kind in ("", mistake))
    told = [*decision.probabilities.values()]
    assert told == pytest.approx(right, abs=2e-6)
    assert max(abs(a - b) for a, b in zip(told, wrong, strict=True)) > 1e-3


def several() -> list[Question]:
    """Leads of different lengths, some beyond a block; labels of one and more tokens; all kinds."""
    return [
        yes_no("Is it? [[answer]].", yes="y", no="n"),
        choice(LABELS, "What " + "is that thing there on the hill " * 2 + "[[answer]]."),
        score(1, 12, "How many? [[answer]] of them"),
        choice(("a", "b", "c"), "[[answer]]"),
    ]


@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 40, "encode_chunk": 40}])
def test_questions_together_are_each_of_them_alone_bit_for_bit(model: DiffusionGemma, limits: dict[str, int]) -> None:
    engine, small = Engine(model), Engine(model, EngineConfig(**limits))
    together = laws(small, asked_for("[[question]]", several()), draws=3, seed=1)
    for question, (law, mass) in zip(several(), together, strict=True):
        ((alone, own_mass),) = laws(engine, asked_for("[[question]]", [question]), draws=3, seed=1)
        assert torch.equal(law, alone) and mass == own_mass
    ((one, _),) = laws(engine, asked_for("[[question]]", several()[:1]), draws=1, seed=1)
    assert torch.equal(one, together[0][0][:1]), "a draw depends on how many there are"


def spied(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.Tensor]]:
    """Every canvas that is read from now on, with the length of what stands before it."""
    seen: list[tuple[int, torch.Tensor]] = []
    look: Callable[..., list[torch.Tensor]] = engine.runner.look

    def spy(jobs: Any) -> list[torch.Tensor]:
        seen.extend((cache.length, ids.clone()) for cache, ids in jobs)
        return look(jobs)

    monkeypatch.setattr(engine.runner, "look", spy)
    return seen


def test_pins_stand_in_every_canvas_and_noise_elsewhere(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(engine, monkeypatch)
    (asked,) = asked_for("It is [[answer]]ly so.", [choice(("bad", "bald", "mad"))])
    laws(engine, [asked], draws=2, seed=7)
    assert len(seen) == 2 * len(asked.branches) == 4
    assert all(length == len(asked.lead) == len(BEFORE) + len("It is") for length, _ in seen)
    noise = [first_canvas(7, draw, 0, WIDTH, VOCAB) for draw in range(2)]
    space, a = encode(" a")
    # "b" or "m" at position 1: " ?a", and nothing else is agreed on, for the lengths differ. Then " ba" is given.
    fixed = [{0: space, 2: a}, {0: space, 1: encode("b")[0], 2: a}]
    for row, (_, canvas) in enumerate(seen):
        pins = fixed[row // 2]
        expected = noise[row % 2].clone()
        for place, token in pins.items():
            expected[place] = token
        assert torch.equal(canvas, expected), row


def test_text_behind_labels_of_one_length_is_pinned(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(engine, monkeypatch)
    (asked,) = asked_for("It is [[answer]] to me.", [choice(("bad", "mad"))])
    laws(engine, [asked], draws=1, seed=7)
    ((_, canvas),) = seen
    text = encode(" ?ad to me.")
    assert [place for place in range(len(text)) if canvas[place] != text[place]] == [1]
    assert canvas[len(text) :].tolist() == first_canvas(7, 0, 0, WIDTH, VOCAB)[len(text) :].tolist()


def test_many_questions_are_one_pass(engine: Engine) -> None:
    before = engine.counters
    questions = [choice(("bad", "mad"), f"{number}: [[answer]].") for number in range(20)]
    laws(engine, asked_for("[[question]]", questions), draws=4, seed=0)
    after = engine.counters
    assert after.denoise_passes - before.denoise_passes == 1
    assert after.denoised_tokens - before.denoised_tokens == 20 * 4 * WIDTH
    # What all begin with is encoded once: whole blocks of it, and the rest of each.
    shared = len(BEFORE) - len(BEFORE) % engine.config.block
    rests = sum(len(BEFORE) - shared + len(f"{number}:") for number in range(20))
    assert after.encoded_tokens - before.encoded_tokens == shared + rests


def test_a_joint_read_is_one_canvas_for_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(engine, monkeypatch)
    questions = [choice(("b", "m"), "A [[answer]]"), choice(("xy", "zy", "xw"), "B [[answer]].")]
    asked = asked_for("[[question]]", questions, joint=True)
    together = laws(engine, asked, draws=1, seed=3)
    roots = [canvas for _, canvas in seen]
    assert len(roots) == 2, "one for both questions, and one for what follows x"
    text = encode(" b\nB xy.")
    assert [place for place in range(len(text)) if roots[0][place] != text[place]] == [1, 5, 6]
    assert [place for place in range(len(text)) if roots[1][place] != text[place]] == [1, 6]
    alone = laws(engine, asked_for("[[question]]", questions[:1], joint=True), draws=1, seed=3)
    assert not torch.equal(alone[0][0], together[0][0]), "the text behind is not seen"
    with pytest.raises(RequestError, match=r"equal length; those of 'A .*' differ by 1 tokens"):
        asked_for("[[question]]", [choice(("b", "mm"), "A [[answer]]"), questions[1]], joint=True)
    with pytest.raises(RequestError, match="encoder needs joint=False"):
        decide(engine, asked, Calibration(), joint=True, encoder=True)


def test_the_encoders_own_probability_is_that_of_the_whole_text(engine: Engine) -> None:
    (asked,) = asked_for("It is [[answer]].", [choice(LABELS)])
    totals = [sum(token_logprobs(engine, [*asked.lead, *tail], len(asked.lead))) for tail in asked.tails]
    assert continuations(engine, asked.lead, asked.tails) == pytest.approx(totals, abs=1e-4)
    small = Engine(engine.runner.model, EngineConfig(max_batch_tokens=8))
    assert continuations(small, asked.lead, asked.tails) == continuations(engine, asked.lead, asked.tails)
    (decision,) = decide(engine, [asked], Calibration(), encoder=True)
    expected = torch.softmax(torch.tensor(totals), -1).tolist()
    assert decision.encoder is not None and [*decision.encoder.values()] == pytest.approx(expected, abs=1e-4)


def test_thousands_of_labels(engine: Engine) -> None:
    labels = [f"{number:04}" for number in range(3000)]
    (asked,) = asked_for("Nr [[answer]].", [choice(labels)])
    assert len(asked.branches) == 1 + 3 + 30 + 300
    (decision,) = decide(engine, [asked], Calibration(), draws=1, seed=2)
    assert math.fsum(decision.probabilities.values()) == pytest.approx(1, abs=1e-9)
    first = [math.fsum(list(decision.probabilities.values())[at : at + 1000]) for at in (0, 1000, 2000)]
    ((top,),) = read(
        engine, [Look(asked.lead, WIDTH, asked.branches[0].pins, 1, tuple(encode("012")))], draws=1, seed=2
    )
    assert first == pytest.approx(torch.softmax(torch.tensor(top), -1).tolist(), abs=1e-6)


def test_mean_and_spread_by_hand() -> None:
    (asked,) = asked_for("[[answer]].", [score(1, 3)])
    reads = [[[math.log(p) for p in law] for law in ((0.1, 0.1, 0.2), (0.2, 0.5, 0.1))]]
    law, mass = label_law(asked, reads)
    told = conclude(asked, law, mass, 1.0)
    assert mass == pytest.approx((0.4 + 0.8) / 2)
    laws_ = [(0.25, 0.25, 0.5), (0.25, 0.625, 0.125)]
    assert [*told.probabilities.values()] == pytest.approx([0.25, 0.4375, 0.3125])
    assert told.spread["3"] == pytest.approx(0.375 / math.sqrt(2)) and told.spread["1"] == 0
    means = [sum(p * value for p, value in zip(one, (1, 2, 3), strict=True)) for one in laws_]
    assert told.value == pytest.approx(sum(means) / 2) and told.answer == "2"
    assert told.value_spread == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))
    assert conclude(asked, law[:1], mass, 1.0).spread == {"1": 0.0, "2": 0.0, "3": 0.0}
    cold = conclude(asked, law, mass, 0.5).probabilities
    squares = [[p * p / sum(q * q for q in one) for p in one] for one in laws_]
    assert [*cold.values()] == pytest.approx([(a + b) / 2 for a, b in zip(*squares, strict=True)])


def test_the_width_is_the_narrowest_trained_one() -> None:
    engine = Engine(tiny_model(canvas_length=32, canvas_widths=(8, 16, 32)))
    assert [narrowest(engine, reach) for reach in (1, 8, 9, 17, 32)] == [8, 8, 16, 32, 32]
    assert narrowest(engine, 3, 100) == 100
    with pytest.raises(RequestError, match="take 33 positions; a canvas has 32"):
        narrowest(engine, 33)
    with pytest.raises(RequestError, match="canvas_length must be 1"):
        narrowest(engine, 3, 257)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "kind": (lambda: Question("maybe", ("a", "b")), "one of yesno, choice, score; got 'maybe'"),
    "one label": (lambda: choice(["a"]), "must have 2 to 10000 labels, got 1"),
    "twice": (lambda: choice(["a", "a"], name="q"), "question 'q' has the label 'a' twice"),
    "empty label": (lambda: choice(["a", " "]), "texts that are not empty"),
    "three": (lambda: Question("yesno", ("a", "b", "c")), "needs 2 labels, got 3"),
    "values": (lambda: Question("score", ("1", "2")), "2 labels and 0 values"),
    "range": (lambda: score(5, 5), "low < high"),
    "field": (lambda: Question.of({"kind": "yesno", "label": 1}), "no field 'label'"),
    "no number": (lambda: Question.of({"kind": "score", "labels": ["low", "high"]}), "numbers.*got 'low'"),
    "nothing": (lambda: asked_for("[[answer]]", []), "at least 1"),
    "no hole": (lambda: asked_for("text", [yes_no()]), r"must have 1 \[\[answer\]\] for 1 question, got 0"),
    "two holes": (lambda: asked_for("[[answer]] [[answer]]", [yes_no()]), "got 2"),
    "no place": (
        lambda: asked_for("[[answer]]", [yes_no("Is it?")]),
        r"no \[\[question\]\] where the question 'Is it\?'",
    ),
    "prefix": (lambda: asked_for("[[answer]]", [choice(["New", "New York"])]), "'New' is the beginning of 'New York'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(RequestError, match=message):
        make()


@pytest.mark.parametrize(
    "options", [{"draws": 0}, {"draws": 1.5}, {"seed": None}, {"temperature": 0}, {"temperature": math.nan}]
)
def test_wrong_options_are_told(engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(options))} must be a"):
        decide(engine, asked_for("[[answer]].", [yes_no()]), Calibration(), **options)


def test_too_long_a_state_is_told(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"need 518 positions; the model has 512|need \d+ positions"):
        decide(engine, asked_for("x" * 440 + "[[answer]].", [yes_no()]), Calibration())


# -- the class that users meet -----------------------------------------------------------


def test_llm_decide(llm: LLM) -> None:
    questions = [yes_no("Is it? [[answer]].", name="a"), score(0, 3, "How many? [[answer]]!")]
    one, two = llm.decide("Once upon a time.\n[[question]]", questions, seed=4, encoder=True)
    assert (one.question, one.answer in ("yes", "no"), one.draws, one.temperature) == (questions[0], True, 4, 1.0)
    assert math.fsum(one.probabilities.values()) == pytest.approx(1) == math.fsum((one.encoder or {}).values())
    assert two.value is not None and 0 <= two.value <= 3 and one.value is None
    assert 0 < one.mass < 1 and one.confidence == max(one.probabilities.values())
    assert llm.decide("Once upon a time.\nIs it? [[answer]].", yes_no(), seed=4)[0].probabilities == one.probabilities
    assert llm.decide("Is it? [[answer]].", yes_no(), prompt="Once upon a time.\n", seed=4)[0].probabilities is not None
    assert llm.decide("[[answer]].", yes_no())[0].mass > 0, "nothing but the begin-of-sequence token before it"
    assert llm.decide("Is it? [[answer]].", yes_no(), seed=5) != llm.decide("Is it? [[answer]].", yes_no(), seed=4)


def test_a_conversation_is_a_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "A girl.\n[[question]]"}, {"role": "assistant", "content": "[[answer]]"}]
    (told,) = llm.decide(talk, yes_no("Is she old?"))
    text = "<|turn>user\nA girl.\nIs she old?<turn|>\n<|turn>model\n[[answer]]<turn|>\n"
    assert llm.decide(text, yes_no())[0].probabilities == told.probabilities
    with pytest.raises(RequestError, match="no prompt before it"):
        llm.decide(talk, yes_no("Is she old?"), prompt="x")


def test_the_checkpoints_calibration_is_applied(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "calibrated"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    llm = LLM.load(copy, threads=1)
    (raw,) = llm.decide("Is it? [[answer]].", yes_no())
    Calibration({"yesno": 3.0}).save(copy / CALIBRATION)
    (fitted,) = llm.decide("Is it? [[answer]].", yes_no())
    assert fitted.temperature == 3.0 and 0.5 < fitted.confidence < raw.confidence
    assert llm.decide("Is it? [[answer]].", yes_no(), temperature=1.0) == [raw]
    assert llm.decide("Is it? [[answer]].", yes_no(), calibration=Calibration()) == [raw]
    assert llm.decide("Is it? [[answer]].", choice(("yes", "no")))[0].temperature == 1.0, "another kind"
    for broken in (
        "[]",
        "{",
        '{"version": 1, "temperatures": {"yesno": 0}, "encoder_temperatures": {}}',
        '{"version": 2}',
    ):
        (copy / CALIBRATION).write_text(broken)
        with pytest.raises(CheckpointError, match="calibration"):
            llm.decide("Is it? [[answer]].", yes_no())


def test_answers_and_reads_at_the_same_time(llm: LLM) -> None:
    """Reads have caches of their own, so neither changes the other."""
    alone = llm.generate("Once", seed=3, max_new_tokens=24)
    quiet = llm.decide("Is it? [[answer]].", yes_no(), seed=4)
    stream = llm.stream("Once", seed=3, max_new_tokens=24)
    next(stream)
    assert llm.decide("Is it? [[answer]].", yes_no(), seed=4) == quiet
    stream.close()  # type: ignore[attr-defined]
    assert replace(llm.generate("Once", seed=3, max_new_tokens=24), seconds=0, cached_tokens=0) == replace(
        alone, seconds=0, cached_tokens=0
    )
