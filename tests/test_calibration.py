"""Calibration: ECE by hand, temperatures that are known, the split, the file, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from text_kit import dgemma

from dgemma.api import LLM
from dgemma.cli import calibrate as command
from dgemma.cli.arguments import Parser
from dgemma.control.decide import choice
from dgemma.control.decision import CALIBRATION, Calibration
from dgemma.errors import CheckpointError, DataError, RequestError
from dgemma.eval.calibration import (
    Case,
    Reliability,
    expected_error,
    fit_temperature,
    for_fitting,
    plot_reliability,
    reliability,
)
from dgemma.eval.decisions import Item, Measured, fit, load_items, measure


def case(*laws: tuple[float, ...], truth: int = 0) -> Case:
    """A case from probabilities by draw."""
    return Case(torch.tensor(laws, dtype=torch.float64).log(), truth)


def test_ece_by_hand() -> None:
    confidence = [0.95, 0.92, 0.6, 0.68, 0.61, 1.0, 0.3]
    right = [True, False, True, True, False, True, False]
    # Bins of a tenth: 0.3 | 0.6, 0.68, 0.61 | 0.95, 0.92, 1.0
    by_hand = (1 * abs(0.3 - 0) + 3 * abs(1.89 / 3 - 2 / 3) + 3 * abs(2.87 / 3 - 2 / 3)) / 7
    ece, bins = expected_error(confidence, right)
    assert ece == pytest.approx(by_hand) == pytest.approx((0.3 + 0.11 + 0.87) / 7)
    assert [(one.low, one.high, one.count) for one in bins] == [(0.3, 0.4, 1), (0.6, 0.7, 3), (0.9, 1.0, 3)]
    assert bins[1].confidence == pytest.approx(0.63) and bins[1].accuracy == pytest.approx(2 / 3)
    # One bin sees only the means, so errors of different sign cancel.
    assert expected_error(confidence, right, 1)[0] == pytest.approx(abs(5.06 / 7 - 4 / 7))
    with pytest.raises(DataError, match="no answers"):
        expected_error([], [])


def test_reliability_is_of_the_mean_over_draws() -> None:
    cases = [case((0.9, 0.1), (0.3, 0.7)), case((0.2, 0.8), truth=1), case((0.5, 0.5), truth=1)]
    told = reliability(cases)
    assert (told.count, told.accuracy) == (3, pytest.approx(2 / 3))  # of equals the first is the answer: wrong here
    assert told.nll == pytest.approx(-(math.log(0.6) + math.log(0.8) + math.log(0.5)) / 3)
    assert [one.confidence for one in told.bins] == pytest.approx([0.5, 0.6, 0.8])
    assert told.ece == pytest.approx((0.5 + 0.4 + 0.2) / 3)
    halved = reliability(cases[:1], 0.5)
    assert halved.bins[0].confidence == pytest.approx((0.81 / 0.82 + 0.09 / 0.58) / 2)


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_spoilt_a_law_is_found(true_temperature: float) -> None:
    """Answers drawn from laws that are then sharpened: the fit takes it back, and ECE falls."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for _ in range(4000):
        logits = 1.5 * torch.randn(5, generator=generator, dtype=torch.float64)
        truth = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        cases.append(Case(torch.log_softmax(logits * true_temperature, -1)[None], truth))
    found = fit_temperature(cases)
    assert found == pytest.approx(true_temperature, rel=0.06)
    if true_temperature != 1:
        assert reliability(cases, found).ece < 0.03 < 0.06 < reliability(cases).ece
    with pytest.raises(DataError, match="no answers"):
        fit_temperature([])


def test_hopeless_laws_stay_within_bounds() -> None:
    assert fit_temperature([case((0.9, 0.1), truth=1)] * 5) == pytest.approx(20, rel=1e-3)
    assert fit_temperature([case((0.9, 0.1), truth=0)] * 5) == pytest.approx(0.05, rel=1e-3)


def test_a_passage_is_on_one_side() -> None:
    sides = [for_fitting(f"passage {number}") for number in range(4000)]
    assert 0.47 < sum(sides) / 4000 < 0.53 and for_fitting("passage 7") is sides[7]
    assert all(for_fitting(f"passage {number}", 0.9) for number in range(4000) if sides[number])


def measured(passages: int, *, fit_right: float, test_right: float) -> list[Measured]:
    """Confidence 0.9 everywhere; how often that is right differs between the splits, the encoder is always right."""
    counts: dict[bool, int] = {True: 0, False: 0}
    out = []
    for number in range(passages):
        item = Item(f"passage {number} [[answer]]", choice(("a", "b")), 0)
        side = for_fitting(item.template)
        counts[side] += 1
        good = counts[side] % 10 < 10 * (fit_right if side else test_right)
        out.append(Measured(item, case((0.9, 0.1) if good else (0.1, 0.9)), case((0.9, 0.1))))
    return out


