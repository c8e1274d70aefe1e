"""Serve a model over HTTP: OpenAI's API with drafts, traces and metrics, and a page where one watches the canvas."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.cli.arguments import add_loading, settings_of
from dgemma.cli.output import note, write
from dgemma.cli.running import load
from dgemma.config import EngineConfig
from dgemma.errors import ConfigError
from dgemma.settings import Settings

if TYPE_CHECKING:
    from dgemma.api import LLM
    from dgemma.server import ServerConfig

NAME = "serve"
HELP = "serve a model over HTTP: OpenAI's API and a web page"
ENGINES = ("dgemma", "vllm")
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (8000)")
    group.add_argument(
        "--api-key-file", metavar="FILE", help="keys that are let in, one a line; also DGEMMA_API_KEYS, with commas"
    )
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a name by which it may be called, beside localhost; * is every one; repeatable",
    )  # fmt: skip
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="a page's origin that may call; repeatable"
    )
    group.add_argument("--max-waiting", type=int, default=64, metavar="N", help="answers that may wait (64)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (600)")
    group.add_argument("--drain", type=float, default=30.0, metavar="S", help="seconds to end in after SIGTERM (30)")
    group.add_argument("--max-body", type=int, default=2_000_000, metavar="BYTES", help="of a request (2000000)")
    group.add_argument("--log-prompts", action="store_true", help="log the prompts, too")
    group.add_argument("--trace-folder", metavar="DIR", help="keep recorded traces there instead of in memory")
    group.add_argument("--traces-kept", type=int, default=64, metavar="N", help="how many, the newest (64)")
    group = parser.add_argument_group("engine")
    group.add_argument("--max-rows", type=int, default=64, metavar="N", help="answers that advance together (64)")
    group.add_argument("--kv-bytes", type=int, default=0, metavar="BYTES", help="of keys and values; 0: no limit")
    group = parser.add_argument_group("more than one")
    group.add_argument("--replicas", type=int, metavar="N", help="copies of the model, on Ray Serve")
    group.add_argument("--max-replicas", type=int, metavar="N", help="scale up to so many under load")
    group.add_argument("--address", metavar="URL", help="a running Ray cluster for the replicas")
    group.add_argument("--engine", choices=ENGINES, default="dgemma", metavar="{dgemma,vllm}", help="who computes")
    group.add_argument("--vllm-args", default="", metavar="TEXT", help="more arguments of `vllm serve`")


def run(arguments: argparse.Namespace) -> int:
    config, settings = config_of(arguments), settings_of(arguments)
    if not config.is_local and not config.api_keys:
        note(f"dgemma: warning: {config.host} can be reached from other machines, and no API key is asked for")
    if arguments.engine == "vllm":
        return _serve_vllm(arguments, settings, config)
    if arguments.vllm_args:
        raise ConfigError("--vllm-args needs --engine vllm")
    _check_installed()
    if arguments.replicas is not None:
        return _serve_replicas(arguments, settings, config)
    if arguments.max_replicas is not None or arguments.address is not None:
        raise ConfigError("--max-replicas and --address need --replicas")
    return _serve(arguments, settings, config)


def config_of(arguments: argparse.Namespace) -> ServerConfig:
    """The server's settings; faults that can be found without a model are found here."""
    from dgemma.server.config import ServerConfig, read_keys

    folder = None if arguments.trace_folder is None else Path(arguments.trace_folder).expanduser()
    config = ServerConfig(
        host=arguments.host,
        port=arguments.port,
        api_keys=read_keys(arguments.api_key_file, os.environ),
        max_body_bytes=arguments.max_body,
        max_waiting=arguments.max_waiting,
        timeout_s=arguments.timeout,
        drain_s=arguments.drain,
        allowed_hosts=tuple(name.lower() for name in arguments.allowed_host),
        cors_origins=tuple(arguments.cors_origin),
        log_prompts=arguments.log_prompts,
        trace_folder=folder,
        traces_kept=arguments.traces_kept,
    )
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the trace folder {str(folder)!r} cannot be made: {error.strerror}") from None
    return config


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the server needs {', '.join(missing)}: pip install 'dgemma[serve]'")


def _serve(arguments: argparse.Namespace, settings: Settings, config: ServerConfig) -> int:
    from dgemma.server.sockets import listen

    with listen(config) as listener:  # before the model is loaded: a port in use is told at once
        from dgemma.server.run import serve

        llm = load(settings, _engine(arguments, config))
        llm.generation = llm.generation.with_(**settings.of_requests)
        serve(llm, config, listener, announce=lambda url: _greet(llm, url))
    return 0


def _engine(arguments: argparse.Namespace, config: ServerConfig) -> EngineConfig:
    usual, held = EngineConfig(), arguments.max_rows + config.max_waiting
    return replace(
        usual,
        max_batch_rows=arguments.max_rows,
        kv_bytes=arguments.kv_bytes,
        max_requests=max(usual.max_requests, held),
    )


def _greet(llm: LLM, url: str) -> None:
    where = f"{llm.name} · {str(llm.dtype).removeprefix('torch.')} on {llm.device}"
    if not sys.stdout.isatty():
        write(f"{where}, at {url}\n")
        return
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from dgemma.cli.terminal import console

    rows = Table.grid(padding=(0, 2))
    for name, value in (
        ("page", f"{url}/"),
        ("API", f"{url}/v1"),
        ("its fields", f"{url}/docs"),
        ("metrics", f"{url}/metrics"),
    ):
        rows.add_row(Text(name, style="dim"), Text(value))
    console().print(Panel.fit(rows, title=where, title_align="left", subtitle="ctrl-C ends", subtitle_align="left"))


def _serve_replicas(arguments: argparse.Namespace, settings: Settings, config: ServerConfig) -> int:
    from dgemma.server.replicas import ReplicaConfig, serve_replicas

    scale = ReplicaConfig(
        replicas=arguments.replicas,
        max_replicas=arguments.max_replicas,
        address=arguments.address,
        engine=_engine(arguments, config),
    )
    serve_replicas(settings, config, scale, announce=_tell)
    return 0


def _serve_vllm(arguments: argparse.Namespace, settings: Settings, config: ServerConfig) -> int:
    from dgemma.server.vllm import serve_vllm

    usual: dict[str, object] = {
        "replicas": None,
        "max_replicas": None,
        "address": None,
        "max_rows": 64,
        "kv_bytes": 0,
        "allowed_host": [],
        "kv_cache_dtype": "auto",
        "drafter": None,
    }
    chosen = {**vars(arguments), "kv_cache_dtype": settings.kv_cache_dtype, "drafter": settings.drafter}
    for name, value in usual.items():
        if chosen[name] != value:
            raise ConfigError(f"--{name.replace('_', '-')} is for dgemma's own server, not for --engine vllm")
    try:
        extra = tuple(shlex.split(arguments.vllm_args))
    except ValueError as error:
        raise ConfigError(f"--vllm-args cannot be split into words: {error}") from None
    return serve_vllm(settings, config, extra=extra, announce=_tell)


def _tell(line: str) -> None:
    write(f"{line}\n")
