"""Sudoku: laws of boards, solver and generator, tokens, what the evaluation counts, and the shipped model's answers."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgemma.api import LLM
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.errors import DataError, RequestError
from dgemma.eval.sudoku import (
    AR,
    Attempt,
    Changes,
    Rate,
    attempt_of,
    attempts,
    check_model,
    count_changes,
    digits,
    retry,
    score,
    without_signal,
)
from dgemma.events import Committed, Draft, Finished
from dgemma.quant import make_format
from dgemma.train.sudoku.board import canonical, conflict, fault, parse, random_symmetry, show, solves
from dgemma.train.sudoku.examples import BLANK, prompt_ids
from dgemma.train.sudoku.puzzles import add_givens, minimal_puzzle
from dgemma.train.sudoku.solver import solutions

REPO = Path(__file__).resolve().parent.parent
SOLVED = parse("534678912672195348198342567859761423426853791713924856961537284287419635345286179")
EASY = parse("534678912672195348198342567859761423426853791713924856.........287419635345286179")


@pytest.fixture(scope="module")
def made() -> list[tuple[np.ndarray, np.ndarray]]:
    return [minimal_puzzle(np.random.default_rng((77, index))) for index in range(4)]


# -- boards ---------------------------------------------------------------------------------


def test_a_board_reads_as_it_is_shown() -> None:
    text = show(EASY)
    assert (parse(text) == EASY).all() and (parse(text.replace(".", "0")) == EASY).all()
    assert (parse("\n".join(text[at : at + 9] for at in range(0, 81, 9))) == EASY).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12", "81 cells, got 2"),
        ("." * 82, "got 82"),
        ("x" + "." * 80, "cell 1: .* got 'x'"),
        ("." * 80 + "٣", "cell 81"),
        ("5" + "." * 7 + "5" + "." * 72, "5 stands twice in row 1"),
        ("7" + "." * 71 + "7" + "." * 8, "7 stands twice in column 1"),
        ("3" + "." * 9 + "3" + "." * 70, "3 stands twice in box 1"),
        ("12345678." + "." * 17 + "9" + "." * 54, "no digit is left for row 1, column 9"),
        ("...12.789" + "3" + "." * 31 + "3" + "." * 39, "3 has no place left in row 1"),
    ],
)
def test_a_bad_puzzle_is_named(text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse(text)


def test_every_wrong_digit_is_a_fault() -> None:
    assert fault(SOLVED, EASY) is None and solves(SOLVED, EASY)
    for at in range(81):
        wrong = SOLVED.copy()
        wrong[at] = wrong[at] % 9 + 1
        assert fault(wrong, EASY) and conflict(wrong) and not solves(wrong, EASY)
        wrong[at] = 0
        assert "is empty" in str(fault(wrong, EASY)) and conflict(wrong) is None


def test_another_solution_that_changes_a_given_is_a_fault() -> None:
    rng = np.random.default_rng(0)
    cells, names = random_symmetry(rng)
    other = names[SOLVED[cells]]
    assert solves(other, np.zeros(81, dtype=np.int8)) and "became" in str(fault(other, EASY))


def test_symmetries_keep_rules_and_the_canonical_form(made: list[tuple[np.ndarray, np.ndarray]]) -> None:
    rng = np.random.default_rng(1)
    forms = set()
    for puzzle, solution in made:
        form = canonical(solution)
        forms.add(form)
        assert conflict(np.frombuffer(form, np.uint8)) is None  # the form is a solved grid itself, and its own form
        assert canonical(np.frombuffer(form, np.uint8)) == form
        for _ in range(5):
            cells, names = random_symmetry(rng)
            assert sorted(cells) == list(range(81)) and sorted(names[1:]) == list(range(1, 10)) and names[0] == 0
            assert solves(names[solution[cells]], names[puzzle[cells]])
            assert canonical(names[solution[cells]]) == form
    assert len(forms) == len(made)


def test_the_canonical_form_tells_nearly_equal_grids_apart() -> None:
    # Exchanging the two digits of a 2 x 2 rectangle gives a grid that no symmetry leads to (here).
    for rows in itertools.combinations(range(9), 2):
        for columns in itertools.combinations(range(9), 2):
            cells = [9 * row + column for row in rows for column in columns]
            a, b, c, d = SOLVED[cells]
            if (a, b) == (d, c) and (rows[0] // 3 == rows[1] // 3 or columns[0] // 3 == columns[1] // 3):
                other = SOLVED.copy()
                other[cells] = [b, a, d, c]
                assert conflict(other) is None and canonical(other) != canonical(SOLVED)
                return
    raise AssertionError("the grid has no such rectangle")


# -- solver and generator -------------------------------------------------------------------


def test_the_solver_equals_brute_force() -> None:
    rng = np.random.default_rng(2)
    for blanks in (3, 5, 6):
        for _ in range(4):
            board = SOLVED.copy()
            # A digit pair's cells and some more: several solutions do happen.
            cells = np.flatnonzero(np.isin(SOLVED, rng.choice(np.arange(1, 10), 2, replace=False)))
            at = rng.choice(cells, blanks, replace=False)
            board[at] = 0
            every = []
            for filling in itertools.product(sorted(set(SOLVED[at].tolist())), repeat=blanks):
                board_ = board.copy()
                board_[at] = filling
                every += [board_.tobytes()] if conflict(board_) is None else []
            found = [solution.tobytes() for solution in solutions(board, limit=100)]
            assert sorted(found) == sorted(every)
    assert solutions(parse("12345678." + "." * 72), limit=1)


def test_the_solver_finds_two_and_none() -> None:
    open_ = np.where(np.isin(SOLVED, (1, 2, 3)), 0, SOLVED)
    assert len(solutions(open_, limit=2)) == 2 and len(solutions(open_, limit=10**6)) % 6 == 0  # 3! renamings
    impossible = np.zeros(81, dtype=np.int8)
    impossible[[*range(8), 17]] = [*range(1, 9), 9]
    assert solutions(impossible) == []


def test_puzzles_are_unique_and_minimal(made: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for puzzle, solution in made:
        assert solves(solution, puzzle)
        (only,) = solutions(puzzle, limit=2)
        assert (only == solution).all()
        for at in np.flatnonzero(puzzle):
            fewer = puzzle.copy()
            fewer[at] = 0
            assert len(solutions(fewer, limit=2)) == 2


def test_the_generator_is_a_function_of_its_seed(made: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for index, (puzzle, solution) in enumerate(made[:2]):
        again = minimal_puzzle(np.random.default_rng((77, index)))
        assert (again[0] == puzzle).all() and (again[1] == solution).all()
    assert (made[0][1] != made[1][1]).any()


def test_added_givens_keep_the_puzzle(made: list[tuple[np.ndarray, np.ndarray]]) -> None:
    puzzle, solution = made[0]
    for givens in (10, 30, 46, 81, 99):
        easier = add_givens(puzzle, solution, givens, np.random.default_rng(3))
        assert (easier > 0).sum() == min(81, max(givens, (puzzle > 0).sum()))
        assert solves(solution, easier) and (easier[puzzle > 0] == puzzle[puzzle > 0]).all()


@pytest.fixture
def build_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The recipe's script as a module; other recipes have one of that name."""
    monkeypatch.syspath_prepend(str(REPO / "recipes" / "sudoku"))
    monkeypatch.delitem(sys.modules, "build_data", raising=False)
    yield importlib.import_module("build_data")
    sys.modules.pop("build_data")


