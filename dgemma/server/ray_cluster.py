"""Importing Ray where it is needed, and a Ray of our own on this machine or a running one. Knows no models."""

from __future__ import annotations

import logging
import os
from typing import Any

from dgemma.errors import ConfigError

_TRIES = 3  # Ray gives its own start half a minute, which a busy machine may not keep
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray would report to its makers
    "RAY_DEDUP_LOGS": "0",  # every line of a log is one of ours, and none is left out
    "RAY_COLOR_PREFIX": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "55",  # 5 s are too few for a busy machine; Ray gives up at 60
}


def import_ray(what: str) -> Any:
    """The module; a `ConfigError` that says what needs it where it is missing."""
    for name, value in _DEFAULTS.items():  # read when it is imported
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
        import ray.serve
    except ImportError as error:
        raise ConfigError(f"{what} needs the package ray: pip install 'dgemma[ray]' ({error})") from None
    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return ray


def start_ray(ray: Any, address: str | None, *, cpus: int, object_store_bytes: int, logs: bool) -> bool:
    """Connect to a cluster, or start one with so many logical CPUs. False if this process had one already.

    `logs` shows what the processes of the cluster write on this one's standard error.
    """
    if ray.is_initialized():
        return False
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {"num_cpus": cpus, "object_store_memory": object_store_bytes, "include_dashboard": False}
    for left in reversed(range(_TRIES if address is None else 1)):
        try:
            ray.init(**where, log_to_driver=logs, logging_level=logging.ERROR)
            break
        except Exception as error:  # of many kinds: no such cluster, no memory, a machine that is too busy
            ray.shutdown()
            if not left:
                text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise ConfigError(f"Ray does not start: {text}") from None
    for name in ("ray", "ray.data", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return True
