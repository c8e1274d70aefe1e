"""A very small SVG writer: a card with its own background, light or dark as the reader's screen is."""

from __future__ import annotations

from html import escape

FONT = "ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Classes that a drawing may use: card, ink (text), soft (secondary text), line, box, and the two hues a and b.
_LIGHT = {"card": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "line": "#d1d9e0", "box": "#f3f6f9"}
_DARK = {"card": "#0d1117", "ink": "#e6edf3", "soft": "#9198a1", "line": "#3d444d", "box": "#1b222b"}
_HUES = {"a": "#2f81f7", "b": "#8b949e", "c": "#bf8700"}


class Svg:
    """Shapes in the order in which they were added. Coordinates are pixels from the top left."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, radius: float = 3, more: str = ""
    ) -> None:
        """A rectangle of class `kind`."""
        place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(height)}" rx="{_n(radius)}"'
        self._parts.append(f'<rect class="{kind}" {place}{more and " " + more}/>')

    def text(
        self, x: float, y: float, text: str, kind: str = "ink", size: float = 12, anchor: str = "start", more: str = ""
    ) -> None:
        """One line of text whose baseline is at y."""
        style = f'font-size="{_n(size)}" text-anchor="{anchor}"{more and " " + more}'
        self._parts.append(f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" {style}>{escape(text, quote=False)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, more: str = "") -> None:
        place = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
        self._parts.append(f'<line class="stroke" {place}{more and " " + more}/>')

    def raw(self, markup: str) -> None:
        """Whatever else SVG knows."""
        self._parts.append(markup)

    def __str__(self) -> str:
        size = f'width="{_n(self.width)}" height="{_n(self.height)}" viewBox="0 0 {_n(self.width)} {_n(self.height)}"'
        dark = f"@media (prefers-color-scheme: dark) {{ {_rules(_DARK)} }}"
        style = f"text {{ font-family: {FONT}; }} {_rules(_LIGHT)} {_rules(_HUES)} {dark}"
        card = f'<rect class="card" width="{_n(self.width)}" height="{_n(self.height)}" rx="8"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(self.title)}</title>'
        return "\n".join([head, f"<style>{style}</style>", card, *self._parts, "</svg>"]) + "\n"


def _rules(colours: dict[str, str]) -> str:
    rules = [f".{name} {{ fill: {colour}; }}" for name, colour in colours.items()]
    if "line" in colours:
        rules.append(f".stroke {{ stroke: {colours['line']}; }}")
    return " ".join(rules)


def _n(value: float) -> str:
    """A number without needless digits."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