def test_the_builder_resumes_and_drops_leaks(
    build_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_data, "PART", 2)
    args = ["--out", str(tmp_path), "--train", "5", "--held-out", "3", "--processes", "1"]
    build_data.main(args)
    train = build_data.Puzzles.load(tmp_path / "train.npz")
    assert (train.puzzles == build_data.make_part(0, 0, 5).puzzles).all() and len(train.puzzles) == 5
    held = {grade.name: build_data.Puzzles.load(tmp_path / f"{grade.name}.npz") for grade in build_data.GRADES}
    assert held["36-46"].givens.tolist() == [36, 37, 38] and held["26-32"].givens.tolist()[1:] == [27, 28]
    assert (held["minimal"].puzzles == build_data.make_part(1, 0, 3).puzzles).all()
    assert "0 (dropped)" in capsys.readouterr().out

    # What is there is taken, not made again: two training puzzles, planted in the held-out set as images.
    leak, rng = build_data.make_part(0, 3, 5), np.random.default_rng(4)
    images = [(names[p[cells]], names[s[cells]]) for p, s in zip(leak.puzzles, leak.solutions, strict=True)
              for cells, names in [random_symmetry(rng)]]  # fmt: skip
    build_data.Puzzles(*map(np.array, zip(*images, strict=True))).save(tmp_path / "parts" / "seed1-0-2.npz")
    build_data.main(args)
    assert "2 (dropped)" in capsys.readouterr().out
    found = {"minimal": build_data.Puzzles.load(tmp_path / "minimal.npz")}
    assert (found["minimal"].puzzles == held["minimal"].puzzles[2:]).all()
    hashes = tmp_path / "hashes.json"
    hashes.write_text(json.dumps(build_data.facts({"minimal": held["minimal"]})))
    build_data.check_hashes(build_data.facts(held), hashes)
    with pytest.raises(SystemExit, match="minimal"):
        build_data.check_hashes(build_data.facts(found), hashes)


