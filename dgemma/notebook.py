"""The live canvas in a notebook: `watch(llm, prompt)`, and the HTML that it shows.

IPython is used where there is one and never needed: without it the text is printed as it becomes final.
Knows no widgets; the picture is one piece of HTML that is replaced as the canvas settles.
"""

from __future__ import annotations

import functools
import html
import time
from collections.abc import Callable, Container, Generator
from pathlib import Path
from typing import Any

from dgemma.api import LLM
from dgemma.events import Draft
from dgemma.trace import Moment, TraceReader
from dgemma.view import HEAT_COLOURS, Cell, Progress, cells, moments, numbers, paced

_FRAME_S = 1 / 15
_TEXT = "font-family:inherit;white-space:pre-wrap;line-height:1.5;max-width:60em"
_HEAD = "font-size:.8em;opacity:.65;font-variant-numeric:tabular-nums"


def watch(llm: LLM, prompt: str, **overrides: Any) -> str:
    """Complete `prompt` and show the canvas meanwhile; the text. `overrides` as in `LLM.generate`."""
    events = llm.stream(prompt, **overrides)
    steps = {"max_denoising_steps" if name == "steps" else name: value for name, value in overrides.items()}
    config = llm.generation.with_(**steps)
    blank = {*config.stop_tokens, config.pad_token}
    told = moments(events, llm.tokenizer, config.stop_tokens)
    return _show(told, functools.cache(llm.tokenizer.piece), blank, prompt)


def replay(path: str | Path, speed: float = 1.0) -> str:
    """Play a trace, `speed` times as fast as it was; the text."""
    reader = TraceReader.open(path)
    return _show(paced(reader, speed), reader.piece, frozenset(reader.header.blank), reader.header.prompt)


def frame(progress: Progress, piece: Callable[[int], str], blank: Container[int], prompt: str = "") -> str:
    """What is known so far as HTML: the numbers, the prompt, the final text, the canvas in work."""
    written = html.escape(progress.text)
    canvas = canvas_html(cells(progress.draft, piece, blank)) if progress.draft else ""
    given = f'<span style="opacity:.6">{html.escape(prompt)}</span>' if prompt else ""
    head = html.escape(" · ".join(numbers(progress)))
    return f'<div><div style="{_HEAD}">{head}</div><div style="{_TEXT}">{given}{written}{canvas}</div></div>'


def canvas_html(canvas: list[Cell]) -> str:
    """The cells in a row: coloured by heat, accepted ones bold and (until they are sure) underlined."""
    return "".join(_cell(cell) for cell in canvas)


def draft_html(draft: Draft, piece: Callable[[int], str], blank: Container[int] = ()) -> str:
    """One draft as HTML, for what shows drafts by itself."""
    return f'<div style="{_TEXT}">{canvas_html(cells(draft, piece, blank))}</div>'


def _cell(cell: Cell) -> str:
    style = [f"color:{HEAT_COLOURS[cell.heat - 1]}"] if cell.heat else []
    style += ["opacity:.5"] if cell.blank else []
    style += ["font-weight:600"] if cell.strong else []
    style += ["text-decoration:underline"] if cell.underlined else []
    word = cell.text.lstrip(" ")
    space = " " * (len(cell.text) - len(word))
    return f'{space}<span style="{";".join(style)}">{html.escape(word)}</span>' if style else html.escape(cell.text)


def _show(told: Generator[Moment], piece: Callable[[int], str], blank: Container[int], prompt: str) -> str:
    progress, update, drawn = Progress(), _screen(), 0.0
    for moment in told:
        progress.observe(moment)
        if update is None:
            print(moment.text, end="", flush=True)
        elif not isinstance(moment.event, Draft) or time.monotonic() - drawn >= _FRAME_S:
            update(frame(progress, piece, blank, prompt))
            drawn = time.monotonic()
    if update is None:
        print()
    return progress.text


def _screen() -> Callable[[str], None] | None:
    """What replaces the HTML shown by this cell; None where there is no notebook to show it in."""
    try:
        from IPython import get_ipython
        from IPython.display import HTML, display
    except ImportError:
        return None
    if get_ipython() is None:
        return None
    handle = display(HTML(""), display_id=True)
    return lambda text: handle.update(HTML(text))
