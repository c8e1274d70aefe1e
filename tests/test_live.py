"""What is shown of a running request: the view, the terminal's picture of it, and the notebook's."""

from __future__ import annotations

import io
import math
import re
import sys
import types
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import text_kit
from rich.console import Console
from rich.style import Style
from rich.text import Text

from dgemma import notebook
from dgemma.cli.output import summary
from dgemma.cli.terminal import LiveView, canvas_text, header, plain, printable
from dgemma.events import Committed, Draft, Event, Finished
from dgemma.text.tokenizer import Tokenizer, special_names
from dgemma.trace import Header, Moment, TraceWriter, create
from dgemma.view import BLANK, HEAT_COLOURS, HEAT_NATS, Progress, cells, heat, moments, paced

WORDS = ["<pad>", "<eos>", " once", " upon", " a", " time", "↵", "<b>&", "\u001b[31m"]


def piece(token: int) -> str:
    return WORDS[token]


def draft(tokens: Sequence[int], entropy: Sequence[float], accepted: Sequence[bool], step: int = 2) -> Draft:
    return Draft(1, 0, step, 48, 0.75, tuple(tokens), tuple(tokens), tuple(accepted), tuple(entropy))


DRAFT = draft([2, 3, 4, 5, 1, 0], [0.0, 0.5, 9.0, 0.001, 0.2, 0.0], [True, True, False, False, True, True])
EVENTS: list[Event] = [
    DRAFT,
    Committed(1, 0, (2, 3, 4, 5), 2, "stable"),
    draft([2, 1, 0, 0, 0, 0], [0.0] * 6, [True] * 6, 1),
    Committed(1, 1, (2, 1), 1, "cap"),
    Finished(1, "stop", 3, 0, 6, (2, 1), 1),
]


def story() -> Generator[Moment]:
    for place, event in enumerate(EVENTS):
        text = "".join(WORDS[t] for t in event.tokens if t > 1) if isinstance(event, Committed) else ""
        yield Moment(place * 0.5, event, text)


# -- the view -------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", HEAT_COLOURS)
def test_colours_can_be_read_on_black_and_on_white(colour: str) -> None:
    bright = luminance(colour) + 0.05
    assert bright / 0.05 >= 4.4 and 1.05 / bright >= 4.4


def test_heat_rises_with_entropy() -> None:
    assert heat(0.0) == heat(0.0199) == 0
    assert [heat(bound) for bound in HEAT_NATS] == list(range(1, len(HEAT_COLOURS) + 1))
    assert heat(math.log(262_144)) == heat(math.nan) == len(HEAT_COLOURS)


def test_cells() -> None:
    row = cells(DRAFT, piece, {0, 1})
    assert [cell.text for cell in row] == [" once", " upon", " a", " time", BLANK, BLANK]
    assert [cell.heat for cell in row] == [0, 3, 7, 0, 2, 0]
    assert [cell.strong for cell in row] == [True, True, False, False, False, False]
    assert [cell.underlined for cell in row] == [False, True, False, False, False, False]


def test_progress_counts() -> None:
    progress = Progress()
    counts = []
    for moment in story():
        progress.observe(moment)
        counts.append((progress.settled, progress.forwards))
    # In work: accepted positions, and steps. Then committed tokens, steps and the first canvas's encode pass.
    assert counts == [(4, 2), (4, 2), (10, 4), (6, 4), (6, 4)]
    assert progress.steps == [2, 1] and progress.stops == ["stable", "cap"]
    assert progress.text == " once upon a time once" and progress.tokens == [2, 3, 4, 5, 2, 1]
    assert progress.tokens_per_second == 6 / 2.0 and progress.tokens_per_forward == 6 / 4
    assert summary(progress, 7) == "end of text · 6 tokens in 2.0 s · 3 tok/s · 2+1 steps · 1.5 tok/forward · seed 7"


def test_progress_of_an_autoregressive_request() -> None:
    progress = Progress()
    for place in range(4):
        progress.observe(Moment(place + 1.0, Committed(1, place, (9,), 0, "ar")))
    progress.observe(Moment(5.0, Finished(1, "length", 3, 0, 4, (), 3)))
    assert progress.forwards == 4 and progress.tokens_per_forward == 1.0 and progress.steps == []