# -- what is counted ------------------------------------------------------------------------


def test_changes_are_counted_by_what_was_right() -> None:
    solution = np.zeros(81, dtype=np.int8)
    solution[:4] = (1, 2, 3, 4)
    readings = np.zeros((5, 81), dtype=np.int8)
    readings[:, :4] = [(5, 2, 0, 8), (1, 4, 3, 9), (1, 2, 9, 4), (0, 7, 8, 9), (2, 7, 8, 4)]
    cells = np.array([0, 1, 2])  # the fourth cell, which changes every time, is a given
    # 5-1, (1), 1-2 over a gap | 2-4-2-7 | 3-9-8
    assert count_changes(readings, solution, cells) == Changes(wrong_to_right=2, right_to_wrong=4, wrong_to_wrong=1)
    assert count_changes(readings[:1], solution, cells) == Changes()


def told(step: int, predicted: np.ndarray, canvas: np.ndarray, accepted: np.ndarray) -> Draft:
    tokens, read = (tuple((BLANK + board.astype(int)).tolist()) for board in (predicted, canvas))
    return Draft(0, 0, step, 9, 1.0, tokens, read, tuple(accepted.tolist()), (0.0,) * 81)


def test_an_attempt_tells_drafted_from_accepted_digits() -> None:
    blank = int(np.flatnonzero(EASY == 0)[0])
    right, wrong = int(SOLVED[blank]), int(SOLVED[blank]) % 9 + 1

    def with_digit(digit: int) -> np.ndarray:
        board = SOLVED.copy()
        board[blank] = digit
        return board

    yes, but = np.ones(81, dtype=bool), np.arange(81) != blank
    events = [
        told(1, with_digit(wrong), with_digit(right), but),  # drafted; noise that happens to be right is not accepted
        told(2, with_digit(right), with_digit(wrong), yes),  # accepted: a draw may differ from the draft
        told(3, with_digit(wrong), with_digit(right), but),
        Committed(0, 0, tuple((BLANK + SOLVED.astype(int)).tolist()), 3, "stable"),
        Finished(0, "length", 82, 0, 81, (3,), 0),
    ]
    attempt = attempt_of(EASY, events)
    assert attempt.solved and (attempt.steps, attempt.stop) == (3, "stable")
    assert (attempt.corrections, attempt.withdrawn) == (2, 1)
    assert attempt.changes(SOLVED, attempt.predicted) == Changes(2, 1, 0)
    assert attempt.changes(SOLVED, attempt.written) == Changes(1, 0, 0)
    row = score([attempt], SOLVED[None])
    assert row["solved"]["hits"] == 1 and row["steps"]["mean"] == 3
    assert row["predicted"]["wrong_to_right"] == 2 and row["written"]["wrong_to_right"] == 1


