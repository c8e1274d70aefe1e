"""`dgemma serve --replicas N`: the same server in several processes or machines, as deployments of Ray Serve.

A front (replica_front.py) takes the requests; each replica behind it holds one `LLM` and answers through `create_app`.
Ray Serve starts, watches, replaces and scales them. Knows nothing of the API itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from dgemma.checkpoint.files import CONFIG, find_folder, read_json
from dgemma.config import EngineConfig, ModelConfig, is_whole
from dgemma.errors import ConfigError
from dgemma.server.config import ServerConfig
from dgemma.server.ray_cluster import import_ray, start_ray
from dgemma.server.replica import Build, Replica, build_app
from dgemma.server.replica_front import Front
from dgemma.settings import Settings

_QUIET = {"log_level": "ERROR", "enable_access_log": False}
_CONSTRUCTOR_TRIES = 2
_POLL_S = 0.2
APPLICATION, FRONT, REPLICA = "dgemma", "dgemma-front", "dgemma-replica"
_SPARE_REQUESTS = 16  # beyond what the engine takes: /health and the like, and those that are told 429


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How many replicas, and where."""

    replicas: int = 2
    """Copies of the model; the least number of them where `max_replicas` is more."""
    max_replicas: int | None = None
    """Scale up to so many under load, and back. None keeps `replicas`."""
    requests_per_replica: int = 16
    """Running requests per replica that scaling aims at."""
    health_period_s: float = 5.0
    """How often a replica is asked whether it is well; one that is not is replaced."""
    address: str | None = None
    """A running Ray cluster (`auto`, `host:6379`); None starts one on this machine."""
    object_store_bytes: int = 200_000_000
    """Shared memory of a Ray that is started here."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What each replica takes on at once."""

    def __post_init__(self) -> None:
        for name, low in (("replicas", 1), ("requests_per_replica", 1), ("object_store_bytes", 80_000_000)):
            value = getattr(self, name)
            if not is_whole(value, low):
                raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas must be at least replicas ({self.replicas}), got {self.max_replicas!r}")
        if not self.health_period_s > 0:
            raise ConfigError(f"health_period_s must be more than 0, got {self.health_period_s!r}")

    @property
    def most(self) -> int:
        return self.max_replicas or self.replicas