def test_moments_have_text_without_the_end_token() -> None:
    tokenizer = Tokenizer(text_kit.byte_level(), special_names(text_kit.config_json()))
    ids = tokenizer.encode("<|channel>thought\nhm<channel|>Schön 🙂")
    cut = len(ids) - 2
    events: list[Event] = [
        Committed(1, 0, tuple(ids[:cut]), 1, "cap"),
        Committed(1, 1, (*ids[cut:], 6), 1, "cap"),
        Finished(1, "stop", 1, 0, len(ids) + 1, (1, 1), 1),
    ]
    split = list(moments(events, tokenizer, {6}, split_thoughts=True))
    assert "".join(moment.text for moment in split) == "Schön 🙂"
    assert "".join(moment.thought for moment in split) == "hm"
    assert not split[0].text.endswith("\ufffd")
    whole = "".join(moment.text for moment in moments(events, tokenizer, {6}))
    assert whole == tokenizer.decode(ids) and whole.endswith("Schön 🙂")


def test_paced_waits_as_long_as_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("dgemma.view.time", types.SimpleNamespace(monotonic=lambda: 0.0, sleep=slept.append))
    told = [Moment(0.0, EVENTS[0]), Moment(1.0, EVENTS[1]), Moment(100.0, EVENTS[2])]
    assert list(paced(told, 2.0)) == told
    assert slept == [0.0, 0.5, 3.5]


# -- the terminal ---------------------------------------------------------------------------


def screen(width: int = 80, height: int = 24, **options: Any) -> Console:
    fixed: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "legacy_windows": False}
    return Console(file=io.StringIO(), width=width, height=height, **(fixed | options))


