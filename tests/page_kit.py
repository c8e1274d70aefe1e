"""A real server in a thread and a real headless Chromium before it, for the tests and the pictures of the page."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgemma.api import LLM

MODELS = Path(__file__).resolve().parent.parent / "dgemma" / "models"
CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 120_000  # the machine may be busy with something else


def missing() -> str:
    """What the browser tests lack here; empty if nothing."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the Python package playwright is not installed"
    return "" if CHROMIUM else "there is no chromium here (Debian: apt-get install chromium)"


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[str]:
    """The address of a server with these `ServerConfig` settings, while the block runs."""
    import uvicorn

    from dgemma.server import ServerConfig, create_app

    app = create_app(llm, ServerConfig(**settings))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(60)


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def sse(*chunks: dict[str, Any]) -> str:
    """A stream of server-sent events, with its end."""
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


class Reader:
    """Somebody before the page: opens it with every other origin out of reach, writes, walks the steps."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.url = url
        self.outside: list[str] = []
        """Requests to other origins. They were stopped; there should be none."""
        self.faults: list[str] = []
        """Uncaught errors and what the security policy refused."""
        self.sent: list[dict[str, Any]] = []
        """Bodies of the requests for answers."""
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | context))
        self.context.set_default_timeout(PATIENCE_MS)
        self.context.route("**/*", self._gate)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._console)

    def _gate(self, route: Any) -> None:
        request = route.request
        if not request.url.startswith(self.url):
            self.outside.append(request.url)
            route.abort()
            return
        if request.method == "POST":
            self.sent.append(request.post_data_json | {"path": request.url.removeprefix(self.url)})
        route.continue_()

    def _console(self, message: Any) -> None:
        if message.type == "error" and "Security" in message.text:
            self.faults.append(message.text)

    def open(self, ready: str = "#send:not([disabled])") -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector(ready)

    def set(self, **values: Any) -> None:
        """Settings of the sampler panel, by the name of their field."""
        self.page.click("#open-sampler")
        for name, value in values.items():
            control = self.page.locator(f"#set-{name}")
            if isinstance(value, bool):
                control.set_checked(value)
            elif control.evaluate("one => one.tagName") == "SELECT":
                control.select_option(str(value))
            else:
                control.fill("" if value is None else str(value))
                control.dispatch_event("change")
        self.page.click("#close-sampler")

    def ask(self, text: str) -> None:
        """Send a message and wait for the end of the answer."""
        self.page.fill("#input", text)
        self.page.keyboard.press("Enter")
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector(".turn:last-child .answer:not([aria-busy])")
        self.page.wait_for_selector("#send:visible")

    def show(self, canvas: int, step: int) -> None:
        """Show a canvas at a step (indices from 0) of the last answer."""
        radios = self.page.locator(".turn:last-child .canvases input")
        if radios.count() > 1:
            radios.nth(canvas).check(force=True)
        self.page.locator(".turn:last-child .steps").fill(str(step))

    def cells(self) -> list[dict[str, Any]]:
        """What the cells of the last answer look like: text, colour of the heat, the marks."""
        return self.page.locator(".turn:last-child .grid .cell").evaluate_all(
            """cells => cells.map(cell => { const look = getComputedStyle(cell); return {
              text: cell.textContent, colour: look.borderBottomColor,
              accepted: look.outlineStyle === "solid" && parseFloat(look.outlineWidth) > 0,
              corrected: cell.classList.contains("corrected") } })"""
        )

    def record(self) -> dict[str, Any]:
        """The last answer as the page keeps it."""
        return self.page.evaluate(
            """() => Object.entries(localStorage).filter(([key]) => key.startsWith("dgemma.conversation."))
              .map(([, value]) => JSON.parse(value)).sort((a, b) => b.updated - a.updated)[0].turns.at(-1).answer"""
        )
