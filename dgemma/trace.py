"""A recorded request: one JSON object a line, to be replayed without the model (fields: `docs/trace.md`).

The first line is a header, each further one a `Moment`: an event, when it happened, and the text that became
final with it. Drafts store what changed since the canvas's previous draft. Knows events, no tokenizer.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from dgemma.config import GenerationConfig, is_whole
from dgemma.errors import DataError, RequestError
from dgemma.events import Committed, Draft, Event, Finished, Scored

FORMAT = "dgemma-trace"
VERSION = 1
ENTROPY_DECIMALS = 4
_NATS = ("entropy", "top_logprob")
CONFIDENCE = (*_NATS, "revisions", "last_change")
"""The fields of a committed line with an entry a token: all of them, or none."""


@dataclass(frozen=True)
class Moment:
    """An event, the seconds since the request began, and what it made final: answer and thought, as text."""

    seconds: float
    event: Event
    text: str = ""
    thought: str = ""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was asked of which model. `settings` are generation parameters; `blank` ids end or fill it."""

    model: str
    seed: int
    mode: str
    prompt: str
    prompt_tokens: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    blank: tuple[int, ...] = ()

    @staticmethod
    def of(model: str, config: GenerationConfig, prompt: str, prompt_tokens: tuple[int, ...]) -> Header:
        """The header of a request with that configuration."""
        return Header(
            model=model,
            seed=config.seed,
            mode=config.mode,
            prompt=prompt,
            prompt_tokens=prompt_tokens,
            settings=asdict(config),
            blank=config.blank_tokens,
        )


