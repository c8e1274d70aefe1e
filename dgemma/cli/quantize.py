"""Write a checkpoint with its weights in fewer bits: int8wo and int4wo for memory, int8dyn for time, fp8 for GPUs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli.arguments import decode
from dgemma.cli.info import human_bytes
from dgemma.cli.output import write, write_json
from dgemma.errors import RequestError

if TYPE_CHECKING:
    from dgemma.checkpoint.quantize import Quantised
    from dgemma.eval.quantisation import Difference

NAME = "quantize"
HELP = "write a checkpoint in fewer bits"
_LARGE = 1_000_000_000  # bytes of weights from which the report runs in the stored type


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a shipped name, a checkpoint folder, or a Hugging Face id")
    parser.add_argument("folder", metavar="OUT", help="the new folder")
    parser.add_argument("--format", required=True, metavar="NAME", help="int8wo, int4wo, int8dyn or fp8")
    parser.add_argument(
        "--group", type=int, metavar="N", help="columns that share a scale: 32, 64 or 128 (int4wo: 64; int8wo: the row)"
    )
    parser.add_argument("--head", action="store_true", help="int8dyn: logits, too; see what --report says of |dH|")
    parser.add_argument("--dtype", metavar="{float32,bfloat16}", help="type of what stays plain (default: as stored)")
    parser.add_argument("--report", action="store_true", help="compare both on text: KL, argmax, bits per byte")
    parser.add_argument("--text", metavar="FILE", help="the text of the report (default: four built-in passages)")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from dgemma.checkpoint.quantize import quantize_checkpoint
    from dgemma.quant import make_format

    weight_format = make_format(arguments.format, arguments.group, head=arguments.head)
    dtype = _dtype(arguments.dtype)
    if arguments.text and not arguments.report:
        raise RequestError("--text is the text of a report; give --report, too")
    texts = _texts(arguments.text) if arguments.report else []
    with _bar("quantising") as advance:
        done = quantize_checkpoint(arguments.source, arguments.folder, weight_format, dtype=dtype, advance=advance)
    if not arguments.json:
        write(_summary(done) + "\n")
    differences = _compare(done, texts) if arguments.report else []
    if arguments.json:
        write_json(_facts(done) | ({"report": [one.json() for one in differences]} if arguments.report else {}))
    elif differences:
        write("\n" + _table(differences))
    return 0


def _dtype(name: str | None) -> Any:
    import torch

    kinds = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in kinds:
        raise RequestError(f"dtype must be float32 or bfloat16, got {name!r}")
    return kinds[name]


def _texts(path: str | None) -> list[str]:
    from dgemma.eval.quantisation import PASSAGES

    if path is None:
        return list(PASSAGES)
    try:
        text = decode(Path(path).read_bytes())
    except OSError as error:
        raise RequestError(f"{path!r} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise RequestError(f"{path!r} is empty; the report needs text")
    return [text]


def _compare(done: Quantised, texts: list[str]) -> list[Difference]:
    import torch

    from dgemma.checkpoint.load import load_checkpoint
    from dgemma.eval.quantisation import compare, documents_of
    from dgemma.text.tokenizer import Tokenizer

    # Float32 activations leave nothing but the weights to differ.
    dtype = torch.float32 if done.bytes_before <= _LARGE else None
    original, quantised = (load_checkpoint(folder, dtype=dtype).model for folder in (done.source, done.folder))
    documents = documents_of(texts, Tokenizer.load(done.folder), original.config.vocab_size)
    with _bar("comparing") as advance:
        return compare(original, quantised, documents, advance=advance)


def _facts(done: Quantised) -> dict[str, Any]:
    return {
        "source": str(done.source),
        "folder": str(done.folder),
        "format": done.format.name,
        "group": done.format.group,
        "head": done.format.head,
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "quantised_weights": done.quantised,
        "plain_tensors": done.plain,
    }


def _summary(done: Quantised) -> str:
    share = done.bytes_after / max(1, done.bytes_before)
    return (
        f"{done.folder}: {done.format.name}, {human_bytes(done.bytes_before)} to {human_bytes(done.bytes_after)} "
        f"({share:.0%}), {done.quantised} weights quantised"
    )


def _table(differences: list[Difference]) -> str:
    rows = [("", "tokens", "KL (nats)", "same argmax", "|dH| (nats)", "bits/byte before", "after")]
    for one in differences:
        bits = (f"{one.bits_per_byte_original:.4f}", f"{one.bits_per_byte_quantised:.4f}")
        same = f"{one.argmax_agreement:.2%}"
        rows.append((one.text, f"{one.tokens}", f"{one.kl:.5f}", same, f"{one.entropy_difference:.4f}", *bits))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(line.rstrip() + "\n" for line in lines)


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], object]]:
    """A progress bar in a terminal, gone when done; nothing in a pipe."""
    if not sys.stdout.isatty():
        yield lambda done, total: None
        return
    from rich.progress import Progress

    from dgemma.cli.terminal import console

    with Progress(console=console(), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
