"""Structured logs: one JSON object a line. They hold no prompt and no answer unless the server was told to."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

_LOGGER = logging.getLogger("dgemma.server")


class _JsonLines(logging.Formatter):
    """What was logged, with the time and the level; what is no object of ours becomes its `message`."""

    def format(self, record: logging.LogRecord) -> str:
        data = record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), **data}
        return json.dumps(line, ensure_ascii=True, default=str)


def to_stderr() -> None:
    """Send the server's log, and warnings of the libraries below it, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in (("dgemma.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log(**fields: Any) -> None:
    """One line of information."""
    _LOGGER.info(fields)


def warn(**fields: Any) -> None:
    _LOGGER.warning(fields)


def log_fault(error: BaseException) -> None:
    """What nobody foresaw, with where it happened."""
    where = "".join(traceback.format_exception(error))
    _LOGGER.error({"event": "fault", "error": repr(error), "trace": where})