def create(path: str | Path) -> TextIO:
    """Open a new trace file for writing; a `RequestError` that says why it cannot be."""
    try:
        return open(path, "w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise RequestError(f"the trace {str(path)!r} cannot be written: {error.strerror}") from None


class TraceEncoder:
    """Makes the lines of one trace, as objects. What a draft's line leaves out, the lines before it have told."""

    def __init__(self, header: Header, piece: Callable[[int], str]) -> None:
        """`piece` gives the printable text of a token id."""
        self._piece = piece
        self._known: set[int] = set()
        self._last: dict[tuple[int, int], Draft] = {}
        entries = {name: getattr(header, name) for name in Header.__dataclass_fields__}
        self.header: dict[str, Any] = {"format": FORMAT, "version": VERSION, **entries}
        """The first line."""

    def line(self, moment: Moment) -> dict[str, Any]:
        """The next line."""
        event = moment.event
        line: dict[str, Any] = {"type": type(event).__name__.lower(), "seconds": round(moment.seconds, 6)}
        if isinstance(event, Draft):
            return line | self._draft(event)
        if isinstance(event, Scored):
            return line | _scored(event)
        line |= {name: getattr(event, name) for name in event.__dataclass_fields__}
        if isinstance(event, Committed):
            line |= {name: [_rounded(value) for value in line[name]] for name in _NATS}
            line = {name: value for name, value in line.items() if name not in CONFIDENCE or value}
        if not line.get("accepted"):
            line.pop("accepted", None)
        return line | {name: text for name in ("text", "thought") if (text := getattr(moment, name))}

    def _draft(self, draft: Draft) -> dict[str, Any]:
        key = (draft.request, draft.canvas)
        last = self._last.get(key)
        self._last = {k: v for k, v in self._last.items() if k[0] != draft.request} | {key: draft}
        changed = _changes(last.tokens if last else (), draft.tokens)
        new = {token for _, token in changed} - self._known
        self._known |= new
        line: dict[str, Any] = {
            "request": draft.request,
            "canvas": draft.canvas,
            "step": draft.step,
            "max_steps": draft.max_steps,
            "temperature": draft.temperature,
            "width": len(draft.tokens),
            "tokens": changed,
            "canvas_tokens": _changes(last.canvas_tokens if last else (), draft.canvas_tokens),
            "accepted": [place for place, yes in enumerate(draft.accepted) if yes],
            "entropy": [_rounded(value) for value in draft.entropy],
        } | ({"states": draft.states} if draft.states else {})
        return line | ({"pieces": {str(token): self._piece(token) for token in sorted(new)}} if new else {})


class TraceWriter:
    """Writes moments as they happen, each line at once: a trace that was interrupted can be replayed."""

    def __init__(self, file: TextIO, header: Header, piece: Callable[[int], str]) -> None:
        """`piece` gives the printable text of a token id."""
        self._file, self._encoder = file, TraceEncoder(header, piece)
        self._line(self._encoder.header)

    def write(self, moment: Moment) -> None:
        """Add one line."""
        self._line(self._encoder.line(moment))

    def _line(self, data: Mapping[str, Any]) -> None:
        try:
            self._file.write(as_text(data))
            self._file.flush()
        except OSError as error:
            name = getattr(self._file, "name", "")
            with contextlib.suppress(OSError):  # what is still buffered would fail again at the owner's close
                self._file.close()
            raise RequestError(f"the trace {name!r} cannot be written: {error.strerror}") from None


def as_text(line: Mapping[str, Any]) -> str:
    """A line as it stands in a file."""
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"


def _changes(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    if len(old) != len(new):
        return list(enumerate(new))
    return [(place, token) for place, token in enumerate(new) if token != old[place]]


def _scored(event: Scored) -> dict[str, Any]:
    return {
        "request": event.request,
        "canvas": event.canvas,
        "logprobs": [finite(value) for value in event.logprobs],
        "top": [[(token, finite(value)) for token, value in place] for place in event.top],
        "canvas_logprobs": [finite(value) for value in event.canvas_logprobs],
    }


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN: what a broken model says becomes null."""
    return value if math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    number = finite(value)
    return None if number is None else round(number, ENTROPY_DECIMALS)


class TraceReader:
    """Reads a trace. `header` is there at once; iterating gives the moments and fills `pieces`.

    A fault is a `DataError` that names the file and the line.
    """

    def __init__(self, lines: Iterable[str | bytes], name: str = "trace") -> None:
        self.name = name
        self.pieces: dict[int, str] = {}
        self._lines = iter(lines)
        self._number = 0
        self._last: dict[tuple[int, int], Draft] = {}
        data = self._next()
        if data is None or data.get("format") != FORMAT:
            raise self._fault(f"this is no dgemma trace (its first line must say format {FORMAT!r})")
        version = data.get("version")
        if not isinstance(version, int) or version < 1:
            raise self._fault(f"version must be a whole number of at least 1, got {version!r}")
        if version > VERSION:
            raise self._fault(f"the trace has version {version}; this dgemma reads up to {VERSION}")
        self.header = self._guard(_header, data)

    @staticmethod
    def open(path: str | Path) -> TraceReader:
        """Read a file. A file that cannot be opened is a `DataError` too."""
        try:
            lines = open(path, "rb")  # noqa: SIM115 (closed with the generator)
        except OSError as error:
            raise DataError(f"the trace {str(path)!r} cannot be read: {error.strerror}") from None
        return TraceReader(_closing(lines), str(path))

    def __iter__(self) -> Iterator[Moment]:
        while (data := self._next()) is not None:
            yield self._guard(self._moment, data)

    def piece(self, token: int) -> str:
        """The printable text of a token id that some draft has shown."""
        return self.pieces.get(token, "\ufffd")

    def _next(self) -> dict[str, Any] | None:
        self._number += 1
        try:
            line = next(self._lines, None)
        except OSError as error:
            raise self._fault(f"the line cannot be read: {error.strerror}") from None
        if line is None:
            return None
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._fault(f"this is no JSON: {error}") from None
        if not isinstance(data, dict):
            raise self._fault(f"a line must be a JSON object, not {type(data).__name__}")
        return data

    def _guard(self, read: Callable[[dict[str, Any]], Any], data: dict[str, Any]) -> Any:
        try:
            return read(data)
        except KeyError as error:
            raise self._fault(f"{error.args[0]!r} is missing") from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._fault(str(error)) from None

    def _fault(self, what: str) -> DataError:
        return DataError(f"{self.name}, line {self._number}: {what}")

    def _moment(self, data: dict[str, Any]) -> Moment:
        kind, text, thought = data["type"], data.get("text", ""), data.get("thought", "")
        if not isinstance(text, str) or not isinstance(thought, str):
            raise ValueError("text and thought must be texts")
        event: Event
        if kind == "draft":
            self.pieces.update((int(token), str(piece)) for token, piece in data.get("pieces", {}).items())
            event = self._draft(data)
        elif kind == "committed":
            whole: dict[str, Any] = {name: _whole(data, name) for name in ("request", "canvas", "steps")}
            event = Committed(tokens=_ids(data, "tokens"), stop=str(data["stop"]), **whole, **_confidence(data))
        elif kind == "scored":
            event = _scored_from(data)
        elif kind == "finished":
            names = ("request", "prompt_tokens", "cached_tokens", "completion_tokens", "encode_passes")
            whole = {name: _whole(data, name) for name in names}
            accepted = _ids(data, "accepted") if "accepted" in data else ()
            event = Finished(reason=str(data["reason"]), steps=_ids(data, "steps"), accepted=accepted, **whole)
        else:
            raise ValueError(f"type must be draft, committed, scored or finished; got {kind!r}")
        seconds = float(data["seconds"])
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds must be a number of at least 0, got {seconds}")
        return Moment(seconds, event, text, thought)

    def _draft(self, data: dict[str, Any]) -> Draft:
        names = ("request", "canvas", "step", "max_steps", "width")
        request, canvas, step, max_steps, width = (_whole(data, name) for name in names)
        last = self._last.get((request, canvas))
        accepted = set(_ids(data, "accepted"))
        if accepted and max(accepted) >= width:
            raise ValueError(f"accepted names position {max(accepted)} of a canvas of {width}")
        entropy = _reals(data["entropy"])
        if len(entropy) != width:
            raise ValueError(f"entropy has {len(entropy)} values for a canvas of {width}")
        states = _ids(data, "states") if "states" in data else ()
        if states and len(states) != width + 1:
            raise ValueError(
                f"states has {len(states)} values for a canvas of {width}; it needs one more than positions"
            )
        draft = Draft(
            request=request,
            canvas=canvas,
            step=step,
            max_steps=max_steps,
            temperature=float(data["temperature"]),
            tokens=_changed(last.tokens if last else (), data, "tokens", width),
            canvas_tokens=_changed(last.canvas_tokens if last else (), data, "canvas_tokens", width),
            accepted=tuple(place in accepted for place in range(width)),
            entropy=entropy,
            states=states,
        )
        self._last[request, canvas] = draft
        return draft


def _scored_from(data: Mapping[str, Any]) -> Scored:
    logprobs, marginals = _reals(data["logprobs"]), _reals(data["canvas_logprobs"])
    top = []
    for place in data["top"]:
        ids = [_whole({"top": token}, "top") for token, _ in place]
        top.append(tuple(zip(ids, _reals([value for _, value in place]), strict=True)))
    if len(top) != len(logprobs) or len(marginals) not in (0, len(logprobs)):
        raise ValueError(
            f"top and canvas_logprobs have {len(top)} and {len(marginals)} entries for {len(logprobs)} logprobs"
        )
    return Scored(_whole(data, "request"), _whole(data, "canvas"), logprobs, tuple(top), marginals)


def _confidence(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a committed line; none in older traces and in mode "ar"."""
    if not any(name in data for name in CONFIDENCE):
        return {}
    found = {name: (_reals(data[name]) if name in _NATS else _ids(data, name)) for name in CONFIDENCE}
    count = len(data["tokens"])
    for name, values in found.items():
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} tokens")
    return found


def _reals(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)


def _closing(file: BinaryIO) -> Iterator[bytes]:
    with file:
        yield from file


def _header(data: dict[str, Any]) -> Header:
    settings = data["settings"]
    if not isinstance(settings, dict):
        raise ValueError(f"settings must be an object, got {settings!r}")
    return Header(
        model=str(data["model"]),
        seed=_whole(data, "seed", low=None),
        mode=str(data["mode"]),
        prompt=str(data["prompt"]),
        prompt_tokens=_ids(data, "prompt_tokens"),
        settings=settings,
        blank=_ids(data, "blank"),
    )


def _whole(data: Mapping[str, Any], name: str, low: int | None = 0) -> int:
    value = data[name]
    if not is_whole(value, low):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return value


def _ids(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    values = data[name]
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, got {values!r}")
    return tuple(_whole({name: value}, name) for value in values)


def _changed(old: Sequence[int], data: Mapping[str, Any], name: str, width: int) -> tuple[int, ...]:
    """The tokens of a canvas: the previous ones with the changes of a line put in."""
    tokens: list[int | None] = list(old) if len(old) == width else [None] * width
    for place, token in data[name]:
        if not isinstance(place, int) or not 0 <= place < width:
            raise ValueError(f"{name} names position {place!r} of a canvas of {width}")
        tokens[place] = _whole({name: token}, name)
    if None in tokens:
        raise ValueError(f"{name} leaves position {tokens.index(None)} of the canvas without a token")
    return tuple(token for token in tokens if token is not None)
