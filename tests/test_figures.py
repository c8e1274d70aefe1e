"""The pictures of the documentation: drawn from what is there now, and valid SVG."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from test_layering import RANKS

from dgemma.events import Committed, Draft
from dgemma.trace import Header, Moment, TraceWriter

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH, STEPS = 8, 5
PIECES = ("<eos>", " a", "b&c", "é", "↵", " <b>", "x", "y")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts_of(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def test_architecture_is_drawn_from_the_rank_table(figures: ModuleType) -> None:
    texts = texts_of(figures.architecture())
    rows = [str(rank).replace("-", "\u2212") for rank in sorted(set(RANKS.values()), reverse=True)]
    assert [text for text in texts if re.fullmatch("\u2212?\\d", text)] == rows
    assert set(RANKS) <= set(texts)
    assert set(RANKS) <= set(figures.PURPOSE)


def test_architecture_is_up_to_date(figures: ModuleType) -> None:
    stored = (DOCS / "figures" / "architecture.svg").read_text(encoding="utf-8")
    assert stored == figures.architecture(), "run: python docs/figures.py architecture"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_linked_files_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert [target for target in targets if not (DOCS / target).exists()] == []


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Two canvases; in the first, step s accepts positions below s and entropy falls from 5 nats to 0."""
    path = tmp_path / "trace.jsonl"
    header = Header(model="tiny", seed=0, mode="diffusion", prompt="once <upon>\na time", blank=(0,))
    with path.open("w", encoding="utf-8") as file:
        writer = TraceWriter(file, header, lambda token: PIECES[token])
        for number in (0, 1):
            for step in range(1, STEPS + 1 - number):
                draft = Draft(
                    request=1,
                    canvas=number,
                    step=step,
                    max_steps=STEPS,
                    temperature=0.5,
                    tokens=tuple((place + step) % WIDTH for place in range(WIDTH)),
                    canvas_tokens=tuple(range(WIDTH)),
                    accepted=tuple(place < step for place in range(WIDTH)),
                    entropy=(5.0 * (STEPS - step) / STEPS,) * WIDTH,
                )
                writer.write(Moment(0.1 * step, draft))
            writer.write(Moment(1.0, Committed(1, number, (1, 2), STEPS, "cap"), text="done"))
    return path


@pytest.mark.parametrize(("number", "steps"), [(0, STEPS), (1, STEPS - 1)])
def test_canvas_shows_every_position_and_every_accepted_one(
    figures: ModuleType, trace: Path, number: int, steps: int
) -> None:
    svg = figures.canvas(trace, number)
    paths = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}path")]
    heat = "".join(e.get("d") or "" for e in paths if e.get("shape-rendering"))
    dots = "".join(e.get("d") or "" for e in paths if not e.get("shape-rendering"))
    covered = sum(float(width) for width in re.findall(r"h([\d.]+)v", heat))
    assert covered == pytest.approx(steps * figures.MAP_WIDTH)
    assert dots.count("M") == sum(range(1, steps + 1))
    texts = texts_of(svg)
    assert f"{steps} denoising steps of a canvas of {WIDTH}, model tiny" in texts
    assert "prompt: once <upon> a time" in texts
    assert "prediction at step 1" in texts and f"prediction at step {steps}" in texts
    assert " ab&cé↵ <b>xy·" in texts  # step 1: tokens 1..7, then the blank


def test_canvas_is_the_same_for_the_same_trace(figures: ModuleType, trace: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "new" / "a.svg", tmp_path / "b.svg"]
    for out in outs:
        figures.main(["canvas", str(trace), str(out)])
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_wide_canvas_stays_a_small_file(figures: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "wide.jsonl"
    with path.open("w", encoding="utf-8") as file:
        writer = TraceWriter(file, Header(model="m", seed=0, mode="diffusion", prompt="p"), str)
        for step in range(1, 49):
            same = (7,) * 256
            draft = Draft(1, 0, step, 48, 0.5, same, same, (step > 24,) * 256, (6.0 / step,) * 256)
            writer.write(Moment(0.0, draft))
    assert len(figures.canvas(path)) < 400_000


def test_a_canvas_that_is_not_there_is_told(figures: ModuleType, trace: Path) -> None:
    with pytest.raises(SystemExit, match="no denoising steps of canvas 2"):
        figures.canvas(trace, 2)
