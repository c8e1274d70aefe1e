"""The live canvas in a terminal: committed text above, the canvas in work below, in colours of its entropy.

Draws moments with rich, from a running model or from a trace alike. Knows no model and no arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.text import Text

from dgemma.events import Draft
from dgemma.trace import Moment
from dgemma.view import BLANK, HEAT_COLOURS, Cell, Progress, cells, numbers

MAX_WIDTH = 100
_FRAME_S = 1 / 30
_PROMPT_SHOWN = 400
_ASCII = str.maketrans({"━": "=", "─": "-", BLANK: ".", "■": "#", "↵": "/", "…": "~", "\ufffd": "?"})


def printable(text: str) -> str:
    """`text` for a terminal: control characters, which could command it, become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def console() -> Console:
    """Standard output as rich sees it; it draws what it is given, without looking for things to colour."""
    return Console(highlight=False, markup=False, emoji=False)


def plain(screen: Console, text: str) -> str:
    """`text` in characters that the terminal's encoding has."""
    return text if "utf" in screen.encoding.lower() else text.translate(_ASCII)


class LiveView:
    """A context manager: enter it, `show` every moment, leave it. What is committed stays on the screen.

    Left by an exception (ctrl-C), the canvas in work stays too, as it was last.
    """

    def __init__(
        self,
        console: Console,
        piece: Callable[[int], str],
        blank: Container[int],
        prompt: str = "",
        frame_s: float = _FRAME_S,
    ) -> None:
        """`prompt` is shown, subdued, before the text that continues it; `frame_s` is the least time of a frame."""
        self._console = console
        self._piece, self._blank = piece, blank
        if len(prompt) > _PROMPT_SHOWN:
            prompt = "…" + prompt[-_PROMPT_SHOWN:]
        self._tail = Text.assemble((printable(prompt), "dim"))
        self._height = 0
        self._drawn = 0.0
        self._frame_s = frame_s
        self._draft: Draft | None = None
        self._thinking = False
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    @property
    def _width(self) -> int:
        return max(min(self._console.width, MAX_WIDTH), 10)

    def __enter__(self) -> LiveView:
        self._live.start()
        self._redraw(Text(""))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        for line in self._lines(self._tail if kind is None else self._body()):
            self._console.print(line)

    def show(self, moment: Moment, progress: Progress) -> None:
        """Draw one moment. Drafts that come too fast to be seen are skipped, text never is."""
        if moment.thought:
            self._commit(moment.thought, "dim italic")
            self._thinking = True
        if moment.text:
            self._commit("\n" * self._thinking + moment.text)
            self._thinking = False
        self._draft = draft = progress.draft
        rare = draft.step == 1 if draft else not progress.autoregressive
        if rare or time.monotonic() - self._drawn >= self._frame_s:
            self._redraw(header(progress, self._width))
            self._drawn = time.monotonic()

    def _commit(self, text: str, style: str = "") -> None:
        """Move whole lines above the live region; the begun one stays in it, for the canvas to go on from."""
        self._tail.append(printable(text), style)
        spaces = len(self._tail.plain) - len(self._tail.plain.rstrip(" "))
        *whole, self._tail = self._lines(self._tail)
        # Wrapping drops spaces at a line's end, but the next word may still come into this line.
        self._tail.rstrip()
        self._tail.append(" " * spaces)
        for line in whole:
            self._console.print(line)
        self._height = 0

    def _redraw(self, head: Text) -> None:
        lines = self._lines(self._body())
        # The region never shrinks while a canvas is at work: the header must not jump.
        self._height = min(max(self._height, len(lines)), max(self._console.height - 2, 1))
        lines += [Text("")] * (self._height - len(lines))
        head.plain = plain(self._console, head.plain)
        self._live.update(Group(head, *lines[: self._height]), refresh=True)

    def _body(self) -> Text:
        """The begun line, and the canvas in work."""
        body = self._tail.copy()
        return body.append(canvas_text(cells(self._draft, self._piece, self._blank))) if self._draft else body

    def _lines(self, text: Text) -> list[Text]:
        text.plain = plain(self._console, text.plain)
        return list(text.wrap(self._console, self._width, tab_size=4)) or [Text("")]


def canvas_text(canvas: list[Cell]) -> Text:
    """The cells in a row: coloured by heat, what the answer drops is dim. Accepted ones are bold, and underlined
    until they are sure: a canvas that has settled is a calm text."""
    text = Text()
    for cell in canvas:
        word = cell.text.lstrip(" ")
        text.append(" " * (len(cell.text) - len(word)))  # a line under a space would tie words together
        text.append(word, cell_style(cell))
    return text


def cell_style(cell: Cell) -> Style:
    return Style(
        color=HEAT_COLOURS[cell.heat - 1] if cell.heat else None,
        bold=cell.strong or None,
        underline=cell.underlined or None,
        dim=cell.blank or None,
    )


def header(progress: Progress, width: int) -> Text:
    """A rule with the running numbers in it; where it is too narrow, the bar goes, then what stands last."""
    texts = [Text(text) for text in numbers(progress)]
    texts[0].stylize("bold")
    draft = progress.draft
    if draft is not None:
        bar = _bar(draft.step, draft.max_steps)
        if sum(text.cell_len + 3 for text in texts) + bar.cell_len + 4 <= width:
            texts[1].append(" ").append_text(bar)
    line = Text(no_wrap=True, overflow="crop").append("── ", "dim")
    for index, text in enumerate(texts):
        if index and line.cell_len + text.cell_len + 3 > width:
            break
        line.append(" · " if index else "", "dim").append_text(text)
    return line.append(" " + "─" * max(width - line.cell_len - 1, 0), "dim")


def _bar(step: int, steps: int, length: int = 12) -> Text:
    done = round(length * step / steps)
    return Text.assemble(("━" * done, HEAT_COLOURS[0]), ("━" * (length - done), "dim"))
