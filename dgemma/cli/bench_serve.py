"""`dgemma bench serve`: a server under a mix of requests, every answer compared with the same request alone."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_KEY_VARIABLE = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, metavar="N", help="requests of the mix (200; with --table 64)")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="clients at once (16)")
    parser.add_argument("--mix-seed", type=int, default=0, metavar="N", help="of the mix (0)")
    parser.add_argument("--longest-prompt", type=int, default=2000, metavar="N", help="tokens (2000)")
    parser.add_argument(
        "--table", action="store_true", help="1, 8 and 64 streams at once, each with and without batching"
    )
    parser.add_argument(
        "--resume", action="store_true", help="with --table and --json FILE: only the rows that FILE does not have"
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
    if arguments.resume and not (arguments.table and arguments.json not in (None, "-")):
        raise RequestError("--resume goes on with the rows of a table in a file: it needs --table and --json FILE")
    if arguments.table and arguments.requests is not None and arguments.requests < max(_TABLE):
        raise RequestError(f"--table needs at least {max(_TABLE)} requests for {max(_TABLE)} streams at once")
    if arguments.url and (arguments.max_rows or arguments.kv_bytes):
        raise RequestError("--max-rows and --kv-bytes are for a server that is started: they go without --url")
    usual = 64 if arguments.table else 200
    mix = MixSettings(
        requests=usual if arguments.requests is None else arguments.requests,
        seed=arguments.mix_seed,
        longest_prompt=arguments.longest_prompt,
    )
    reports = _table(arguments, mix) if arguments.table else [_one(arguments, mix)]
    lost, wrong = sum(report["lost"] for report in reports), sum(len(report["wrong"]) for report in reports)
    if lost or wrong:
        raise DgemmaError(f"{lost} answers were lost and {wrong} are not what the same request gets alone")


def _one(arguments: argparse.Namespace, mix: MixSettings) -> dict[str, Any]:
    from dgemma.bench.load_report import load_plot, load_tables

    with _Bench(arguments, mix) as bench:
        report = bench.measured(arguments.concurrency, arguments.max_rows)
    data = report.json()
    deliver(arguments, Outcome(data, load_tables(report), lambda: load_plot(report)))
    return data


def _table(arguments: argparse.Namespace, mix: MixSettings) -> list[Mapping[str, Any]]:
    from dgemma.bench import load_table as table

    # Everybody stays and streams, so that the rows differ in nothing but who shares a pass.
    mix = replace(mix, cancelled=0.0, stopped=0.0, streamed=1.0, chat=0.0)
    file = Path(arguments.json) if arguments.json not in (None, "-") else None
    rows: dict[str, Mapping[str, Any]] = {}
    with _Bench(arguments, mix) as bench:
        if file and arguments.resume:
            rows |= table.kept(file, bench.facts)
        for count in _TABLE:
            for kind, places in ((table.BATCHING, arguments.max_rows), (table.ALONE, 1)):
                name = table.row_name(count, kind)
                if name not in rows:
                    rows[name] = bench.measured(count, places).json()
                    if file:  # after every row: whoever is cut off goes on from here
                        table.save(file, rows)
    if arguments.json == "-":
        deliver(arguments, Outcome(table.table_json(rows), ()))
    else:
        write(f"{table.absolute(rows)}\n{table.ratios(rows)}")
    return list(rows.values())


class _Bench:
    """A context: the model that answers alone, and a server for each run."""

    def __init__(self, arguments: argparse.Namespace, mix: MixSettings) -> None:
        self._arguments, self._mix = arguments, mix
        self._known: dict[Item, Expected] | None = None if arguments.no_check else {}

    def __enter__(self) -> _Bench:
        from dgemma.api import LLM
        from dgemma.bench.serve import ALONE

        chosen = self._chosen = settings_of(self._arguments)
        with contextlib.ExitStack() as stack:
            self._say: Callable[[str], object] = stack.enter_context(telling())
            self._say(f"loading {chosen.model}")
            self._llm = LLM.load(chosen.model, **chosen.loading, engine=chosen.engine(ALONE))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def facts(self) -> dict[str, Any]:
        """What two rows must have in common to be compared."""
        from dgemma.bench.machine import Machine

        machine = asdict(Machine.of(self._llm.device, self._llm.dtype))
        compared = self._known is not None
        return {"model": self._llm.name, "mix": asdict(self._mix), "machine": machine, "compared": compared}

    def measured(self, concurrency: int, rows: int | None) -> LoadReport:
        """A run with so many clients at once, against a server with so many rows."""
        from dgemma.bench.serve import run_load
        from dgemma.bench.server_process import ServerProcess

        arguments = self._arguments
        key = os.environ.get(_KEY_VARIABLE) if arguments.url else None
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with contextlib.ExitStack() as stack:
            self._say("starting the server")
            flags = _flags(self._chosen, concurrency, {"max-rows": rows, "kv-bytes": arguments.kv_bytes})
            url = arguments.url or stack.enter_context(ServerProcess(self._chosen.model, flags)).url
            return run_load(self._llm, url, self._mix, concurrency, headers=headers, known=self._known, say=self._say)


def _flags(chosen: Settings, concurrency: int, engine: Mapping[str, int | None]) -> list[str]:
    given = {**engine, **chosen.loading, "kv-cache-dtype": chosen.kv_cache_dtype}
    # None of the clients may be told to come again for want of a place to wait.
    given["max-waiting"] = max(64, concurrency)
    return [f"--{name}={value}" for name, value in given.items() if value is not None]
