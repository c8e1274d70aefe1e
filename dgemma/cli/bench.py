"""Measure speed and memory, with a peer beside us on the same weights. Ratios travel between machines, milliseconds do
not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli import bench_gpu, bench_serve
from dgemma.cli.arguments import add_generation, add_loading, settings_of
from dgemma.cli.output import note, write
from dgemma.cli.report import Outcome, Say, add_output, check_output, deliver, telling
from dgemma.cli.running import load
from dgemma.errors import DgemmaError, RequestError
from dgemma.settings import OPTIONS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dgemma.api import LLM

NAME = "bench"
HELP = "measure speed and memory, beside transformers"
_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for name, text, more, add, job in _BENCHMARKS:
        own = benchmarks.add_parser(name, help=text, description=more)
        add(own)
        own.set_defaults(job=job)


def run(arguments: argparse.Namespace) -> int:
    check_output(arguments)
    outcome = arguments.job(arguments)
    if outcome is not None:
        deliver(arguments, outcome)
    return 0


def _measure(arguments: argparse.Namespace, measure: Callable[[LLM, Any, Say], Any], settings: Any) -> Any:
    """A report of one model, from a benchmark that takes no generation parameters."""
    # Some of its flags are called like a generation parameter and are none.
    own = {name: value for name, value in vars(arguments).items() if name not in OPTIONS or not OPTIONS[name].field}
    llm = load(settings_of(argparse.Namespace(**own)))
    with telling() as say:
        return measure(llm, settings, say)


def _add_shape(parser: argparse.ArgumentParser, steps: int) -> None:
    """What the runs of fixed steps look like."""
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="tokens of the prompt (128)")
    parser.add_argument("--canvas-length", type=int, metavar="N", help="positions of a canvas (the model's)")
    parser.add_argument("--fixed-steps", type=int, default=steps, metavar="N", help=f"steps of a canvas ({steps})")


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=3, metavar="N", help="how many of the 8 built-in prompts (3)")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="runs of each, each with a seed (3)")
    parser.add_argument(
        "--fixed-steps", type=int, default=16, metavar="N", help="steps of the runs without early stop (16)"
    )
    parser.add_argument("--kinds", type=_words, metavar="K,K", help="which of the runs fixed, own, ar (all)")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="repeat or cut every prompt to N tokens")
    parser.add_argument("--no-floor", action="store_true", help="do not measure the floor of a step")
    parser.add_argument("--no-peer", action="store_true", help="measure dgemma alone")
    parser.add_argument("--peer-model", metavar="FOLDER", help="what transformers loads, if it cannot read the model")
    parser.add_argument("--medium", action="store_true", help="measure transformers at matmul precision medium, too")
    parser.add_argument(
        "--tuned", action="store_true", help="and at medium with a tuned allocator, in a process of its own"
    )
    add_output(parser, plot=True)
    add_loading(parser, but=("threads",))
    parser.add_argument("--dtypes", type=_words, metavar="T,T", help="measure with several types of weights")
    parser.add_argument(
        "--threads",
        type=_numbers,
        dest="thread_counts",
        metavar="N,N",
        help="CPU threads; several are taken in turn",
    )
    add_generation(parser)


def _decode(arguments: argparse.Namespace) -> Outcome:
    from dgemma.bench.decode import KINDS, DecodeSettings, run_decode
    from dgemma.bench.report import overview, plot, tables
    from dgemma.bench.results import suite_json

    settings = DecodeSettings(
        prompts=arguments.prompts,
        repeats=arguments.repeats,
        fixed_steps=arguments.fixed_steps,
        kinds=arguments.kinds or KINDS,
        prompt_tokens=arguments.prompt_tokens,
        floor=not arguments.no_floor,
        peer=not arguments.no_peer,
        peer_model=arguments.peer_model,
        medium=arguments.medium,
        tuned=arguments.tuned,
    )
    if "mode" in arguments:
        raise RequestError("this benchmark measures both modes; it takes no --mode")
    if "dtype" in arguments and arguments.dtypes:
        raise RequestError("--dtype and --dtypes say the same thing; give one of them")
    for dtype in arguments.dtypes or ():
        if dtype not in _DTYPES:
            raise RequestError(f"dtypes must be some of {', '.join(_DTYPES)}; got {dtype!r}")
    chosen = settings_of(arguments)
    reports = []
    with telling() as say:
        for dtype in arguments.dtypes or (chosen.dtype,):
            for threads in arguments.thread_counts or (chosen.threads,):
                llm = load(replace(chosen, dtype=dtype, threads=threads))
                reports.append(run_decode(llm, settings, chosen.generation, say))
                del llm
    parts: list[RenderableType] = [part for report in reports for part in (*tables(report), "")]
    more = list(overview(reports))
    return Outcome(suite_json(reports), [*parts, *more] if more else parts[:-1], lambda: plot(*reports))


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    _add_shape(parser, 8)
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="canvases (3)")
    parser.add_argument("--ops", action="store_true", help="show every op of the floors, too")
    add_output(parser)
    add_loading(parser)


def _kernels(arguments: argparse.Namespace) -> Outcome:
    from dgemma.bench.charts import kernels_tables
    from dgemma.bench.kernels import KernelsSettings, run_kernels

    settings = KernelsSettings(
        steps=arguments.fixed_steps,
        repeats=arguments.repeats,
        prompt_tokens=arguments.prompt_tokens,
        canvas=arguments.canvas_length,
    )
    report = _measure(arguments, run_kernels, settings)
    return Outcome(report.json(), kernels_tables(report, arguments.ops))


def _add_memory(parser: argparse.ArgumentParser) -> None:
    _add_shape(parser, 2)
    parser.add_argument("--canvases", type=int, default=4, metavar="N", help="canvases, one after another (4)")
    parser.add_argument("--no-peer", action="store_true", help="measure dgemma alone")
    parser.add_argument("--peer-model", metavar="FOLDER", help="what transformers loads, if it cannot read the model")
    parser.add_argument("--tuned", action="store_true", help="transformers with a tuned allocator, too")
    add_output(parser)
    add_loading(parser)


def _memory(arguments: argparse.Namespace) -> Outcome:
    from dgemma.bench.charts import memory_tables
    from dgemma.bench.memory import MemorySettings, run_memory

    settings = MemorySettings(
        canvases=arguments.canvases,
        steps=arguments.fixed_steps,
        prompt_tokens=arguments.prompt_tokens,
        canvas=arguments.canvas_length,
        peer=not arguments.no_peer,
        peer_model=arguments.peer_model,
        tuned=arguments.tuned,
    )
    report = _measure(arguments, run_memory, settings)
    return Outcome(report.json(), memory_tables(report))


def _add_scaling(parser: argparse.ArgumentParser) -> None:
    _add_shape(parser, 6)
    parser.add_argument(
        "--sweeps",
        type=_words,
        metavar="S,S",
        help="some of prompt, again, canvases, batch, narrow, answer, vocabulary",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="runs of each (3)")
    parser.add_argument("--prompt-sizes", type=_numbers, metavar="N,N", help="prompt lengths in tokens")
    parser.add_argument("--canvas-counts", type=_numbers, metavar="N,N", help="canvases, one after another")
    parser.add_argument("--batches", type=_numbers, metavar="N,N", help="canvases in a batch")
    parser.add_argument("--answers", type=_numbers, metavar="N,N", help="tokens of an answer")
    parser.add_argument("--vocabularies", type=_numbers, metavar="N,N", help="vocabulary sizes, of random models")
    parser.add_argument("--narrow-width", type=int, default=32, metavar="N", help="positions of a narrow canvas (32)")
    add_output(parser, plot=True)
    add_loading(parser)


def _scaling(arguments: argparse.Namespace) -> Outcome:
    from dgemma.bench.charts import scaling_plot, scaling_tables
    from dgemma.bench.scaling import ScalingSettings, run_scaling

    chosen = {
        "sweeps": arguments.sweeps, "prompts": arguments.prompt_sizes, "canvases": arguments.canvas_counts,
        "batches": arguments.batches, "answers": arguments.answers, "vocabularies": arguments.vocabularies,
    }  # fmt: skip
    settings = ScalingSettings(
        **{name: values for name, values in chosen.items() if values},
        narrow_width=arguments.narrow_width,
        prompt_tokens=arguments.prompt_tokens,
        canvas=arguments.canvas_length,
        steps=arguments.fixed_steps,
        repeats=arguments.repeats,
    )
    report = _measure(arguments, run_scaling, settings)
    return Outcome(report.json(), scaling_tables(report), lambda: scaling_plot(report))


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="starts after a first one (3)")
    add_output(parser)
    add_loading(parser, but=("device",))


def _start(arguments: argparse.Namespace) -> Outcome:
    from dgemma.bench.start import run_start

    chosen = settings_of(arguments)
    with telling() as say:
        report = run_start(chosen.model, chosen.dtype, chosen.threads or 1, arguments.repeats, say)
    text = (
        f"{report.model}, {report.threads} threads, seconds since the start of the process: imports "
        f"{report.imported:.2f}, loaded {report.loaded:.2f}, first draft {report.first_draft:.2f} (median of "
        f"{report.starts}; the very first start {report.first_start:.2f})"
    )
    return Outcome(report.json(), [text])


def _add_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="dense640 or moe262k")
    parser.add_argument("folder", metavar="FOLDER", help="the new folder")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (0)")


def _make(arguments: argparse.Namespace) -> None:
    from dgemma.bench.models import make_checkpoint

    write(f"{make_checkpoint(arguments.name, arguments.folder, arguments.seed)}\n")


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="for checkpoints, finished cells, table.json and table.md")
    parser.add_argument(
        "--checkpoints", type=_words, metavar="C,C", help="default, dense640, moe262k or folders (those three)"
    )
    parser.add_argument("--formats", type=_words, metavar="F,F", help="some of float32, bfloat16, int8dyn (all)")
    parser.add_argument("--threads", type=_numbers, dest="thread_counts", metavar="N,N", help="CPU threads (1,2)")
    parser.add_argument("--extras", type=_words, metavar="E,E", help="some of memory, modes, batch, start; or none")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="runs of each side in a cell (3)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="tokens of the prompt (128)")
    parser.add_argument("--canvas-length", type=int, default=256, metavar="N", help="positions of a canvas (256)")
    parser.add_argument("--fixed-steps", type=int, default=6, metavar="N", help="steps of a canvas (6)")


def _table(arguments: argparse.Namespace) -> None:
    from dgemma.bench.table import TableRun, TableSettings, markdown

    chosen = {
        "checkpoints": arguments.checkpoints, "formats": arguments.formats, "threads": arguments.thread_counts,
        "extras": () if arguments.extras == ("none",) else arguments.extras,
    }  # fmt: skip
    settings = TableSettings(
        **{name: values for name, values in chosen.items() if values is not None},
        canvas=arguments.canvas_length,
        prompt_tokens=arguments.prompt_tokens,
        fixed_steps=arguments.fixed_steps,
        repeats=arguments.repeats,
    )
    table = TableRun(Path(arguments.folder), settings, note).run()
    write(markdown(table))
    if table["failed"]:
        raise DgemmaError("; ".join(f"{cell} failed: {reason}" for cell, reason in table["failed"].items()))


_Add = Callable[[argparse.ArgumentParser], None]
_Job = Callable[[argparse.Namespace], Outcome | None]
_BENCHMARKS: tuple[tuple[str, str, str, _Add, _Job], ...] = (
    (
        "decode", "tokens per second, milliseconds per step and the share of this machine's floor",
        "Denoising, autoregression and transformers on the same weights, one prompt at a time, taking turns.",
        _add_decode, _decode,
    ),
    (
        "kernels", "time of each part of a step, beside its floor",
        "Where a denoising step and the prompt's pass spend their time.", _add_kernels, _kernels,
    ),
    (
        "memory", "resident memory, seen from outside",
        "A process for each side imports, loads and writes canvases; another one watches.", _add_memory, _memory,
    ),
    (
        "scaling", "cost as prompt, canvases, batch and vocabulary grow",
        "Our engine alone, on fixed steps.", _add_scaling, _scaling,
    ),
    ("start", "seconds from the start of a process to its first draft", "Our engine alone.", _add_start, _start),
    (bench_serve.NAME, bench_serve.HELP, bench_serve.DESCRIPTION, bench_serve.add_arguments, bench_serve.run),
    (bench_gpu.NAME, bench_gpu.HELP, bench_gpu.DESCRIPTION, bench_gpu.add_arguments, bench_gpu.run),
    ("make", "write a checkpoint of random weights to measure with", "Its text is noise.", _add_make, _make),
    (
        "table", "the whole table: every checkpoint, format and number of threads",
        "Every cell is a benchmark in a process of its own; what was interrupted goes on where it was.",
        _add_table, _table,
    ),
)  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in _words(text))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1 with commas between, got {text!r}")
    return numbers
