"""How likely the model finds a text: log-likelihood in nats, and bits per byte."""

from __future__ import annotations

import argparse
import math

from dgemma.cli.arguments import add_loading, settings_of, text_of
from dgemma.cli.output import write, write_json
from dgemma.cli.running import load

NAME = "score"
HELP = "log-likelihood and bits per byte of a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="text to score; - or nothing reads standard input")
    parser.add_argument("--prompt", default="", help="what the text follows; not scored itself")
    add_loading(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object, with a value for every token")


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    text = text_of(arguments.text, "text")
    prompt = text_of(arguments.prompt, "prompt") if arguments.prompt else ""
    llm = load(settings)
    score = llm.score(text, prompt=prompt)
    if arguments.json:
        write_json(
            {
                "model": llm.name,
                "text": text,
                "prompt": prompt,
                "token_ids": score.token_ids,
                "logprobs": [round(value, 6) for value in score.logprobs],
                "total": score.total,
                "per_token": score.per_token,
                "bits_per_byte": score.bits_per_byte,
            }
        )
    else:
        rows = {
            "tokens": f"{len(score.token_ids)}",
            "log-likelihood": f"{score.total:.4f} nats",
            "per token": f"{score.per_token:.4f} nats",
            "perplexity": f"{math.exp(min(-score.per_token, 700.0)):.2f} per token",
            "bits per byte": f"{score.bits_per_byte:.4f}",
        }
        write("".join(f"{name:<15} {value}\n" for name, value in rows.items()))
    return 0