def test_the_fit_sees_one_split_and_the_report_the_other() -> None:
    calibration, (report,) = fit(measured(4000, fit_right=0.6, test_right=0.8))
    # Right 60 % of the time: the probability of the answer becomes 0.6, log-odds 2.197 / T = 0.405.
    assert report.temperature == pytest.approx(math.log(9) / math.log(1.5), rel=0.02)
    assert report.raw.accuracy == pytest.approx(0.8, abs=0.01) and report.raw.ece == pytest.approx(0.1, abs=0.01)
    assert report.calibrated.ece == pytest.approx(0.2, abs=0.01), "another law on the test split, and it shows"
    assert report.encoder_raw.ece == pytest.approx(0.1) and report.encoder_temperature < 0.1
    assert report.fitted_on + report.raw.count == 4000 and 1900 < report.fitted_on < 2100
    assert calibration.temperatures == {"choice": round(report.temperature, 4)}
    with pytest.raises(DataError, match=r"kind 'choice' has .* needs at least 10"):
        fit(measured(12, fit_right=0.6, test_right=0.8))
    with pytest.raises(RequestError, match="between 0 and 1, got 1"):
        fit([], share=1)


def test_the_file_comes_back_as_it_went(tmp_path: Path) -> None:
    calibration = Calibration({"yesno": 2.5}, {"score": 0.7}, {"bins": 10})
    path = calibration.save(tmp_path / "mine.json")
    assert Calibration.load(path) == calibration and [one.name for one in tmp_path.iterdir()] == ["mine.json"]
    assert Calibration.load(tmp_path) == Calibration(), "a folder without one"
    with pytest.raises(CheckpointError, match=r"gone\.json cannot be read"):
        Calibration.load(tmp_path / "gone.json")
    with pytest.raises(CheckpointError, match="name another file"):
        calibration.save(tmp_path / "no" / "such.json")


# -- data and the command ------------------------------------------------------------------

WORDS = ("river", "girl", "time", "little", "lived")


def rows(passages: int = 40) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for number in range(passages):
        word, template = WORDS[number % 5], f"Once {number} upon a {WORDS[number % 5]}.\n[[question]]"
        out.append({"template": template, "kind": "yesno", "text": "Is it? [[answer]].", "answer": "yes"})
        choices = {"kind": "choice", "labels": list(WORDS), "text": "A [[answer]].", "answer": word}
        out.append({"template": template, **choices})
        out.append({"template": template, "kind": "score", "low": 1, "high": 4, "text": "[[answer]].", "answer": "3"})
    return out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


def test_what_is_measured_is_what_decide_says(llm: LLM, data: Path) -> None:
    items = load_items(data)[:6]
    for item, one in zip(items, measure(llm, items, draws=3, seed=2), strict=True):
        (told,) = llm.decide(item.template, item.question, draws=3, seed=2, encoder=True)
        assert one.item == item and one.denoiser.truth == one.encoder.truth == item.truth
        assert one.denoiser.logp.exp().mean(0).tolist() == pytest.approx([*told.probabilities.values()])
        assert one.encoder.logp.exp()[0].tolist() == pytest.approx([*(told.encoder or {}).values()])


def run(*arguments: str) -> int:
    parser = Parser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*arguments, "--threads", "1"]))


def test_the_command(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "fitted.json", tmp_path / "plot.png"
    assert run(str(folder), str(data), "--out", str(out), "--draws", "2", "--json", "--plot", str(plot)) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["kind"] for one in told["kinds"]] == ["choice", "score", "yesno"]
    assert plot.read_bytes()[:4] == b"\x89PNG" and plot.stat().st_size > 5000
    fitted = Calibration.load(out)
    assert set(fitted.temperatures) == set(fitted.encoder_temperatures) == {"choice", "score", "yesno"}
    assert not (folder / CALIBRATION).exists()
    llm = LLM.load(folder, threads=1)
    items = [item for item in load_items(data) if item.question.kind == "choice"]
    test = [one.denoiser for one in measure(llm, items, draws=2) if not for_fitting(one.item.template)]
    (choices,) = [one for one in told["kinds"] if one["kind"] == "choice"]
    expected = reliability(test, choices["temperature"])
    assert choices["calibrated"]["ece"] == pytest.approx(expected.ece, abs=1e-5)
    assert choices["calibrated"]["nll"] <= choices["raw"]["nll"] + 0.1
    assert run(str(folder), str(data), "--out", str(out), "--draws", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[1].split()[:2] == ["choice", "denoiser"] and lines[-1].endswith("fitted.json")


WRONG = {
    "{": "Expecting property name",
    "[]": "a row must be a JSON object",
    '{"template": 1, "kind": "yesno", "answer": "yes"}': "template must be a text",
    '{"template": "[[answer]]", "kind": "yesno", "answer": "maybe"}': "answer must be one of the labels",
    '{"template": "[[answer]]", "kind": "yesno", "answer": "yes", "weight": 2}': "no field 'weight'",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_row_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=r"wrong\.jsonl:3: ") as error:
        load_items(path)
    assert WRONG[line] in str(error.value)
    path.write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        load_items(path)


def test_a_plot_has_a_panel_for_each_kind(tmp_path: Path) -> None:
    told: Reliability = reliability([case((0.9, 0.1)), case((0.3, 0.7))])
    path = plot_reliability({"yesno": {"raw": told}, "choice": {"raw": told, "fitted": told}}, tmp_path / "two.svg")
    assert path.read_text().startswith("<?xml")
    with pytest.raises(DataError, match="cannot be written"):
        plot_reliability({"yesno": {"raw": told}}, tmp_path / "what.xyz")


def test_the_dgemma_command_knows_it(folder: Path, tmp_path: Path) -> None:
    ran = dgemma("calibrate", str(folder), str(tmp_path / "missing.jsonl"))
    assert ran.returncode == 2 and ran.stderr.startswith(b"dgemma: error: ") and ran.stderr.count(b"\n") == 1
