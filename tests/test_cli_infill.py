"""`dgemma infill` and `dgemma edit`: what they print into pipes and terminals, and their faults in one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import text_kit
from text_kit import Terminal

from dgemma.api import LLM
from dgemma.cli import edit, infill
from dgemma.cli.arguments import Parser
from dgemma.errors import RequestError

TEXT = "Once upon a time there was a [[... 1-2 tokens ...]] named Anna."
STORY = "Once upon a time there was a little girl named Anna.\n"
DRIVER = """
import sys
from dgemma.cli import edit, infill
from dgemma.cli.arguments import Parser
parser = Parser()
commands = parser.add_subparsers()
for command in (edit, infill):
    own = commands.add_parser(command.NAME)
    command.add_arguments(own)
    own.set_defaults(run=command.run)
arguments = parser.parse_args(sys.argv[1:])
sys.exit(arguments.run(arguments))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(text_kit.save_model(tmp_path_factory.mktemp("models") / "tiny", template=None, max_positions=512))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("DGEMMA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


def run(command: object, *arguments: str) -> int:
    parser = Parser()
    command.add_arguments(parser)  # type: ignore[attr-defined]
    return int(command.run(parser.parse_args(arguments)))  # type: ignore[attr-defined]


def test_infill_into_a_pipe_is_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(infill, TEXT, "--seed", "5") == 0
    said = capsys.readouterr()
    assert said.out == LLM.load("default").infill(TEXT, seed=5).text + "\n" and said.err == ""


def test_infill_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGEMMA_MAX_NEW_TOKENS", "7")  # meant for answers
    assert run(infill, TEXT, "--json", "--candidates", "2", "--seed", "5") == 0
    told, alone = json.loads(capsys.readouterr().out), LLM.load("default").infill(TEXT, candidates=2, seed=5)
    assert told["text"] == alone.text and told["fills"] == list(alone.fills)
    assert [one["fills"] for one in told["candidates"]] == [list(one.fills) for one in alone.candidates]
    assert "events" not in told["candidates"][0]


def test_edit_of_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    begin = STORY.index("little")
    assert run(edit, str(file), "--span", f"{begin}:{begin + 6}", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (change,) = told["changes"]
    assert change["old"] == "little" and told["text"] == STORY.replace("little", change["new"])
    assert run(edit, str(file), "--doubt", "0.1", "--by", "encoder") == 0
    assert capsys.readouterr().out.endswith(".\n") and file.read_text() == STORY


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (infill, ["no hole"], "the text has no hole"),
        (infill, ["a [[...]]", "--max-new-tokens", "3"], "max_new_tokens has no meaning"),
        (infill, ["a [[...]] b", "--candidates", "0"], "candidates must be"),
        (edit, ["{file}", "--span", "x"], "a span is A:B"),
        (edit, ["{file}", "--span", "5:5000"], "is not in the text"),
        (edit, ["{file}"], "say what to edit"),
        (edit, ["{file}", "--doubt", "3"], "at most 1"),
        (edit, ["{file}", "--instruction", "be glad"], "has no chat template"),
        (edit, ["/no/such/file", "--doubt", "0.1"], "/no/such/file cannot be read: No such file"),
        (edit, ["{bytes}", "--doubt", "0.1"], "is not UTF-8: byte 0xff at 1"),
    ],
)
def test_faults(command: object, arguments: list[str], words: str, model: str, tmp_path: Path) -> None:
    file, data = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text(STORY)
    data.write_bytes(b"a\xff")
    given = [argument.format(file=file, bytes=data) for argument in arguments]
    with pytest.raises(RequestError, match=words):
        run(command, *given, "--model", model)


@pytest.mark.parametrize("columns", [100, 24])
def test_the_canvas_is_shown_in_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_kit, "command", lambda *arguments: [sys.executable, "-c", DRIVER, *arguments])
    with Terminal("infill", TEXT, "--seed", "5", columns=columns) as terminal:
        assert terminal.wait() == 0 and terminal.restored
        shown = " ".join(terminal.text.split())
    filled = LLM.load("default").infill(TEXT, seed=5)
    assert filled.text in shown and f"best of {len(filled.candidates)}" in shown, shown
    assert "step" in shown and "seed 5" in shown