def shown(console: Console) -> str:
    """What was written, without the escape sequences."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).replace("\r", "")


def run(console: Console, story: Sequence[Moment], prompt: str = "", error: BaseException | None = None) -> Progress:
    progress = Progress()
    with LiveView(console, piece, {0, 1}, prompt) as view:
        for moment in story:
            progress.observe(moment)
            view.show(moment, progress)
        if error:
            raise error
    return progress


def test_canvas_colours() -> None:
    text = canvas_text(cells(DRAFT, piece, {0, 1}))
    assert text.plain == f" once upon a time{BLANK}{BLANK}"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles["once"] == Style(bold=True)
    assert styles["upon"] == Style(bold=True, underline=True, color=HEAT_COLOURS[2])
    assert styles["a"] == Style(color=HEAT_COLOURS[-1])
    assert all(isinstance(style, Style) and style.dim for word, style in styles.items() if word == BLANK)


@pytest.mark.parametrize("width", [10, 20, 40, 60, 80, 120])
def test_the_header_fits(width: int) -> None:
    progress = Progress()
    progress.observe(Moment(0.5, DRAFT))
    line = header(progress, width)
    assert line.cell_len <= max(width, len("── canvas 1 ")) and line.plain.startswith("── canvas 1")
    if width >= 80:
        told = ("step  2/48", "T 0.75", "entropy 1.617", "8 tok/s", "2.0 tok/forward")
        assert all(part in line.plain for part in told)
    assert ("━" in line.plain) == (width > 90)


def test_committed_text_stays_as_a_paragraph() -> None:
    console = screen()
    run(console, list(story()), "Story:")
    assert shown(console).rstrip().endswith("Story: once upon a time once")
    assert isinstance(console.file, io.StringIO) and console.file.getvalue().count("\x1b[?25h") == 1  # the cursor


def test_long_text_is_wrapped_at_words_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    console, lines = screen(30), list[str]()
    draw = console.print
    monkeypatch.setattr(console, "print", lambda x: lines.append(str(x)) if isinstance(x, Text) else draw(x))
    words = "the quick brown fox jumps over the lazy dog " * 12
    story = [Moment(0.1 * n, Committed(1, n, (2,), 1, "cap"), words[n * 40 : n * 40 + 40]) for n in range(14)]
    run(console, story)
    assert max(len(line.rstrip()) for line in lines) <= 30
    assert " ".join(line.strip() for line in lines) == words.strip()


def test_an_interrupt_leaves_the_canvas() -> None:
    console = screen()
    with pytest.raises(KeyboardInterrupt):
        run(console, [Moment(0.0, DRAFT)], "Story:", KeyboardInterrupt())
    assert shown(console).rstrip().endswith(f"Story: once upon a time{BLANK}{BLANK}")


@pytest.mark.parametrize(("width", "height"), [(1, 1), (8, 3), (20, 5), (200, 50)])
def test_any_size_of_terminal(width: int, height: int) -> None:
    wide = draft([5] * 300, [1.0] * 300, [False] * 300)
    run(screen(width, height), [Moment(0.1, wide), *story()], "x" * 1000)


def test_a_thought_stands_on_lines_of_its_own() -> None:
    console = screen()
    committed = [Committed(1, place, (2,), 1, "cap") for place in range(3)]
    run(
        console,
        [
            Moment(0.1, committed[0], "", "hm, "),
            Moment(0.2, committed[1], "Blue", "I see"),
            Moment(0.3, committed[2], "."),
        ],
    )
    assert "hm, I see\n" in shown(console) and shown(console).rstrip().endswith("\nBlue.")


def test_control_characters_do_not_reach_the_terminal() -> None:
    console = screen(color_system=None)
    run(console, [Moment(0.1, Committed(1, 0, (8,), 1, "cap"), "a\x1b[31mb\x07c\u202ed")], "p\x1b]0;t\x07")
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[31m" not in console.file.getvalue() and "\x07" not in console.file.getvalue()
    assert "a\ufffd[31mb\ufffdc\ufffdd" in shown(console)
    assert printable("a\n\tb\u0000") == "a\n\tb\ufffd"


def test_a_terminal_without_unicode() -> None:
    console = screen()
    console._color_system = None
    console.file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    run(console, list(story()), "Story:")
    assert plain(console, "a · b … ━") == "a . b ~ ="


# -- the notebook ---------------------------------------------------------------------------


def test_draft_html() -> None:
    got = notebook.draft_html(draft([2, 7, 4], [0.0, 0.5, 9.0], [True, True, False]), piece, {0, 1})
    assert ' <span style="font-weight:600">once</span>' in got
    marked = f"color:{HEAT_COLOURS[2]};font-weight:600;text-decoration:underline"
    assert f'<span style="{marked}">&lt;b&gt;&amp;</span>' in got
    assert f' <span style="color:{HEAT_COLOURS[-1]}">a</span>' in got
    assert "<b>" not in got


def test_frame_html_is_well_formed_and_escaped() -> None:
    import xml.etree.ElementTree as ElementTree

    progress = Progress()
    progress.observe(Moment(0.5, Committed(1, 0, (2,), 3, "cap"), "<i>final</i>"))
    progress.observe(Moment(1.0, DRAFT))
    root = ElementTree.fromstring(notebook.frame(progress, piece, {0, 1}, "<prompt>"))
    assert "".join(root.itertext()).endswith(f"<prompt><i>final</i> once upon a time{BLANK}{BLANK}")
    assert "canvas 1 · step  2/48 · T 0.75" in "".join(root.itertext())


def record(path: Path) -> Path:
    told = Header(model="m", seed=0, mode="diffusion", prompt="Story:", blank=(0, 1))
    with create(path) as file:
        writer = TraceWriter(file, told, piece)
        for moment in story():
            writer.write(moment)
    return path


def test_without_a_notebook_the_text_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert notebook.replay(record(tmp_path / "t.jsonl"), speed=1000) == " once upon a time once"
    assert capsys.readouterr().out == " once upon a time once\n"


def test_in_a_notebook_one_picture_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures: list[str] = []

    class Handle:
        def update(self, html: str) -> None:
            pictures.append(html)

    fake = types.ModuleType("IPython")
    fake.get_ipython = object  # type: ignore[attr-defined]
    shows = types.ModuleType("IPython.display")
    shows.HTML = str  # type: ignore[attr-defined]
    shows.display = lambda html, display_id: Handle()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", fake)
    monkeypatch.setitem(sys.modules, "IPython.display", shows)
    notebook.replay(record(tmp_path / "t.jsonl"), speed=1000)
    assert "canvas 1" in pictures[0] and " once upon a time once" in pictures[-1] and "canvas" not in pictures[-1]
