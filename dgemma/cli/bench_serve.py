"""`dgemma bench serve`: a server under a mix of requests, every answer compared with the same request alone."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dgemma.cli.arguments import add_loading, settings_of
from dgemma.cli.output import write
from dgemma.cli.report import Outcome, add_output, deliver, telling
from dgemma.errors import ConfigError, DgemmaError, RequestError
from dgemma.settings import Settings

if TYPE_CHECKING:
    from dgemma.bench.load_mix import Expected, Item, MixSettings
    from dgemma.bench.serve import LoadReport

NAME = "serve"
HELP = "a server under load: throughput, latencies, memory, and whether each answer is right"
DESCRIPTION = (
    "Starts a server in a process of its own (or takes the one at --url), sends it a reproducible mix of requests and "
    "answers each again alone. Exit status 2 if an answer was lost or wrong."
)
_TABLE = (1, 8, 64)
_TABLE_FORMAT = "dgemma-bench-serve-table"
_KEY_VARIABLE = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, metavar="N", help="requests of the mix (200; with --table 64)")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="clients at once (16)")
    parser.add_argument("--mix-seed", type=int, default=0, metavar="N", help="of the mix (0)")
    parser.add_argument("--longest-prompt", type=int, default=2000, metavar="N", help="tokens (2000)")
    parser.add_argument(
        "--table", action="store_true", help="1, 8 and 64 streams at once, each with and without batching"
    )
    parser.add_argument("--max-rows", type=int, metavar="N", help="of the server that is started")
    parser.add_argument("--kv-bytes", type=int, metavar="N", help="of the server that is started")
    parser.add_argument("--url", metavar="URL", help="a running server of the same model; OPENAI_API_KEY is its key")
    parser.add_argument("--no-check", action="store_true", help="do not answer the requests again")
    add_output(parser, plot=True)
    add_loading(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measure and deliver; then a `DgemmaError` if the server lost an answer or gave a wrong one."""
    from dgemma.bench.load_mix import MixSettings

    if importlib.util.find_spec("httpx") is None:
        raise ConfigError("dgemma bench serve needs httpx: pip install 'dgemma[serve]'")
    if arguments.table and (arguments.url or arguments.plot):
        raise RequestError("--table starts its own servers and draws no chart: it takes no --url and no --plot")
    if arguments.url and (arguments.max_rows or arguments.kv_bytes):
        raise RequestError("--max-rows and --kv-bytes are for a server that is started: they go without --url")
    usual = 64 if arguments.table else 200
    mix = MixSettings(
        requests=usual if arguments.requests is None else arguments.requests,
        seed=arguments.mix_seed,
        longest_prompt=arguments.longest_prompt,
    )
    reports = _table(arguments, mix) if arguments.table else _one(arguments, mix)
    lost, wrong = sum(report.lost for report in reports), sum(len(report.wrong) for report in reports)
    if lost or wrong:
        raise DgemmaError(f"{lost} answers were lost and {wrong} are not what the same request gets alone")


def _one(arguments: argparse.Namespace, mix: MixSettings) -> list[LoadReport]:
    from dgemma.bench.load_report import load_plot, load_tables

    (report,) = _measured(arguments, mix, {"": (arguments.concurrency, arguments.max_rows)}).values()
    deliver(arguments, Outcome(report.json(), load_tables(report), lambda: load_plot(report)))
    return [report]


def _table(arguments: argparse.Namespace, mix: MixSettings) -> list[LoadReport]:
    from dgemma.bench.load_report import markdown

    # Everybody stays and streams, so that the rows differ in nothing but who shares a pass.
    mix = replace(mix, cancelled=0.0, stopped=0.0, streamed=1.0, chat=0.0)
    kinds = {"batching": arguments.max_rows, "one at a time": 1}
    runs = {f"{count}, {name}": (count, rows) for count in _TABLE for name, rows in kinds.items()}
    reports = _measured(arguments, mix, runs)
    rows_json = {name: report.json() for name, report in reports.items()}
    deliver(arguments, Outcome({"format": _TABLE_FORMAT, "version": 1, "rows": rows_json}, ()))
    if arguments.json != "-":
        write(markdown(reports))
    return list(reports.values())


def _measured(
    arguments: argparse.Namespace, mix: MixSettings, runs: Mapping[str, tuple[int, int | None]]
) -> dict[str, LoadReport]:
    """Reports of runs, each with its clients at once and the rows of its server."""
    from dgemma.api import LLM
    from dgemma.bench.serve import ALONE, run_load
    from dgemma.bench.server_process import ServerProcess

    chosen = settings_of(arguments)
    key = os.environ.get(_KEY_VARIABLE) if arguments.url else None
    headers = {"authorization": f"Bearer {key}"} if key else {}
    known: dict[Item, Expected] | None = None if arguments.no_check else {}
    reports = {}
    with telling() as say:
        say(f"loading {chosen.model}")
        llm = LLM.load(chosen.model, device=chosen.device, dtype=chosen.dtype, threads=chosen.threads, engine=ALONE)
        for name, (concurrency, rows) in runs.items():
            with contextlib.ExitStack() as stack:
                say("starting the server")
                flags = _flags(chosen, concurrency, {"max-rows": rows, "kv-bytes": arguments.kv_bytes})
                url = arguments.url or stack.enter_context(ServerProcess(chosen.model, flags)).url
                reports[name] = run_load(llm, url, mix, concurrency, headers=headers, known=known, say=say)
    return reports


def _flags(chosen: Settings, concurrency: int, engine: Mapping[str, int | None]) -> list[str]:
    given = {**engine, "device": chosen.device, "dtype": chosen.dtype, "threads": chosen.threads}
    # None of the clients may be told to come again for want of a place to wait.
    given["max-waiting"] = max(64, concurrency)
    return [f"--{name}={value}" for name, value in given.items() if value is not None]
