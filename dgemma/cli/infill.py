"""Fill the holes of a text. `[[...]]` is a hole; `[[... 3 words ...]]`, `[[... 2-6 tokens ...]]` say how long, and
`[[a short reason]]` says with what. Everything around holes stays as it is."""

from __future__ import annotations

import argparse
import time

from dgemma.cli.arguments import add_generation, add_loading, add_screen, settings_of, text_of
from dgemma.cli.filling import add_search, candidates_of, search, search_options, show, told
from dgemma.cli.output import write_json
from dgemma.cli.running import load

NAME = "infill"
HELP = "fill the holes of a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] [TEXT]"
    parser.add_argument("text", metavar="TEXT", nargs="?", help="text with holes; - or nothing reads standard input")
    add_search(parser)
    parser.add_argument(
        "--most", type=int, default=argparse.SUPPRESS, metavar="N", help="tokens at most in a [[...]] (default 16)"
    )
    add_loading(parser)
    add_generation(parser)
    add_screen(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    text = text_of(arguments.text, "text")
    llm = load(settings)
    options = search_options(arguments, settings, "most")
    begun = time.perf_counter()
    filling = llm.filler.infilling(llm.generation, text, watch=not arguments.json, **options)
    filled = search(llm, filling)
    seconds = time.perf_counter() - begun
    if arguments.json:
        write_json(
            {
                "model": filled.model,
                "text": filled.text,
                "fills": filled.fills,
                "logprob": filled.logprob,
                "candidates": candidates_of(filled),
                "ignored": filled.ignored,
                "truncated": filled.truncated,
                "token_ids": filled.token_ids,
                "seed": filled.seed,
                "seconds": round(seconds, 4),
            }
        )
    else:
        show(llm, filled, filling.plan.texts[0], arguments)
        told(filled, arguments, seconds)
    return 0
