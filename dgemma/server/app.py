"""The application: every route over one model, behind one gate."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from dgemma import __version__
from dgemma.api import LLM
from dgemma.server import chat, completions, docs, errors, infill, models, page, responses, systemone
from dgemma.server.config import ServerConfig
from dgemma.server.security import Gate
from dgemma.server.service import Service

_DESCRIPTION = """\
OpenAI's API over a block-diffusion language model. What OpenAI's schema has and this server cannot do is answered
with 400 and a reason. `dgemma` holds what only a diffusion model has.
"""


def create_app(llm: LLM, config: ServerConfig | None = None) -> FastAPI:
    """An ASGI application that serves `llm`. `app.state.service` is what its routes share."""
    config = config or ServerConfig()
    service = Service(llm, config)
    app = FastAPI(title="dgemma", version=__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    for part in (chat, completions, responses, infill, systemone, models):
        app.include_router(part.router)
    page.mount(app)
    docs.mount(app)
    app.add_middleware(Gate, service=service)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
