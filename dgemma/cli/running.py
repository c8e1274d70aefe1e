"""The common part of commands that run a request: load, show every moment, record it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

from dgemma.cli.output import Display
from dgemma.config import EngineConfig
from dgemma.errors import RequestError
from dgemma.settings import Settings
from dgemma.trace import Moment, TraceWriter
from dgemma.view import Progress

if TYPE_CHECKING:
    from dgemma.api import LLM


def load(settings: Settings, engine: EngineConfig | None = None) -> LLM:
    """The model of the settings. In a terminal something turns meanwhile."""
    with busy(f"loading {settings.model} …"):
        from dgemma.api import LLM

        _check_device(settings.device)
        return LLM.load(settings.model, **settings.loading, engine=settings.engine(engine or EngineConfig()))


def _check_device(device: str) -> None:
    import torch

    kind, _, index = device.partition(":")
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(kind, 1)
    if int(index or 0) >= count:
        raise RequestError(f"there is no device {device!r} that torch can use here; auto takes what there is")


def play(moments: Generator[Moment], display: Display, progress: Progress, writer: TraceWriter | None = None) -> None:
    """Show (and record) every moment and count it in `progress`, which holds what there is after a ctrl-C, too."""
    # Closing the moments closes the stream behind them, which aborts the request.
    with contextlib.closing(moments), display:
        for moment in moments:
            progress.observe(moment)
            if writer:
                writer.write(moment)
            display.show(moment, progress)


def busy(what: str) -> contextlib.AbstractContextManager[object]:
    if not sys.stdout.isatty():
        return contextlib.nullcontext()
    from dgemma.cli.terminal import console

    screen = console()
    return contextlib.nullcontext() if screen.is_dumb_terminal else screen.status(what)
