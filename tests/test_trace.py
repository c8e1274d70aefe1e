"""A trace gives back the events it was written from, and says what is wrong with it and where."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.errors import DataError, RequestError
from dgemma.events import Committed, Draft, Event, Finished, Scored
from dgemma.trace import ENTROPY_DECIMALS, VERSION, Header, Moment, TraceReader, TraceWriter, create

HEADER = Header(
    model="tiny", seed=-3, mode="diffusion", prompt="Es war\n„einmal“", prompt_tokens=(2, 5),
    settings={"max_new_tokens": 8, "canvas_length": None, "stop_tokens": [1]}, blank=(0, 1),
)  # fmt: skip


def piece(token: int) -> str:
    return f" p{token}é"


def written(moments: Sequence[Moment], header: Header = HEADER) -> str:
    file = io.StringIO()
    writer = TraceWriter(file, header, piece)
    for moment in moments:
        writer.write(moment)
    return file.getvalue()


def read(text: str) -> list[Moment]:
    return list(TraceReader(text.splitlines(keepends=True), "t.jsonl"))


def draft(tokens: Sequence[int], step: int = 1, canvas: int = 0, entropy: float = 1.0, request: int = 1) -> Draft:
    count = len(tokens)
    return Draft(
        request=request, canvas=canvas, step=step, max_steps=9, temperature=0.800000011920929,
        tokens=tuple(tokens), canvas_tokens=tuple(token + 100 for token in tokens),
        accepted=tuple(place % 3 == 0 for place in range(count)), entropy=(entropy,) * count,
    )  # fmt: skip


MOMENTS = [
    Moment(0.5, draft([3, 4, 5, 6])),
    Moment(0.75, draft([3, 4, 7, 6], 2, entropy=0.0)),
    Moment(1.0, Committed(1, 0, (3, 4, 7), 2, "stable"), "Lily – “ran”\n", "hm"),
    Moment(1.25, draft([8, 8, 8, 8], 1, canvas=1)),
    Moment(1.5, Committed(1, 1, (1,), 1, "cap")),
    Moment(1.75, Finished(1, "stop", 2, 1, 4, (2, 1), 1), " end"),
]


def test_events_come_back() -> None:
    assert read(written(MOMENTS)) == MOMENTS
    assert TraceReader(written(MOMENTS).splitlines()).header == HEADER


def entropies() -> st.SearchStrategy[float]:
    return st.floats(0, 12).map(lambda value: round(value, ENTROPY_DECIMALS))


def scored(places: list[tuple[float, list[tuple[int, float]], float]]) -> Scored:
    logprobs, top, marginals = zip(*places, strict=True) if places else ((), (), ())
    return Scored(1, 0, tuple(logprobs), tuple(map(tuple, top)), tuple(marginals))


@st.composite
def any_events(draw: st.DrawFn) -> list[Event]:
    ids, whole, nats = st.integers(0, 300_000), st.integers(0, 10_000), st.floats(-100, 0)
    events: list[Event] = []
    for _ in range(draw(st.integers(0, 8))):
        width = draw(st.integers(1, 5))
        row = st.lists(ids, min_size=width, max_size=width).map(tuple)
        marks = st.lists(st.booleans(), min_size=width, max_size=width).map(tuple)
        heats = st.lists(entropies(), min_size=width, max_size=width).map(tuple)
        some = st.integers(0, 2)
        temperature = st.floats(0, 2, width=32)
        events.append(
            draw(
                st.one_of(
                    st.builds(Draft, some, some, whole, whole, temperature, row, row, marks, heats),
                    st.builds(Committed, some, some, row, whole, st.sampled_from(["stable", "cap", "ar"])),
                    st.lists(st.tuples(nats, st.lists(st.tuples(ids, nats), max_size=3), nats), max_size=4).map(scored),
                    st.builds(Finished, some, st.just("stop"), whole, whole, whole, row, whole),
                )
            )
        )
    return events


@given(any_events())
def test_any_events_come_back(events: list[Event]) -> None:
    assert [moment.event for moment in read(written([Moment(0.0, event) for event in events]))] == events


def test_only_changes_are_stored() -> None:
    lines = [json.loads(line) for line in written(MOMENTS).splitlines()]
    assert lines[1]["tokens"] == [[0, 3], [1, 4], [2, 5], [3, 6]]
    assert lines[2]["tokens"] == [[2, 7]] and lines[2]["canvas_tokens"] == [[2, 107]]
    assert lines[1]["accepted"] == [0, 3]
    assert [sorted(line.get("pieces", {})) for line in lines[1:5]] == [["3", "4", "5", "6"], ["7"], [], ["8"]]


def test_pieces_are_known_when_they_are_needed() -> None:
    reader = TraceReader(written(MOMENTS).splitlines())
    for moment in reader:
        if isinstance(moment.event, Draft):
            assert [reader.piece(token) for token in moment.event.tokens] == [piece(t) for t in moment.event.tokens]
    assert reader.piece(12345) == "\ufffd"


def test_entropies_are_rounded_and_nan_survives() -> None:
    (got,) = read(written([Moment(0.0, draft([3], entropy=1.23456789))]))
    assert isinstance(got.event, Draft) and got.event.entropy == (1.2346,)
    (got,) = read(written([Moment(0.0, draft([3], entropy=math.nan))]))
    assert isinstance(got.event, Draft) and math.isnan(got.event.entropy[0])


def test_scores_that_are_no_numbers_survive() -> None:
    event = Scored(1, 2, (-0.25, math.nan), (((3, -0.25), (7, math.nan)), ()), ())
    text = written([Moment(0.0, event)])
    assert "NaN" not in text
    (got,) = read(text)
    assert repr(got.event) == repr(event)


def test_a_trace_cut_between_lines_can_be_read() -> None:
    lines = written(MOMENTS).splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        assert read("".join(lines[:count])) == MOMENTS[: count - 1]


def test_every_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with create(path) as file:
        writer = TraceWriter(file, HEADER, piece)
        for count, moment in enumerate(MOMENTS, start=1):
            writer.write(moment)
            assert len(list(TraceReader.open(path))) == count


def changed(line: int, **changes: Any) -> str:
    """The trace with fields of one line changed; None takes a field away."""
    lines = written(MOMENTS).splitlines()
    data = json.loads(lines[line - 1]) | changes
    lines[line - 1] = json.dumps({key: value for key, value in data.items() if value is not None})
    return "\n".join(lines)


def with_scored(**changes: Any) -> str:
    """The trace with one more line, of log-probabilities."""
    line = {
        "type": "scored",
        "seconds": 2,
        "request": 1,
        "canvas": 1,
        "logprobs": [-0.5, None],
        "top": [[[3, -0.5]], []],
    }
    return written(MOMENTS) + json.dumps(line | {"canvas_logprobs": [-1.5, -2.0]} | changes) + "\n"


FAULTS = {
    "empty": ("", 1, "no dgemma trace"),
    "another file": ("{}", 1, "no dgemma trace"),
    "no json": ("hello\n", 1, "no JSON"),
    "newer": (changed(1, version=VERSION + 1), 1, rf"version {VERSION + 1}; this dgemma reads up to {VERSION}"),
    "no version": (changed(1, version=None), 1, "version must be"),
    "header field missing": (changed(1, prompt=None), 1, "'prompt' is missing"),
    "cut in a line": (written(MOMENTS)[:-30], 7, "no JSON"),
    "an array": (written(MOMENTS) + "[1]\n", 8, "must be a JSON object"),
    "deep": (written(MOMENTS) + "[" * 100_000 + "\n", 8, "no JSON"),
    "unknown type": (changed(4, type="image"), 4, "type must be draft, committed, scored or finished"),
    "field missing": (changed(2, step=None), 2, "'step' is missing"),
    "position outside": (changed(3, tokens=[[4, 1]]), 3, "names position 4 of a canvas of 4"),
    "accepted outside": (changed(3, accepted=[4]), 3, "names position 4"),
    "negative token": (changed(3, tokens=[[0, -1]]), 3, "whole number"),
    "first draft with holes": (changed(2, tokens=[[0, 1]]), 2, "leaves position 1 of the canvas without a token"),
    "entropy of another length": (changed(3, entropy=[1.0]), 3, "entropy has 1 values for a canvas of 4"),
    "entropy no number": (changed(3, entropy=["x"] * 4), 3, "could not convert"),
    "tokens no pairs": (changed(3, tokens=[1]), 3, "line 3"),
    "huge": (changed(3, width=10**12), 3, "entropy has 4 values"),
    "text no text": (changed(4, text=5), 4, "text and thought"),
    "scores without alternatives": (with_scored(top=[[]]), 8, "top and canvas_logprobs have 1 and 2 entries for 2"),
    "marginals of some": (with_scored(canvas_logprobs=[-1]), 8, "have 2 and 1 entries for 2 logprobs"),
    "an alternative that is no token": (with_scored(top=[[[-1, 0.5]], []]), 8, "top must be a whole number"),
    "scores that are no numbers": (with_scored(logprobs=["x", 0]), 8, "could not convert"),
    "time runs nowhere": (changed(4, seconds=-1), 4, "seconds must be"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_name_file_and_line(case: str, tmp_path: Path) -> None:
    text, line, told = FAULTS[case]
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told) as caught:
        list(TraceReader.open(path))
    assert f"{path}, line {line}: " in str(caught.value)


def test_bytes_that_are_no_utf8_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(written(MOMENTS).encode() + b'{"type": "\xff"}\n')
    with pytest.raises(DataError, match="line 8: this is no JSON"):
        list(TraceReader.open(path))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        TraceReader.open(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="directory"):
        TraceReader.open(tmp_path)
    with pytest.raises(RequestError, match="cannot be written: Is a directory"):
        create(tmp_path)
    with pytest.raises(RequestError, match="No such file"):
        create(tmp_path / "no" / "t.jsonl")


def test_a_full_disk_is_told() -> None:
    with open("/dev/full", "w") as file, pytest.raises(RequestError, match="No space left"):
        TraceWriter(file, HEADER, piece)
