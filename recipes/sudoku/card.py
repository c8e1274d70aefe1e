"""The model card of the Sudoku recipe, written from report.json alone: every number in it was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

_MEASURED = """\
{sizes}. Each has one solution; no solution is an image of a training solution under any of the 2·6⁸·9! symmetries of
the game. One attempt a puzzle with the checkpoint's settings ({settings}), through the engine that users get. In
brackets: 95 % intervals (Wilson).
"""

_HEAD = """\
---
license: apache-2.0
library_name: dgemma
tags: [diffusion, sudoku]
---
# sudoku

A DiffusionGemma-architecture model of {parameters:.1f} million parameters ({megabytes:.1f} MB) that solves Sudoku. The
prompt is the puzzle, 81 tokens; the answer is one canvas of 81 digits, denoised from random tokens.

```bash
dgemma sudoku 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79
```

No solver takes part in answering. Whether an answer solves its puzzle the rules alone decide.

## Measured

"""


def model_card(report: Row) -> str:
    """Markdown with the table, the definitions and the training facts."""
    model, sets = report["model"], report["sets"]
    generation = model["generation"]
    settings = (
        f"bound {generation['sampler_config']['entropy_bound']:g}, at most {generation['max_denoising_steps']} steps, "
        f"T {generation['t_max']:g} to {generation['t_min']:g}"
    )
    counts = {row["solved"]["of"] for row in sets.values()}
    sizes = f"{' / '.join(f'{count:,}' for count in sorted(counts))} held-out puzzles a set"
    head = _HEAD.format(parameters=model["parameters"] / 1e6, megabytes=model["bytes"] / 1e6)
    measured = _filled(_MEASURED.format(sizes=sizes, settings=settings))
    return head + measured + "\n\n" + "\n".join(_table(sets)) + _definitions(sets) + _training(report)


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120)


def _table(sets: dict[str, Row]) -> list[str]:
    lines = [
        "| | " + " | ".join(f"{name} givens" if name != "minimal" else "minimal (~24)" for name in sets) + " |",
        "|---|" + "--:|" * len(sets),
    ]

    def line(name: str, value: Callable[[Row], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(value(row) for row in sets.values()) + " |")

    first = next(iter(sets.values()))
    line("**solved, single attempt**", lambda row: f"**{_rate(row['solved'])}**")
    line("steps, mean (median)", lambda row: f"{row['steps']['mean']:.1f} ({row['steps']['median']:.0f})")
    line("ended by the stop rule", lambda row: f"{row['stopped_by_rule']['share']:.1%}")
    for kind, name in (("predicted", "drafted"), ("written", "accepted")):
        line(
            f"{name} digits: wrong to right / right to wrong / wrong to wrong",
            lambda row, kind=kind: " / ".join(
                f"{row[kind][key]:,}" for key in ("wrong_to_right", "right_to_wrong", "wrong_to_wrong")
            ),
        )
    line(f"verified best of {first['verified']['attempts']}", lambda row: _rate(row["verified"]["solved"]))
    if "without_signal" in first:
        count = first["without_signal"]["solved"]["of"]
        line(f"first {count} puzzles", lambda row: _rate(row["without_signal"]["with"]))
        line("the same without self-conditioning", lambda row: _rate(row["without_signal"]["solved"]))
    if "autoregressive" in first:
        count = first["autoregressive"]["solved"]["of"]
        line(f"first {count}: autoregressive twin, greedy", lambda row: _rate(row["autoregressive"]["solved"]))
    return lines


def _rate(rate: Row) -> str:
    low, high = rate["interval"]
    return f"{rate['share']:.1%} ({100 * low:.1f}-{100 * high:.1f})"


def _definitions(sets: dict[str, Row]) -> str:
    text = """

*Drafted* is a cell's most likely digit after a step, *accepted* a digit that a step took over and the next one read. A
digit counts as wrong to right when the last one in that blank was not the solution's and the next one is.
*Verified best of n* tries again, with other noise, while the answer breaks a rule; it needs no answer key.
"""
    if any("autoregressive" in row for row in sets.values()):
        text += (
            "The twin has the same backbone and the same puzzles, trained to write the 81 digits in reading order.\n"
        )
    return text


def _training(report: Row) -> str:
    machine, run, data = report["machine"], report["training"], report["data"]
    made = (
        f"{data['train']['puzzles']:,} minimal puzzles of a generator with a uniqueness check, a new random symmetry "
        "and number of givens each time one is drawn. "
    )
    if run:
        place = f" on {run['machine']}" if run["machine"] else ""
        made += (
            f"{run['steps']:,} steps of {run['boards_a_step']} examples, {run['hours']:.1f} hours{place}; mean canvas "
            f"loss of the last 50 steps {run['canvas_loss_last_50']:.3f} nats a cell. "
        )
    made += f"Measured on {machine['cpu']}, {machine['threads']} threads, torch {machine['torch_version']}."
    again = (
        "`recipes/sudoku` repeats it: `build_data.py`, `dgemma train recipes/sudoku.yaml`, `export.py`, `report.py`."
    )
    return f"\n## Made\n\n{_filled(made)}\n\n{again}\nAll figures are in `report.json`, with the hashes of the sets.\n"
