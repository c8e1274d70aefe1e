"""Write parts of a text anew: chosen spans, or the words that the model itself finds least likely. The rest stays as it
is. Prints the new text; the file is not changed."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import asdict
from pathlib import Path

from dgemma.cli.arguments import add_generation, add_loading, add_screen, settings_of, text_of
from dgemma.cli.filling import add_search, candidates_of, search, search_options, show, told
from dgemma.cli.output import write_json
from dgemma.cli.running import load
from dgemma.errors import RequestError

NAME = "edit"
HELP = "write parts of a text anew and keep the rest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] [FILE]"
    parser.add_argument("file", metavar="FILE", nargs="?", help="text to edit; - or nothing reads standard input")
    what = parser.add_argument_group("what to edit")
    what.add_argument(
        "--span", metavar="A:B", action="append", type=_span, help="characters A (from 0) up to B; may be repeated"
    )
    what.add_argument("--doubt", metavar="X", type=float, help="this share of the tokens, the least likely ones")
    what.add_argument("--by", choices=("canvas", "encoder"), default="canvas", help="who doubts (default: canvas)")
    what.add_argument(
        "--instruction", metavar="TEXT", default="", help="what to do; for models that know conversations"
    )
    what.add_argument("--keep-prefix", metavar="N", type=int, default=0, help="characters at the begin that stay")
    what.add_argument("--keep-suffix", metavar="N", type=int, default=0, help="characters at the end that stay")
    what.add_argument("--resize", metavar="N", type=int, default=0, help="tokens that a span may grow or shrink by")
    add_search(parser)
    add_loading(parser)
    add_generation(parser)
    add_screen(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    text = _read(arguments.file)
    llm = load(settings)
    names = ("doubt", "by", "instruction", "keep_prefix", "keep_suffix", "resize")
    options = search_options(arguments, settings, *names)
    begun = time.perf_counter()
    editing = llm.filler.editing(llm.generation, text, spans=arguments.span, watch=not arguments.json, **options)
    filled = search(llm, editing.filling)
    seconds = time.perf_counter() - begun
    edited = editing.result(filled)
    if arguments.json:
        write_json(
            {
                "model": edited.model,
                "text": edited.text,
                "changes": [asdict(change) for change in edited.changes],
                "logprob": edited.logprob,
                "before": edited.before,
                "doubted": [{"start": a, "end": b, "logprob": value} for (a, b), value in edited.doubted],
                "candidates": candidates_of(filled),
                "truncated": edited.truncated,
                "token_ids": edited.token_ids,
                "seed": edited.seed,
                "seconds": round(seconds, 4),
            }
        )
    else:
        show(llm, filled, editing.filling.plan.texts[0], arguments)
        told(filled, arguments, seconds)
    return 0


def _span(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a span is A:B, two numbers of characters, got {text!r}")
    return int(found[1]), int(found[2])


def _read(file: str | None) -> str:
    if file is None or file == "-":
        return text_of(file, "text")
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
