"""The web page: a chat that shows its canvases. Serves the files of `page/` at `/` and `/page/`, nothing else.

The page uses the public HTTP API only, so this file knows neither models nor requests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Everything from here, no inline code, no frame around it; text can reach the document as text only.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # Ask each time: a new version must not meet half of an old one.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    type: str
    etag: str


def mount(app: FastAPI) -> None:
    """Add the page's routes to `app`. The files are read once, here."""
    files = {path.name: _read(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}

    async def index(request: Request) -> Response:
        return _answer(files["index.html"], request)

    async def part(name: str, request: Request) -> Response:
        if name not in files:
            return Response(status_code=404, headers=_HEADERS)
        return _answer(files[name], request)

    for path, route in (("/", index), ("/page/{name}", part)):
        app.add_api_route(path, route, methods=["GET", "HEAD"], include_in_schema=False)


def _read(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _answer(file: _File, request: Request) -> Response:
    headers = {**_HEADERS, "etag": file.etag}
    known = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.type, headers=headers)
