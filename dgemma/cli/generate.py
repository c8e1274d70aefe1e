"""Complete a prompt. In a terminal the canvas is shown as it is denoised; a pipe gets the text only."""

from __future__ import annotations

import argparse
import contextlib
import functools
from dataclasses import asdict
from typing import Any

from dgemma.cli.arguments import add_generation, add_loading, add_screen, settings_of, text_of
from dgemma.cli.language import add_language, language_of
from dgemma.cli.output import Silent, display_for, summarise, summary, write_json
from dgemma.cli.running import load, play
from dgemma.config import GenerationConfig
from dgemma.text.confidence import TokenConfidence, token_confidence
from dgemma.trace import Header, TraceWriter, create, finite
from dgemma.view import Progress, moments

NAME = "generate"
HELP = "complete a prompt, with a live view of the canvas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options] [PROMPT]"
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="text to go on from; - or nothing reads standard input"
    )
    add_loading(parser)
    add_generation(parser)
    add_screen(parser)
    add_language(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--trace", metavar="FILE", help="record every step for `dgemma replay`")


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    prompt = text_of(arguments.prompt, "prompt")
    language = language_of(arguments)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(create(arguments.trace)) if arguments.trace else None
        llm = load(settings)
        config = llm.generation.with_(**settings.generation)
        ids = tuple(llm.encode_prompt(prompt))
        piece = functools.cache(llm.tokenizer.piece)
        writer = TraceWriter(file, Header.of(llm.name, config, prompt, ids), piece) if file else None
        blank = config.blank_tokens
        display = (
            Silent()
            if arguments.json
            else display_for(live=not arguments.no_live, quiet=arguments.quiet, piece=piece, blank=blank, prompt=prompt)
        )
        events = llm.stream(ids, **settings.generation, **language)
        progress = Progress()
        try:
            play(moments(events, llm.tokenizer, config.stop_tokens), display, progress, writer)
        finally:
            # Also after a ctrl-C: what was generated so far is worth its line.
            if arguments.json:
                sure = token_confidence(progress.committed, llm.tokenizer, config.stop_tokens)
                write_json(result(llm.name, config, prompt, progress) | {"confidence": [_rounded(one) for one in sure]})
            else:
                summarise(summary(progress, config.seed), arguments.quiet)
    return 0


def result(model: str, config: GenerationConfig, prompt: str, progress: Progress) -> dict[str, Any]:
    """What `--json` prints; the fields mean what they mean in `dgemma.api.Generation`."""
    end = progress.finished
    return {
        "model": model,
        "prompt": prompt,
        "text": progress.text,
        "token_ids": progress.tokens,
        "finish_reason": end.reason if end else "abort",
        "prompt_tokens": end.prompt_tokens if end else 0,
        "seed": config.seed,
        "mode": config.mode,
        "steps": progress.steps,
        "stops": [stop for stop in progress.stops if stop != "ar"] or ["ar"] * (config.mode != "diffusion"),
        **({"accepted": list(end.accepted)} if config.mode == "verified" and end else {}),
        "tokens_per_forward": round(progress.tokens_per_forward, 4),
        "seconds": round(progress.seconds, 4),
    }


def _rounded(one: TokenConfidence) -> dict[str, Any]:
    nats = {"entropy": finite(one.entropy), "top_logprob": finite(one.top_logprob)}
    return asdict(one) | {name: None if value is None else round(value, 4) for name, value in nats.items()}
