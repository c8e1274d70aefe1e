"""Pictures of the page for the documentation: first, middle and last step, desktop and phone, light and dark.

Starts a server with the shipped model and a headless Chromium; writes docs/figures/page-*.png.

    python scripts/page_screenshots.py [FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import page_kit  # noqa: E402

from dgemma.api import LLM  # noqa: E402

PROMPT, SEED = "Tell me a story about a fox.", 2
LIMIT = 150_000  # bytes of a picture
DESKTOP = {"viewport": {"width": 1120, "height": 860}}
SMALL = {"viewport": {"width": 1120, "height": 700}}
LOW = {"viewport": {"width": 1120, "height": 640}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "is_mobile": True, "has_touch": True}
# Name, screen, colours, share of the first canvas's steps (None: the welcome), and whether the sampler is open.
PICTURES: tuple[tuple[str, dict[str, Any], str, float | None, bool], ...] = (
    ("desktop-welcome", SMALL, "light", None, False),
    ("desktop-first", DESKTOP, "light", 0.0, False),
    ("desktop-middle", DESKTOP, "light", 0.5, False),
    ("desktop-end", DESKTOP, "light", 1.0, False),
    ("desktop-sampler", SMALL, "dark", 0.3, True),
    ("phone-first", PHONE, "dark", 0.0, False),
    ("phone-middle", PHONE, "dark", 0.5, False),
    ("phone-end", PHONE, "light", 1.0, False),
)


def take(reader: page_kit.Reader, share: float | None, sampler: bool, path: Path) -> None:
    reader.open()
    if share is not None:
        reader.set(seed=SEED)
        reader.ask(PROMPT)
        steps = reader.page.locator(".steps")
        reader.show(0, 0)
        reader.show(0, round(share * int(steps.get_attribute("max") or 0)))
        reader.page.evaluate("scrollTo(0, document.body.scrollHeight)")
        reader.page.evaluate("document.activeElement.blur()")
        reader.page.mouse.move(0, 0)
    if sampler:
        reader.page.click("#open-sampler")
    reader.page.wait_for_timeout(600)  # the scroll bar of a touch screen fades
    reader.page.screenshot(path=path)


def take_doubts(reader: page_kit.Reader, path: Path) -> None:
    """An answer that had too few steps, with one of its words in doubt focused."""
    reader.open()
    reader.set(seed=1, steps=12, max_tokens=128)
    reader.ask("Tell me a story.")
    reader.page.click(".answer .actions button:has-text('Canvas')")
    reader.page.focus(".answer .doubt[tabindex='0']")
    for _ in range(2):
        reader.page.keyboard.press("ArrowRight")
    reader.page.mouse.move(0, 0)
    reader.page.screenshot(path=path)


def main(folder: Path) -> int:
    if lack := page_kit.missing():
        print(f"page_screenshots: {lack}", file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    with page_kit.serving(LLM.load("default")) as url, page_kit.browsing() as browser:
        for name, screen, scheme, share, sampler in (*PICTURES, ("confidence", LOW, "light", None, False)):
            reader = page_kit.Reader(browser, url, color_scheme=scheme, reduced_motion="reduce", **screen)
            path = folder / f"page-{name}.png"
            if name == "confidence":
                take_doubts(reader, path)
            else:
                take(reader, share, sampler, path)
            reader.context.close()
            size = path.stat().st_size
            print(f"{path.name}: {size / 1000:.0f} kB")
            if size > LIMIT:
                print(f"page_screenshots: {path.name} is larger than {LIMIT / 1000:.0f} kB", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs" / "figures")
    sys.exit(main(parser.parse_args().folder))