def test_tokens_that_are_no_digits_solve_nothing() -> None:
    assert digits([0, 1, 2, 3, 4, 12, 13])[:8].tolist() == [0, 0, 0, 0, 1, 9, 0, 0]
    attempt = attempt_of(SOLVED, [Committed(0, 0, (BLANK + 5, 1), 1, "cap")])
    assert not attempt.solved and attempt.answer[:2].tolist() == [5, 0]


def test_intervals_are_wilsons() -> None:
    assert Rate(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998
    assert Rate(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert Rate(0, 0).interval == (0.0, 1.0)


# -- the shipped model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("sudoku")


@pytest.fixture(scope="module")
def gentle(made: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    return [add_givens(*pair, 46, np.random.default_rng(5)) for pair in made]


def test_the_tokens_of_a_puzzle_are_those_of_training(llm: LLM, made: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for puzzle, solution in made:
        text = show(puzzle)
        assert llm.encode_prompt(text) == llm.encode_prompt(text.replace(".", "0")) == prompt_ids(puzzle)
        assert llm.tokenizer.decode([BLANK + int(digit) for digit in solution]) == show(solution)
    assert llm.tokenizer.encode("1 2\n.\t0") == [BLANK + 1, BLANK + 2, BLANK, BLANK]


def test_it_solves_and_a_batch_equals_its_puzzles(llm: LLM, gentle: list[np.ndarray]) -> None:
    together = list(attempts(llm, gentle, [0] * len(gentle)))
    assert [attempt.solved for attempt in together] == [True] * len(gentle)
    (alone,) = attempts(llm, gentle[2:3], [0])
    assert alone.steps == together[2].steps
    assert all((a == b).all() for a, b in zip(alone.predicted, together[2].predicted, strict=True))
    assert llm.generate(show(gentle[2]), seed=0).text == show(alone.answer)  # what any caller gets


def test_self_conditioning_tells_the_second_step_about_the_first(
    llm: LLM, made: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    settings = {"max_denoising_steps": 3}
    (told_,), (untold,) = (list(attempts(one, [made[0][0]], [0], **settings)) for one in (llm, without_signal(llm)))
    same = [bool((a == b).all()) for a, b in zip(told_.predicted, untold.predicted, strict=True)]
    assert same[0] and not all(same)


def test_the_signal_can_be_cut_off_a_quantised_model(tmp_path: Path, made: list[tuple[np.ndarray, np.ndarray]]) -> None:
    quantize_checkpoint("sudoku", tmp_path, make_format("int8wo"))
    llm = LLM.load(tmp_path)
    untold = without_signal(llm)
    assert untold.engine.runner.dtype is llm.dtype
    both = [next(attempts(one, [made[0][0]], [0], max_denoising_steps=3)).predicted for one in (llm, untold)]
    same = [bool((a == b).all()) for a, b in zip(*both, strict=True)]
    assert same[0] and not all(same)


def test_retrying_goes_on_until_the_rules_are_kept(llm: LLM, made: list[tuple[np.ndarray, np.ndarray]]) -> None:
    hard = made[0][0]
    done = Attempt(EASY, SOLVED, 1, "stable", (SOLVED,), (SOLVED,))
    (open_,) = attempts(llm, [hard], [0], max_denoising_steps=1)
    assert not open_.solved  # one step is not enough for any minimal puzzle
    calls: list[int] = []
    kept, tried = retry(llm, [done, open_], [0, 0], 3, lambda: calls.append(1), max_denoising_steps=1)
    assert kept == [done] and len(tried) == 3 and len(calls) == 2
    assert len({attempt.answer.tobytes() for attempt in tried}) == 3  # other noise each time


def test_autoregression_has_no_steps(llm: LLM, gentle: list[np.ndarray]) -> None:
    (attempt,) = attempts(llm, gentle[:1], [0], **AR)
    assert attempt.steps == 0 and score([attempt], gentle[0][None]).keys() == {"solved"}


def test_another_model_is_refused(llm: LLM) -> None:
    check_model(llm)
    with pytest.raises(RequestError, match="'default' was not made for Sudoku"):
        check_model(LLM.load("default"))
