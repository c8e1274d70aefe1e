"""From what a recipe says about a user's rows to token documents: read, tokenise, keep on disk for the next run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dgemma.errors import ConfigError
from dgemma.text.chat import ChatTemplate
from dgemma.text.tokenizer import Tokenizer
from dgemma.train.data.documents import Source
from dgemma.train.data.reading import BadRows, Kind, Rows
from dgemma.train.data.tokenise import end_token, tokenise

KINDS = ("auto", "text", "completion", "chat", "tokens")
FORMAT = 1
"""Raised when the same rows would give other tokens, so that old caches are not used."""
SHORT = 1024
"""Texts up to so many tokens are trained whole, if `whole` is left open and they hold half of the tokens."""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One entry of a recipe's `data.sources`.

    `path`: a file, a folder, `hf:NAME[:SPLIT]`, or a token file (`.npz`). `weight`: its share of the batches,
    relative to the others. `kind`: "auto" goes by the fields of the first row. `whole`: texts are trained to their
    end (True) or windows are cut out of them (False); None decides by their length. `pack`: short documents share
    rows. `bad_rows`: "stop" at the first, or "skip" and report.
    """

    path: str
    weight: float = 1.0
    kind: Literal["auto", "text", "completion", "chat", "tokens"] = "auto"
    whole: bool | None = None
    pack: bool = False
    bad_rows: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"source {self.path}: kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.bad_rows not in ("stop", "skip"):
            raise ConfigError(f"source {self.path}: bad_rows must be stop or skip; got {self.bad_rows!r}")
        if not 0 <= self.weight < float("inf"):
            raise ConfigError(f"source {self.path}: weight must be a number from 0 on, got {self.weight!r}")
        if self.whole is False and (self.pack or self.kind in ("completion", "chat")):
            raise ConfigError(f"source {self.path}: whole: false is for unpacked texts only")

    @property
    def name(self) -> str:
        """What the log calls it."""
        return self.path if self.path.startswith("hf:") else Path(self.path).stem


def load_sources(
    specs: Sequence[SourceSpec],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    cache: Path,
    report: Callable[[str], None],
) -> list[Source]:
    """The token documents of every spec, from the folder `cache` where they were tokenised before.

    `report` is told what was read and which rows were skipped. Raises DataError for what cannot be used, by name
    and line.
    """
    if not specs:
        raise ConfigError("there are no data sources: name at least one file")
    return [_load(spec, tokenizer, template, cache, report) for spec in specs]


def _load(
    spec: SourceSpec, tokenizer: Tokenizer, template: ChatTemplate | None, cache: Path, report: Callable[[str], None]
) -> Source:
    how = ""
    if spec.kind == "tokens" or spec.path.endswith(".npz"):
        source = Source.load(Path(spec.path), whole=True, end_token=end_token(tokenizer))
        if source.spans is not None:
            source = replace(source, end_token=None)
    else:
        rows = Rows(spec.path)
        file = cache / f"{Path(spec.name).name}-{_key(spec, rows, tokenizer, template)}.npz"
        known = _read_cache(file, spec, tokenizer, report)
        source, bad = known or _tokenise(spec, rows, tokenizer, template)
        bad.tell(spec.name, report)
        how = ", tokenised before" if known else ""
        if known is None:
            cache.mkdir(parents=True, exist_ok=True)
            source.save(file, bad=np.array(json.dumps(asdict(bad))))
    report(f"{spec.name}: {len(source):,} documents, {len(source.ids):,} tokens{how}")
    return replace(source, name=spec.name, pack=spec.pack, whole=_whole(spec, source))


def _tokenise(
    spec: SourceSpec, rows: Rows, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[Source, BadRows]:
    bad = BadRows(spec.bad_rows)
    asked: Kind | None = None if spec.kind == "auto" or spec.kind == "tokens" else spec.kind
    kind, good = rows.read(asked, bad)
    return tokenise(spec.name, kind, good, tokenizer, template, bad), bad


def _whole(spec: SourceSpec, source: Source) -> bool:
    if source.spans is not None:
        if spec.whole is False:
            raise ConfigError(f"source {spec.path}: whole: false is for texts only, these are answers")
        return True
    lengths = np.diff(source.offsets)
    short = 2 * lengths[lengths <= SHORT].sum() >= lengths.sum()
    return bool(short or spec.pack) if spec.whole is None else spec.whole


def _key(spec: SourceSpec, rows: Rows, tokenizer: Tokenizer, template: ChatTemplate | None) -> str:
    """Everything that the tokens (and the report on bad rows) depend on."""
    parts: Sequence[Any] = (
        FORMAT, rows.fingerprint(), tokenizer._fast.to_str(), tokenizer.special_names,
        None if template is None else template.source, spec.path, spec.kind, spec.bad_rows,
    )  # fmt: skip
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def _read_cache(
    file: Path, spec: SourceSpec, tokenizer: Tokenizer, report: Callable[[str], None]
) -> tuple[Source, BadRows] | None:
    if not file.is_file():
        return None
    try:
        source = Source.load(file, whole=True, end_token=end_token(tokenizer))
        with np.load(file) as data:
            bad = BadRows(**json.loads(str(data["bad"])))
    except Exception as error:  # damaged files fail in many ways, and each is mended the same way
        report(f"{spec.name}: the tokens kept in {file} are damaged and made again ({error})")
        return None
    if source.spans is not None:
        source = replace(source, end_token=None, answer_only=True)
    return source, bad
