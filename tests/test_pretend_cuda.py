"""Everything a loaded model does, on a device that is not there: the answers of the CPU, and no op that mixes memory of
the host with the device's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from triton_kit import DEVICE

if DEVICE.type == "cuda":
    pytest.skip("there is a device", allow_module_level=True)
import pretend_cuda
from text_kit import save_model

from dgemma import kernels
from dgemma.api import LLM, Generation
from dgemma.bench import gpu_parts
from dgemma.bench.gpu import FORMATS, GpuRun, GpuSettings
from dgemma.bench.gpu_model import TINY
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.config import EngineConfig
from dgemma.control.decide import choice
from dgemma.kernels.triton_table import ROW
from dgemma.quant import make_format

REFERENCE = {op: getattr(kernels.reference, op) for op in ROW}
TEXT = "Once upon a time"
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


@pytest.fixture(scope="module", autouse=True)
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pretend_cuda.guard(tmp_path_factory.mktemp("guard"))
    with pretend_cuda.pretended():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without experts, for which the reference asks how many rows each has."""
    return save_model(tmp_path_factory.mktemp("made") / "tiny", experts=0)


@pytest.fixture(scope="module")
def near(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu", dtype="float64", threads=1)


@pytest.fixture
def far(loaded: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """With the reference's ops in place of kernels: in float64 their answers are the CPU's, and they take less time."""
    monkeypatch.setattr(kernels, "_triton", lambda: REFERENCE)
    return loaded


@pytest.fixture(scope="module")
def loaded(folder: Path, there: None) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_triton", lambda: REFERENCE)
        llm = LLM.load(folder, dtype="float64")
    assert llm.device == pretend_cuda.CUDA, "a device is preferred"
    return llm


def plain(answers: Any) -> Any:
    """Without times and probabilities."""
    if isinstance(answers, list):
        return [plain(one) for one in answers]
    if isinstance(answers, Generation):
        return replace(answers, seconds=0.0, logprobs=None, confidence=()), answers.logprobs is None
    return answers


ASKED: dict[str, dict[str, Any]] = {
    "one canvas": {"max_new_tokens": 8},
    "canvases in lanes": {"max_new_tokens": 60, "seed": 3},
    "fixed steps": {"max_new_tokens": 40, "stability_threshold": 0},
    "another sampler": {"max_new_tokens": 40, "sampler": "confidence"},
    "ar": {"mode": "ar", "max_new_tokens": 8},
    "ar at a temperature": {"mode": "ar", "max_new_tokens": 8, "temperature": 0.8},
    "verified": {"mode": "verified", "verify_pace": "fixed", "max_new_tokens": 12},
    "verified at a temperature": {"mode": "verified", "verify_pace": "fixed", "max_new_tokens": 12, "temperature": 0.8},
    "top-k and top-p": {"max_new_tokens": 20, "top_k": 5, "top_p": 0.9},
    "biases": {"max_new_tokens": 20, "logit_bias": {7: 2.0, 9: -100.0}, "presence_penalty": 0.5},
    "log-probabilities": {"max_new_tokens": 20, "logprobs": 3},
    "ar with log-probabilities": {"mode": "ar", "max_new_tokens": 6, "logprobs": 3, "frequency_penalty": 0.5},
    "a schema": {"max_new_tokens": 40, "schema": SCHEMA},
    "a regex": {"max_new_tokens": 20, "regex": "[a-z]{3,9}"},
    "a hook": {"max_new_tokens": 20, "on_step": lambda view: None},
}


@pytest.mark.parametrize("name", ASKED)
def test_answers(near: LLM, far: LLM, name: str) -> None:
    def ask(llm: LLM) -> Any:
        return plain(llm.generate([TEXT, "Lily lived by the river and she was"], **ASKED[name]))

    assert ask(far) == ask(near)


OTHERS: dict[str, Callable[[LLM], Any]] = {
    "drafts": lambda llm: [type(event).__name__ for event in llm.stream(TEXT, max_new_tokens=20)],
    "a score": lambda llm: pytest.approx(llm.score(TEXT, prompt="Lily").total, rel=1e-4),
    "infill": lambda llm: llm.infill("Once [[... 2-3 tokens ...]] a time [[...]]", candidates=3, most=4).text,
    "edit": lambda llm: llm.edit("Once upon a time there was a girl", doubt=0.3).text,
    "edit by the encoder": lambda llm: llm.edit("Once upon a time there was a girl", doubt=0.3, by="encoder").text,
    "a decision": lambda llm: [
        {label: pytest.approx(p, rel=1e-3) for label, p in one.probabilities.items()}
        for one in llm.decide("A girl. [[question]]", [choice(("girl", "boy"), "A [[answer]].")], encoder=True)
    ],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_uses(near: LLM, far: LLM, name: str) -> None:
    assert OTHERS[name](far) == OTHERS[name](near)


def test_codes_in_the_cache(folder: Path, far: LLM) -> None:
    def ask(device: str) -> Any:
        llm = LLM.load(folder, device=device, dtype="float64", engine=EngineConfig(kv_cache_dtype="fp8"))
        return plain(llm.generate(TEXT, max_new_tokens=40))

    assert ask("cuda") == ask("cpu")


@pytest.mark.parametrize("kind", [None, "fp8", "int4wo", "int8dyn"])
def test_kernels(kind: str | None, tmp_path: Path) -> None:
    """Experts, and Triton's kernels: two steps only, because random weights soon part on the last bits of a sum."""
    folder = save_model(tmp_path / "tiny")
    if kind is not None:
        quantize_checkpoint(folder, tmp_path / kind, make_format(kind))
        folder = tmp_path / kind

    def load(device: str) -> LLM:
        return LLM.load(folder, device=device, dtype="float32")

    far = load("cuda")
    got, expected = (plain(llm.generate(TEXT, max_new_tokens=8, steps=2)) for llm in (far, load("cpu")))
    assert got == expected
    assert (far.engine.graphs is None) if kind == "int8dyn" else far.engine.graphs.replayed  # type: ignore[union-attr]


@pytest.mark.soak
@pytest.mark.parametrize("kind", FORMATS)
def test_the_whole_benchmark(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that `dgemma bench gpu` does on a device, at a tiny shape; transformers uses an op that the host lacks."""

    class Small(GpuSettings):
        config, width = TINY, 16  # type: ignore[assignment]

    rates = gpu_parts.measure_ceilings
    monkeypatch.setattr(gpu_parts, "measure_ceilings", lambda device, tiny: rates(device, tiny=True))
    small = Small(formats=(kind,), steps=(2,), canvases=2, prompt_tokens=20, tokens=2, repeats=1, peer=False)
    state = GpuRun(tmp_path, small, seconds=9999).run()
    assert state["failed"] == {} and state["left"] == []
    assert {f"{kind}.steps2", f"{kind}.unrecorded2", f"{kind}.blocks", f"{kind}.ar"} <= set(state["parts"])
