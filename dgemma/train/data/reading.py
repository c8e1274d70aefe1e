"""A user's own files, row by row: text, prompt and completion, or a chat; and what to do about rows that are none.

Reads `.txt`, `.md`, `.jsonl`, folders of those, and Hugging Face `datasets`. Knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from dgemma.errors import DataError

Kind = Literal["text", "completion", "chat"]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
SUFFIXES = (".txt", ".md", ".jsonl")
_SHOWN = 5


class BadRow(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Row:
    """`where` it stands ("file:line"), and its `fields`: `text`; `prompt` and `completion`; or `messages`."""

    where: str
    fields: Mapping[str, Any]


@dataclass
class BadRows:
    """Stops at the first bad row ("stop"), or counts them and remembers the first few ("skip")."""

    policy: str
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: object) -> None:
        """Raises DataError if the policy is to stop."""
        if self.policy == "stop":
            raise DataError(f"{where}: {reason} (bad_rows: skip leaves such rows out)")
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{where}: {reason}")

    def tell(self, name: str, report: Callable[[str], None]) -> None:
        """What was skipped, if anything."""
        if self.count:
            report(f"{name}: skipped {self.count:,} bad row{'s' * (self.count > 1)}, among them:")
            for line in self.first:
                report(f"  {line}")


class Rows:
    """The rows of one `path`: a file, a folder (recursively, in the order of its names), or `hf:NAME[:SPLIT]`.

    Raises DataError if there is nothing to read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        folder = Path(path)
        saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
        self._table = _table(path, saved) if saved or path.startswith("hf:") else None
        self._files = [] if self._table is not None else _files(folder)

    def fingerprint(self) -> str:
        """Changes when the content does."""
        if self._table is not None:
            return str(self._table._fingerprint)
        digest = blake2b(digest_size=16)
        for file in self._files:
            content = blake2b(digest_size=16)
            with file.open("rb") as data:
                while chunk := data.read(1 << 20):
                    content.update(chunk)
            digest.update(f"{file.relative_to(self.path)}\0{content.hexdigest()}\n".encode())
        return digest.hexdigest()

    def read(self, kind: Kind | None, bad: BadRows) -> tuple[Kind, Iterator[Row]]:
        """The kind of the rows (None: what the first good one is) and the good rows. Bad ones go to `bad`."""
        rows = self._good(kind, bad)
        found = next(rows, None)
        if found is None:
            raise DataError(f"{self.path}: no row can be used" + "".join(f"; {line}" for line in bad.first[:1]))
        kind = _kind_of(found.fields)

        def all_rows() -> Iterator[Row]:
            yield found
            yield from rows

        return kind, all_rows()

    def _good(self, kind: Kind | None, bad: BadRows) -> Iterator[Row]:
        for where, read, raw in self._raw():
            try:
                fields = read(raw)
                kind_here = kind or _kind_of(fields)
                row = Row(where, {name: _checked(fields, name, kind_here) for name in FIELDS[kind_here]})
            except BadRow as reason:
                bad.add(where, reason)
                continue
            kind = kind_here
            yield row

    def _raw(self) -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
        """Where each row stands, how to read it (which may raise BadRow), and what to read it from."""
        if self._table is not None:
            yield from ((f"{self.path}[{index}]", dict, fields) for index, fields in enumerate(self._table))
        for file in self._files:
            with file.open("rb") as data:
                if file.suffix.lower() != ".jsonl":
                    yield str(file), _document, data.read()
                    continue
                for number, line in enumerate(data, start=1):
                    if line.strip():
                        yield f"{file}:{number}", _json, line


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        names = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        found = sorted(file for file in names if not any(part[0] == "." for part in file.relative_to(path).parts))
        if not found:
            raise DataError(f"{path}: no file in this folder ends with {', '.join(SUFFIXES)}")
        return found
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: the name must end with {', '.join(SUFFIXES)}, or be a folder or hf:NAME[:SPLIT]")
    return [path]


def _table(path: str, saved: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path}: reading it needs the library `datasets`: pip install datasets") from None
    split = "train"
    try:
        if saved:
            table = datasets.load_from_disk(path)
        else:
            name, _, asked = path.removeprefix("hf:").partition(":")
            split = asked or split
            table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises whatever its many readers do
        raise DataError(f"{path}: {error}") from None
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise DataError(f"{path}: there is no split {split!r}, only {', '.join(table)}")
        table = table[split]
    return table


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


def _document(data: bytes) -> dict[str, str]:
    return {"text": _text(data)}


def _json(line: bytes) -> Any:
    text = _text(line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from None


def _kind_of(fields: Any) -> Kind:
    if not isinstance(fields, Mapping):
        raise BadRow(f"a row must be an object with fields, got {_shown(fields)}")
    for kind, names in FIELDS.items():
        if all(name in fields for name in names):
            return kind
    wanted = " or ".join(" and ".join(f"{name!r}" for name in names) for names in FIELDS.values())
    raise BadRow(f"a row needs {wanted}; it has {', '.join(map(repr, fields)) or 'nothing'}")


def _checked(fields: Any, name: str, kind: Kind) -> Any:
    if not isinstance(fields, Mapping):
        raise BadRow(f"a row must be an object with fields, got {_shown(fields)}")
    if name not in fields:
        raise BadRow(f"field {name!r} is missing (this is a source of kind {kind})")
    value = fields[name]
    if name != "messages":
        if not isinstance(value, str):
            raise BadRow(f"field {name!r} must be a text, got {_shown(value)}")
        if not value.strip():
            raise BadRow(f"field {name!r} is empty")
        return value
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise BadRow(f"field 'messages' must be a list of objects with role and content, got {_shown(value)}")
    # Tables give every message all columns: what is None was not said.
    messages = [{key: item for key, item in message.items() if item is not None} for message in value]
    spoken = [message for message in messages if message.get("role") == "assistant"]
    if not spoken:
        raise BadRow("no assistant turn: there is nothing to learn")
    if messages[0].get("role") == "assistant":
        raise BadRow("the first turn is the assistant's: it answers nothing")
    if any(isinstance(m.get("content"), str) and not m["content"].strip() and "tool_calls" not in m for m in spoken):
        raise BadRow("an assistant turn is empty")
    return messages


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"
