"""Where a trace comes from: a file, a pipe, the URL of a server's trace, or the drafts in a saved event stream."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator

from dgemma.errors import DataError
from dgemma.trace import TraceReader, as_text

_TIMEOUT_S = 60.0


def open_trace(source: str, choice: int = 0) -> TraceReader:
    """The trace of `source`. `choice` picks an answer out of a stream; a trace has one."""
    if source == "-":
        lines: Iterator[bytes] = iter(sys.stdin.buffer) if sys.stdin is not None else iter(())
        name = "standard input"
    elif source.startswith(("http://", "https://")):
        lines, name = _fetched(source), source
    else:
        lines, name = _file(source), source
    first = next((line for line in lines if line.strip()), b"")
    whole = itertools.chain([first], lines)
    # A comment line (`: ping`) may come first in a stream, but never in JSON.
    return TraceReader(_drafts(whole, choice, name) if first.startswith((b"data:", b"event:", b":")) else whole, name)


def _file(path: str) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"the trace {path!r} cannot be read: {error.strerror}") from None


def _fetched(url: str) -> Iterator[bytes]:
    """The lines of an answer. The first of `DGEMMA_API_KEYS` is the key."""
    key = os.environ.get("DGEMMA_API_KEYS", "").partition(",")[0].strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as answer:
            yield from answer
    except urllib.error.HTTPError as error:
        raise DataError(f"{url} answers {error.code}: {_message(error)}") from None
    except urllib.error.URLError as error:
        raise DataError(f"{url} cannot be read: {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{url} cannot be read: {error}") from None


def _message(answer: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(answer.read(10_000))["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return answer.reason


def _drafts(lines: Iterable[bytes], choice: int, name: str) -> Iterator[str]:
    """The trace lines in an event stream of a server that was asked for its canvas."""
    found = False
    for line in lines:
        field, _, data = line.partition(b":")
        if field.strip() != b"data" or data.strip() in (b"", b"[DONE]"):
            continue
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: an event is no JSON: {error}") from None
        if isinstance(chunk, dict) and isinstance(chunk.get("error"), dict):
            raise DataError(f"{name}: the server broke off: {chunk['error'].get('message')}")
        extra = chunk.get("dgemma") if isinstance(chunk, dict) else None
        if isinstance(extra, dict) and "line" in extra and extra.get("index") == choice:
            found = True
            yield as_text(extra["line"])
    if not found:
        raise DataError(
            f"{name}: no drafts of answer {choice} in this stream (stream_options.include_canvas gives them)"
        )
