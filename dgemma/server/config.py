"""How a server listens, whom it lets in and how much it takes on. Knows no web framework."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dgemma.config import is_whole
from dgemma.errors import ConfigError

KEYS_VARIABLE = "DGEMMA_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one server. A value that cannot be used is a `ConfigError` that names it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    """Whoever shows one of them is let in; none: everybody is."""
    max_body_bytes: int = 2_000_000
    max_waiting: int = 64
    """Answers that wait for a place in the engine, beyond those that run; one more is told 429."""
    timeout_s: float = 600.0
    """Longest time from a request to the end of its answer."""
    drain_s: float = 30.0
    """How long running answers may go on after SIGTERM."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which it may be called, `*` for every one. A server on a loopback address knows its own ones, too."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser; `*` is every one."""
    log_prompts: bool = False
    trace_folder: Path | None = None
    """Where recorded traces are kept; None: in memory."""
    traces_kept: int = 64

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65_535),
            ("max_body_bytes", 1, None),
            ("max_waiting", 0, None),
            ("traces_kept", 0, None),
        ):
            value = getattr(self, name)
            if not is_whole(value, low, high):
                span = f"of at least {low}" if high is None else f"in {low}..{high}"
                raise ConfigError(f"{name} must be a whole number {span}, got {value!r}")
        for name, open_low in (("timeout_s", True), ("drain_s", False)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (open_low and value == 0):
                raise ConfigError(
                    f"{name} must be a number {'more than' if open_low else 'of at least'} 0, got {value!r}"
                )
        if not self.host:
            raise ConfigError("host must be an address or a name, got ''")
        for key in self.api_keys:
            _check_key(key, "api_keys")
        for name in self.allowed_hosts:
            if name != "*" and (not name or name != host_name(name)):
                raise ConfigError(f"an allowed host is * or a lower-case name or address without port, got {name!r}")
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
                raise ConfigError(f"an origin is * or like https://host:port, got {origin!r}")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def answers_to(self, host: str) -> bool:
        """Whether a request with this `Host` was meant for this server.

        A page whose name was made to point at this machine (DNS rebinding) comes with that name. A server that
        other machines reach has names that it cannot know, so it asks only if it was told them.
        """
        if "*" in self.allowed_hosts or not (self.is_local or self.allowed_hosts):
            return True
        name = host_name(host)
        return name in self.allowed_hosts or _is_loopback(name)


def host_name(host: str) -> str:
    """The name or address in a `Host` header, without port and brackets, in lower case."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::\d*)?", host.strip().lower())
    return (found[1] or found[2]) if found else host.strip().lower()


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_keys(path: str | Path | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """API keys of a file (one a line, `#` begins a comment) and of `DGEMMA_API_KEYS` (with commas between them)."""
    keys = [key for part in environ.get(KEYS_VARIABLE, "").split(",") if (key := part.strip())]
    for key in keys:
        _check_key(key, KEYS_VARIABLE)
    if path is not None:
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"the key file {str(path)!r} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"the key file {str(path)!r} is not UTF-8") from None
        found = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
        if not found:
            raise ConfigError(f"the key file {str(path)!r} holds no key")
        for key in found:
            _check_key(key, f"the key file {str(path)!r}")
        keys += found
    return tuple(dict.fromkeys(keys))


def _check_key(key: str, where: str) -> None:
    # The value itself must not reach a log or a terminal.
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: a key consists of printable ASCII characters without spaces")