class Replicas:
    """A context manager: the replicas run and listen while it lasts. Leaving it drains them."""

    def __init__(
        self,
        settings: Settings,
        config: ServerConfig,
        scale: ReplicaConfig,
        build: Build = build_app,
    ) -> None:
        self._settings, self._config, self._scale, self._build = settings, config, scale, build
        self._edition = 0
        self._own = False

    @property
    def url(self) -> str:
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"http://{host}:{self._config.port}"

    def __enter__(self) -> Replicas:
        ray = import_ray("--replicas")
        from ray import serve

        self._config = replace(self._config, port=_check_port(self._config))
        # Logical CPUs: room for every replica, and for one more while they are replaced.
        cpus, scale = (self._scale.most + 1) * self._cpus() + 1, self._scale
        self._own = start_ray(ray, scale.address, cpus=cpus, object_store_bytes=scale.object_store_bytes, logs=True)
        try:
            serve.start(
                proxy_location="EveryNode" if self._scale.address else "HeadOnly",
                http_options={"host": self._config.host, "port": self._config.port},
                logging_config=_QUIET,
            )
            self._deploy()
        except (RuntimeError, ray.exceptions.RayError) as error:
            reason = _reason(_status() or str(error))
            self._stop()
            raise ConfigError(f"the replicas do not start: {reason}") from None
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drain()
        self._stop()

    def drain(self, at_once: Callable[[], bool] = lambda: False) -> None:
        """Take no new requests and wait for the running ones; after `drain_s`, or when told, they are cut."""
        from ray import serve

        with contextlib.suppress(Exception):  # a front that is gone has no requests
            front = serve.get_app_handle(APPLICATION)
            drained = front.drain.remote(self._config.drain_s)
            while not at_once():
                with contextlib.suppress(TimeoutError):
                    drained.result(timeout_s=_POLL_S)
                    return
            front.drain.remote(0.0).result(timeout_s=10.0)

    def restart(self) -> None:
        """Replace the replicas one after the other by new ones that load the model again; returns when done."""
        self._edition += 1
        self._deploy()

    def _stop(self) -> None:
        import ray
        from ray import serve

        # Ray tells at length, on standard error, of the actors that end here.
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(Exception),
        ):
            if self._scale.address or not self._own:
                serve.delete(APPLICATION)  # the cluster may serve others, too
            if self._own:
                ray.shutdown()

    def _cpus(self) -> int:
        return self._settings.threads or max(1, (os.cpu_count() or 1) // self._scale.most)

    def _deploy(self) -> None:
        from ray import serve

        scale, drain = self._scale, max(self._config.drain_s, 0.01)
        cpus = self._cpus()
        number: dict[str, Any] = {"num_replicas": scale.replicas}
        if scale.most > scale.replicas:
            number = {
                "autoscaling_config": {
                    "min_replicas": scale.replicas,
                    "max_replicas": scale.most,
                    "target_ongoing_requests": scale.requests_per_replica,
                }
            }
        common: dict[str, Any] = {
            "graceful_shutdown_timeout_s": drain,
            "graceful_shutdown_wait_loop_s": 0.2,
            "health_check_period_s": scale.health_period_s,
            "health_check_timeout_s": max(30.0, scale.health_period_s),
            "logging_config": _QUIET,
        }
        replicas = serve.deployment(
            name=REPLICA,
            ray_actor_options={"num_cpus": cpus, "num_gpus": int(_wants_gpu(self._settings.device))},
            max_ongoing_requests=self._config.max_waiting + scale.engine.max_batch_rows + _SPARE_REQUESTS,
            max_constructor_retry_count=_CONSTRUCTOR_TRIES,
            **number,
            **common,
        )(Replica).bind(self._build, replace(self._settings, threads=cpus), self._config, scale.engine, self._edition)
        front = serve.deployment(
            name=FRONT, num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100_000, **common
        )(serve.ingress(None)(_Ingress)).bind(replicas, self._config.max_body_bytes)
        serve.run(front, name=APPLICATION, route_prefix="/", logging_config=_QUIET)


class _Ingress:
    """The deployment that Ray Serve's HTTP proxy talks to."""

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._front = Front(replicas, max_body_bytes)

    def __serve_build_asgi_app__(self) -> Any:
        return self._front

    async def drain(self, seconds: float) -> int:
        return await self._front.drain(seconds)


def serve_replicas(
    settings: Settings,
    config: ServerConfig,
    scale: ReplicaConfig,
    *,
    announce: Callable[[str], object] = lambda line: None,
    build: Build = build_app,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second one ends at once. SIGHUP replaces the replicas in turn.

    Raises `ConfigError` without Ray, for an address that is taken and for a model that does not load.
    """
    _check_model(settings)
    heard: queue.SimpleQueue[int] = queue.SimpleQueue()
    with Replicas(settings, config, scale, build) as replicas:
        _listen_to_signals(heard.put)
        announce(f"{scale.replicas} replicas listen on {replicas.url}")
        while heard.get() == signal.SIGHUP:
            announce("replacing the replicas one after the other")
            replicas.restart()
            announce("all replicas are new")
        announce("draining; a second signal ends at once")
        replicas.drain(lambda: not heard.empty())


def _listen_to_signals(tell: Callable[[int], object]) -> None:
    """SIGTERM, SIGINT and SIGHUP are told and do nothing else from here on."""
    # To the very end: an impatient third ctrl-C must not leave processes of Ray behind.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, frame: tell(got))


def _check_model(settings: Settings) -> None:
    """Find here what every replica would find, one after the other; a model of the hub is fetched once."""
    folder, _ = find_folder(settings.model)
    ModelConfig.from_hf(read_json(folder / CONFIG))


def _check_port(config: ServerConfig) -> int:
    """The port, or a free one for 0. Ray Serve would tell of a taken port a minute later, and not in one line."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
            return int(probe.getsockname()[1])
        except OSError as error:
            raise ConfigError(f"{config.host} port {config.port} cannot be used: {error.strerror or error}") from None


def _status() -> str:
    """What Ray Serve says of the replicas; the exception of a failed start does not say why."""
    from ray import serve

    with contextlib.suppress(Exception):
        return serve.status().applications[APPLICATION].deployments[REPLICA].message
    return ""


def _reason(text: str) -> str:
    """The line that names the exception at the end of a traceback, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"[\w.]*(Error|Exception)(:|$)", line)]
    return (telling or lines or ["no reason given"])[-1]


def _wants_gpu(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
