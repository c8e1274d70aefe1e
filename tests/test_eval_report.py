"""The report of the default recipe on a tiny checkpoint: every part runs, and the card shows what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from text_kit import REPO, save_model

from dgemma.text.tokenizer import Tokenizer
from dgemma.train.stories import make_story


def write_set(path: Path, tokenizer: Tokenizer, named: dict[str, str]) -> None:
    ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in named.values()]
    np.savez(
        path.with_suffix(".npz"),
        ids=np.concatenate([np.array(one, dtype=np.uint16) for one in ids]),
        offsets=np.cumsum([0, *map(len, ids)]),
    )
    lines = [json.dumps({"source": name, "text": text, "answer": text}) + "\n" for name, text in named.items()]
    path.with_suffix(".jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A random checkpoint, data of a few stories that stand for prose too, and a run of three steps."""
    model, data, run = (tmp_path_factory.mktemp(name) for name in ("model", "data", "run"))
    save_model(model)
    tokenizer = Tokenizer.load(model)
    for part, first in (("train", 0), ("heldout", 50)):
        for number, kind in enumerate(("stories", "prose", "chat")):
            name = "story seed" if kind == "stories" else "book/chapter"
            texts = {f"{name} {seed}": make_story(seed).text for seed in range(first, first + 6)}
            write_set(data / f"{part}_{kind}", tokenizer, dict(list(texts.items())[number:]))
    sources = [{"name": "book", "file": "book.tgz", "sha256": "ab" * 32, "licence": "CC0-1.0"}]
    (data / "sources.json").write_text(json.dumps(sources))
    prompts = [
        {"source": source, "prompt": " ".join(make_story(seed).text.split()[:6])}
        for source, seed in (("story seed 50", 50), ("story seed 51", 51), ("book/chapter 52", 52))
    ]
    (data / "heldout_prompts.json").write_text(json.dumps(prompts))
    rows = [
        {"step": step, "source": "train_stories", "canvas": 5.0 - step, "encoder": 3.0, "tokens": 100, "seconds": 9.0}
        for step in (0, 1, 1, 2)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data, run


def test_report_and_card(folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "recipes/default"))
    import card
    import report

    model, data, run = folders
    size = report.Size(
        stories=3, prose=2, bound_stories=2, bound_prose=2, bound_tokens=33, losses=1, seeds=2, new_tokens=20
    )
    found = json.loads(json.dumps(report.report(model, data, [run], size, None, Console(quiet=True))))

    last = {"train_stories": {"canvas": 4.0, "encoder": 3.0}}
    assert found["training"]["run"] == {"steps": 3, "canvas_tokens": 300, "hours": 9 / 3600, "last_losses": last}
    assert [sample["seed"] for sample in found["samples"]] == [0, 1, 2, 100, 101]
    assert found["decoding"]["canvases"] >= 3
    real = found["texts"]["held-out"]["stories"]
    assert real["consistency"]["stories"] == real["samples"] == 2
    judge = found["texts"]["judge"]
    assert judge["held-out"]["nats_per_token"] < judge["diffusion"]["nats_per_token"]
    assert judge["passed"] == (judge["gap"] <= 1.5)
    for kind in ("prose", "stories"):
        one = found["likelihood"][kind]
        bound = one["bound"][one["better"]]
        assert one["same_tokens_autoregressive"]["tokens"] == bound["raw"]["tokens"] == bound["calibrated"]["tokens"]
        assert one["same_tokens_autoregressive"]["bytes"] == bound["raw"]["bytes"] > 0

    text = card.model_card(found)
    assert f"{found['model']['parameters']['total']:,} parameters" in text.replace("\n", " ")
    prose = found["likelihood"]["prose"]["autoregressive"]
    assert f"{prose['bits_per_byte']:.3f} ± {prose['bits_per_byte_se']:.3f}" in text
    assert "3 steps" in text and "book.tgz" in text and "smoke run" not in text
    assert "smoke run" in card.model_card(found | {"quick": True})
    assert all(line.startswith(("|", ">")) or len(line) <= 118 for line in text.splitlines())
