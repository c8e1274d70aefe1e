"""`dgemma sudoku` on the shipped model: answers, files, faults, the live board; and that no solver takes part."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import text_kit
from text_kit import Terminal, dgemma

from dgemma.cli import main
from dgemma.cli.sudoku_board import cell_styles, final_styles, grid
from dgemma.cli.terminal import console
from dgemma.events import Draft
from dgemma.train.sudoku import puzzles, solver
from dgemma.train.sudoku.board import parse, show, solves

EASY = "53..7..1.67219.3481983425.7859.614234268.37.1713.248569.15.728.2874.9.3534528617."
OTHER = "53..7..1.67219.3481983425.7859.614234268.37.1713.248569.15.728.2874.9.353452861.."


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("DGEMMA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """In this process, for speed: status and outputs."""
    status = main(["sudoku", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_json_without_a_solver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a solver was asked")

    for module in (solver, puzzles):
        monkeypatch.setattr(module, "solutions", refuse)
    status, out, err = run(capsys, EASY.replace(".", "0"), "--json")
    row = json.loads(out)
    assert (status, err) == (0, "") and list(row) == ["puzzle", "solution", "solved", "steps", "corrections"]
    assert row["puzzle"] == EASY and row["solved"] is True and row["steps"] >= 1
    assert solves(parse(row["solution"]), parse(EASY))


def test_a_pipe_gets_the_digits_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, EASY, "--seed", "3")
    assert (status, err) == (0, "") and solves(parse(out), parse(EASY)) and len(out) == 82


def test_what_is_not_solved_is_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    # Nine givens have many solutions; one step cannot agree on any of them.
    open_ = "123456789" + "." * 72
    status, out, _ = run(capsys, open_, "--steps", "1")
    assert status == 0 and " # not solved: " in out
    row = json.loads(run(capsys, open_, "--steps", "1", "--json", "--attempts", "3")[1])
    assert row["solved"] is False and (row["steps"], row["attempts"]) == (3, 3)
    row = json.loads(run(capsys, EASY, "--json", "--attempts", "3")[1])
    assert row["solved"] is True and row["attempts"] == 1


def test_a_file_goes_on_behind_bad_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "puzzles.txt"
    path.write_text(f"# two good ones\n{EASY}\n12\n\n{'55' + '.' * 79}\n{OTHER}  # with a remark\n{'x' * 81}\n")
    status, out, err = run(capsys, "--file", str(path), "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and [row["puzzle"] for row in rows] == [EASY, OTHER]
    assert rows[0] == json.loads(run(capsys, EASY, "--json")[1])  # each as if it were alone
    bad = [line.removeprefix(f"dgemma: error: {path}, ") for line in err.splitlines()]
    assert [line.partition(":")[0] for line in bad[:3]] == ["line 3", "line 5", "line 7"]
    assert "got 2 characters" in bad[0] and "5 stands twice in row 1" in bad[1] and "got 'x'" in bad[2]
    assert bad[3:] == ["2 of 2 puzzles solved"]
    path.write_text(f"{EASY}\n{OTHER}\n")
    status, out, err = run(capsys, "--file", str(path), "--quiet")
    assert (status, err) == (0, "") and [line for line in out.splitlines()] == [row["solution"] for row in rows]


EARLY: dict[str, tuple[list[str], bytes, str]] = {
    "too short": (["12"], b"", "a puzzle has 81 cells, got 2 characters: '12'"),
    "too long": (["." * 82], b"", "got 82 characters"),
    "a letter": (["a" + "." * 80], b"", "cell 1: a cell is 1-9, or . or 0 for a blank; got 'a'"),
    "contradictory": (["." * 79 + "88"], b"", "the puzzle contradicts itself: 8 stands twice in row 9"),
    "no place": (["12345678." + "." * 17 + "9" + "." * 54], b"", "no digit is left for row 1, column 9"),
    "nothing": ([], b"", "the puzzle is empty"),
    "a bad pipe": (["-"], b"1234\n", "got 4 characters"),
    "both": (["." * 81, "--file", "x"], b"", "give a PUZZLE or --file, not both"),
    "no file": (["--file", "/no/such"], b"", "the file '/no/such' cannot be read: No such file"),
    "a folder": (["--file", "/"], b"", "the file '/' cannot be read: Is a directory"),
    "no puzzles": (["--file", "-"], b"# none\n\n", "there is no puzzle in standard input"),
    "bytes": (["--file", "-"], b"\xff\xfe\n", "standard input, line 1: a puzzle has 81 cells"),
    "no attempts": (["." * 81, "--attempts", "0"], b"", "--attempts must be at least 1, got 0"),
    "no steps": (["." * 81, "--steps", "0"], b"", "max_denoising_steps must be a whole number of at least 1"),
    "no seed": (["." * 81, "--seed", "x"], b"", "seed must be a whole number, got 'x'"),
}


@pytest.mark.parametrize("case", EARLY)
def test_told_at_once(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments, stdin, wanted = EARLY[case]
    monkeypatch.setattr("dgemma.cli.sudoku.load", lambda settings: pytest.fail("the model was loaded"))
    (tmp_path / "in").write_bytes(stdin)
    with (tmp_path / "in").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and wanted in err
    assert err.startswith("dgemma: error: ") and err.count("\n") == 1


def test_faults_need_no_torch() -> None:
    broken = {"PYTHONPATH": f"{Path(__file__).parent}/no_torch:{text_kit.REPO}"}
    done = dgemma("sudoku", "12", env=broken)
    assert done.returncode == 2 and done.stderr.startswith(b"dgemma: error: a puzzle has 81 cells"), done.stderr


def test_a_model_for_text_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = run(capsys, EASY, "--model", "default")
    assert (status, out) == (2, "") and "the model 'default' was not made for Sudoku" in err
    monkeypatch.setenv("DGEMMA_MODEL", "default")  # chosen for text
    assert run(capsys, EASY)[0] == 0


def test_live_in_a_terminal() -> None:
    with Terminal("sudoku", EASY) as terminal:
        assert terminal.wait() == 0 and terminal.restored
        assert "step 1/" in terminal.text and "cells accepted" in terminal.text
        last = terminal.text[terminal.text.rfind("┌") :]
        assert last.splitlines()[-1].startswith("solved, ") and " steps, " in last
        assert solves(parse("".join(c for line in last.splitlines()[:13] for c in line if c.isdigit())), parse(EASY))


def test_a_terminal_without_unicode() -> None:
    with Terminal("sudoku", EASY, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") as terminal:
        assert terminal.wait() == 0
        assert terminal.output.isascii() and "+-------+-------+-------+" in terminal.text


# -- what is drawn --------------------------------------------------------------------------


def test_the_grid_shows_every_cell() -> None:
    board = parse(EASY)
    lines = grid(console(), board, [final_styles(board, board)[0]] * 81).plain.splitlines()
    assert len(lines) == 13 and len({len(line) for line in lines}) == 1
    cells = "".join(c for line in lines for c in line if c.isdigit() or c in ".·").replace("·", ".")
    assert cells == show(board)


def test_styles_say_given_sure_changed_and_wrong() -> None:
    puzzle = parse("5" + "." * 80)
    before = np.full(81, 1, dtype=np.int8)
    now = before.copy()
    now[:2], now[4] = (5, 2), 3
    entropy, accepted = [0.0] * 81, [True] * 81
    entropy[2], accepted[3] = 2.0, False
    draft = Draft(0, 0, 1, 9, 1.0, (0,) * 81, (0,) * 81, tuple(accepted), tuple(entropy))
    styles = cell_styles(puzzle, draft, now, before)
    assert styles[0].bold and not styles[0].reverse  # a given never flashes
    assert styles[1].reverse and styles[4].reverse and not styles[5].reverse
    assert styles[2].color and not styles[5].color
    assert styles[3].dim and not styles[2].dim

    solved = parse("534678912672195348198342567859761423426853791713924856961537284287419635345286179")
    assert not any(style.reverse for style in final_styles(parse(EASY), solved))
    wrong = solved.copy()
    wrong[[2, 3]] = wrong[[3, 2]]  # 4 and 6 change places: columns and boxes break, the row does not
    marked = [at for at, style in enumerate(final_styles(parse(EASY), wrong)) if style.reverse]
    assert {2, 3} <= set(marked) and len(marked) == 6
