"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgemma.errors import DataError
from dgemma.train.metrics import read_journal


def plot_run(folder: Path, out: Path | None = None, title: str = "") -> Path:
    """Draw `folder/metrics.jsonl` to `out` (default `folder/curves.png`): losses, the canvas by noise level, speed.

    Returns the picture's path. Raises `DataError` for a folder without steps or a machine without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise DataError("the plot needs matplotlib: pip install 'dgemma[train]'") from None
    records = read_journal(folder)
    if not records:
        raise DataError(f"{folder} has no step to draw yet")
    steps = [record["step"] for record in records]
    figure, (losses, levels) = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=110, sharex=True)
    for name, colour in (("canvas", "tab:orange"), ("encoder", "tab:blue")):
        values = [record[name] for record in records]
        if any(values):
            losses.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
            losses.plot(steps, smooth(values), color=colour, label=name)
    losses.set_ylabel("cross-entropy, nats a token")
    for level in sorted({level for record in records for level in record["by_t"]}):
        seen = [(record["step"], record["by_t"][level]) for record in records if level in record["by_t"]]
        levels.plot([step for step, _ in seen], smooth([value for _, value in seen]), label=f"t {level}")
    levels.set_title("canvas by noise level", fontsize=9)
    losses.set_title(title or folder.name, fontsize=9)
    for axis in (losses, levels):
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path = out or folder / "curves.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def smooth(values: Sequence[float], keep: float = 0.95) -> list[Any]:
    """Exponential moving average without the pull of its start (Adam's correction)."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(total / weight)
    return out
