"""The HTTP server: OpenAI's API over one `LLM`, with drafts, traces and a page. The only room that knows HTTP.

`create_app(llm, config)` gives an ASGI application, `serve(llm, config)` runs it until it is told to stop.
"""

from typing import Any

from dgemma.server.config import ServerConfig

__all__ = ["ServerConfig", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    # Late, so that what needs no web framework (batches, vLLM) does not ask for one.
    if name == "create_app":
        from dgemma.server.app import create_app

        return create_app
    if name == "serve":
        from dgemma.server.run import serve

        return serve
    raise AttributeError(f"module 'dgemma.server' has no attribute {name!r}")
