"""The GPU benchmark on a CPU: roofline by hand, the same weights for every format and the peer, resuming, failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_kit  # chooses the interpreter

from dgemma.bench import gpu, gpu_parts, gpu_tune
from dgemma.bench.gpu import GpuRun, GpuSettings, tiny_settings
from dgemma.bench.gpu_model import RELEASED, TINY, quantise, random_weights
from dgemma.bench.gpu_peer import peer_of
from dgemma.bench.gpu_roof import Ceilings, answer_ms, encode_roof, milliseconds, shared_roof, step_roof
from dgemma.bench.runs import Ours, weight_bytes
from dgemma.cli import main
from dgemma.config import EngineConfig
from dgemma.engine import Engine
from dgemma.errors import DgemmaError, RequestError
from dgemma.kernels import scaled, tuning
from dgemma.quant.fp8 import Fp8Matrix

assert triton_kit.DEVICE
CPU, BF16 = torch.device("cpu"), torch.bfloat16
CARD = Ceilings(bandwidth=2e12, rates={"bf16": 500e12, "fp8": 1000e12})  # round numbers, no card's


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the roofline ---------------------------------------------------------------------------


def test_bytes_and_flops_of_a_step_by_hand() -> None:
    """256 rows behind 1,024 tokens, every expert hit by 16 rows."""
    roof = step_roof(RELEASED, None, CARD, 1024, 256)
    experts = 30 * 128 * 3 * 704 * 2816
    router = 30 * 128 * 2816
    assert roof["experts"].gigabytes == pytest.approx(2 * (experts + router) / 1e9)
    assert roof["experts"].tflops == pytest.approx(2 * (16 * experts + 256 * router) / 1e12)
    sliding, full = 2816 * (4096 * 2 + 2048 * 2), 2816 * (8192 * 2 + 1024)
    assert roof["projections"].gigabytes == pytest.approx(2 * (25 * sliding + 5 * full) / 1e9)
    assert roof["mlp"].gigabytes == pytest.approx(2 * 30 * 3 * 2112 * 2816 / 1e9)
    # The embedding once for both products with it; keys and values of 1,023 tokens (1,024 in full layers).
    assert roof["vocabulary"].gigabytes == pytest.approx(2 * 262_144 * 2816 / 1e9)
    assert roof["vocabulary"].tflops == pytest.approx(2 * 2 * 256 * 262_144 * 2816 / 1e12)
    assert roof["attention"].gigabytes == pytest.approx((25 * 1023 * 8192 + 5 * 1024 * 4096) / 1e9)
    ms = 1000 * max(2 * 2112 * 2816 / 2e12, 2 * 256 * 2112 * 2816 / 500e12) * 3 * 30
    assert roof["mlp"].ms == pytest.approx(ms)


@pytest.mark.parametrize(("name", "bits"), [("fp8", 8), ("int4wo", 4.5)])
def test_formats_change_the_bytes_of_what_they_apply_to(name: str, bits: float) -> None:
    plain, packed = (step_roof(RELEASED, kind, CARD, 1024, 256) for kind in (None, name))
    for part in ("projections", "mlp", "experts"):
        assert packed[part].gigabytes / plain[part].gigabytes == pytest.approx(bits / 16, rel=0.01)
        assert packed[part].tflops == plain[part].tflops
    for part in ("attention", "vocabulary", "norms"):
        assert packed[part] == plain[part]
    # A product that FLOPs bound takes half the time in FP8, and the same in INT4, which multiplies in bfloat16.
    assert packed["mlp"].ms / plain["mlp"].ms == pytest.approx(0.5 if name == "fp8" else 1, rel=0.01)


def test_an_answer_is_its_steps_of_which_some_commit() -> None:
    step = [milliseconds(step_roof(RELEASED, "fp8", CARD, 1024 + 256 * i, 256)) for i in range(4)]
    shared = [shared_roof(RELEASED, "fp8", CARD, 1024 + 256 * i, 256) for i in range(3)]
    whole = 15 * sum(step) + step[0] + sum(map(milliseconds, shared))
    assert answer_ms(RELEASED, "fp8", CARD, 1024, 4, 256, 16) == pytest.approx(whole)
    alone = [step_roof(RELEASED, "fp8", CARD, 1280, 256), encode_roof(RELEASED, "fp8", CARD, 1024, 256)]
    assert step[1] < milliseconds(shared[0]) < sum(map(milliseconds, alone))
    for part in ("projections", "mlp", "experts"):  # the weights once, the products of both
        assert shared[0][part].gigabytes == pytest.approx(alone[0][part].gigabytes)
        assert shared[0][part].tflops == pytest.approx(alone[0][part].tflops + alone[1][part].tflops)
    one = encode_roof(RELEASED, None, CARD, 1024, 1, head=True)
    assert one["experts"].gigabytes == pytest.approx(30 * (8 * 3 * 704 + 128) * 2816 * 2 / 1e9)
    assert one["vocabulary"].gigabytes == pytest.approx(262_144 * 2816 * 2 / 1e9)


# -- weights --------------------------------------------------------------------------------


def test_weights_are_the_seeds_and_formats_are_made_of_the_same() -> None:
    model, again, other = (random_weights(TINY, CPU, BF16, seed) for seed in (1, 1, 2))
    state = model.state_dict()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert not torch.equal(state["embed.weight"], other.state_dict()["embed.weight"])
    before = weight_bytes(again)
    gate_up = state["layers.0.experts.gate_up_proj"]
    quantise(again, "fp8")
    assert 0.4 * before < weight_bytes(again) < 0.7 * before
    stack = again.layers[0].experts.matrices[0]  # type: ignore[union-attr, index]
    dense = torch.stack([matrix.dense() for matrix in stack])  # type: ignore[union-attr]
    assert ((dense - gate_up.float()).abs() <= gate_up.abs().float() / 15 + 1e-3).all()
    assert isinstance(again.layers[0].mlp.gate_proj.matrix, Fp8Matrix)  # type: ignore[union-attr]


def test_the_peer_runs_on_the_same_tensors() -> None:
    model = random_weights(TINY, CPU, BF16, 0)
    peer, prompt = peer_of(model), list(range(3, 30))
    theirs = peer._model.model.decoder
    assert theirs.layers[1].experts.down_proj.data_ptr() == model.layers[1].experts.down_proj.data_ptr()  # type: ignore[union-attr]
    ours, other = Ours(Engine(model, EngineConfig())).encode(prompt), peer.encode(prompt)
    assert float((ours - other).norm() / other.norm()) < 0.02


# -- what is measured -----------------------------------------------------------------------


def test_a_part_of_other_work_is_an_error() -> None:
    """An answer that stops early, and canvases that do not change, are no measurement."""
    model, prompt = random_weights(TINY, CPU, BF16, 0), list(range(3, 20))
    config = gpu_parts.fixed_config(2, 2, 16, 0)
    side = Ours(Engine(model, EngineConfig()))
    assert gpu_parts.time_answers(side, prompt, config, 2, 1)["passes"] == {"denoise": 4, "commit": 1}
    with pytest.raises(DgemmaError, match="wrote 32 tokens in 4 steps, not"):
        gpu_parts.time_answers(side, prompt, config, 3, 1)
    work = gpu_parts.check_work(model, {}, prompt, config, 2)
    assert work["canvases"] == 2 and len(work["experts hit, least by layer"]) == TINY.num_layers
    assert all(2 <= hit <= 8 for hit in work["experts hit, least by layer"])
    for router in (layer.router for layer in model.layers):  # type: ignore[union-attr]
        router.scale.zero_()  # type: ignore[union-attr, operator]
    assert gpu_parts.check_work(model, {}, prompt, config, 2)["experts hit, least by layer"] == [2, 2]
    with pytest.raises(DgemmaError, match="different canvases"):
        gpu_parts.check_work(model, {}, prompt, config, 3)


def test_errors_are_seen() -> None:
    want = {name: torch.ones(4, 3) for name in ("encode", "step", "signal step")}
    want |= {"argmax": torch.arange(4.0), "entropy": torch.ones(4)}
    got = {
        **want,
        "step": want["step"] * 1.5,
        "argmax": torch.tensor([0.0, 1, 2, 9]),
        "entropy": torch.full((4,), 1.25),
    }
    found = gpu_parts.compare(got, want)
    assert found["relative error, step"] == pytest.approx(0.5) and found["relative error, encode"] == 0
    assert found["same argmax"] == 0.75 and found["mean |dH|, nats"] == pytest.approx(0.25)
    with pytest.raises(DgemmaError, match="not finite"):
        gpu_parts.compare({**got, "step": want["step"] * float("nan")}, want)


def test_ceilings_without_products_of_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(gpu_parts, "product", fails)
    ceilings, facts = gpu_parts.measure_ceilings(CPU, tiny=True)
    assert facts["fp8"] == {"missing": "no kernel"} and set(ceilings.rates) == {"bf16"}
    assert len(facts["bf16"]["all"]) == 7 and scaled.product is not fails


# -- the whole command ----------------------------------------------------------------------


def test_the_whole_script_on_a_tiny_model(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    monkeypatch.setattr(tuning, "user_file", lambda: tmp_path / "home" / "blocks.json")
    assert (
        main(["bench", "gpu", str(folder), "--tiny", "--formats", "bf16,fp8", "--repeats", "1", "--seconds", "9999"])
        == 0
    )
    text = capsys.readouterr().out
    assert "mean nothing else" in text and "transformers" in text and "failed" not in text
    state = json.loads((folder / gpu.STATE).read_text())
    wanted = {f"{name}.{part}" for name in ("bf16", "fp8")
              for part in ("weights", "blocks", "error", "work", "steps2", "parts", "ar")}  # fmt: skip
    assert set(state["parts"]) == wanted | {"ceilings", "bf16.transformers"}
    assert not state["failed"] and not state["left"]
    assert state["parts"]["bf16.error"]["relative error, signal step"] < 0.02
    assert 0.02 < state["parts"]["fp8.error"]["relative error, signal step"] < 0.6
    assert (folder / gpu.CHART).read_text().startswith("<svg")
    plain, fewer = (state["parts"][f"{name}.blocks"] for name in ("bf16", "fp8"))
    assert {"experts, plain", "vocab", "canvas_attention, sliding", "canvas_attention, full"} < set(plain)
    for trial in (plain["experts, plain"], plain["vocab"], fewer["experts, fp8"]):
        assert len(trial["ms"]) == 2 and not trial["skipped"] and set(trial["best"]) > {"rows", "warps"}
    kept = json.loads((folder / "blocks.json").read_text())["blocks"]
    assert len(kept) == 5, "experts in two formats, vocabulary, two head dims"
    assert not (tmp_path / "home").exists(), "an interpreter's times are for nobody"
    # Again: nothing is left to measure, so nothing changes but the file's own facts.
    run = GpuRun(folder, tiny_settings(formats=("bf16", "fp8"), repeats=1))
    assert run.run()["parts"] == state["parts"]
    with pytest.raises(RequestError, match="other settings"):
        GpuRun(folder, tiny_settings(formats=("bf16", "fp8"), repeats=3)).run()


def test_a_failed_part_costs_no_other_and_is_tried_again(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("out of\nmemory")

    settings = tiny_settings(formats=("bf16",), repeats=1, peer=False)
    monkeypatch.setattr(gpu_tune, "tune", fails)
    monkeypatch.setattr(gpu_parts, "time_tokens", fails)
    state = GpuRun(tmp_path, settings).run()
    assert set(state["failed"]) == {"bf16.blocks", "bf16.ar"}
    assert "out of memory (test_bench_gpu.py:" in state["failed"]["bf16.ar"]
    assert {"bf16.error", "bf16.steps2", "bf16.parts"} <= set(state["parts"])
    monkeypatch.undo()
    kept = state["parts"]["bf16.steps2"]
    state = GpuRun(tmp_path, settings).run()
    assert not state["failed"] and state["parts"]["bf16.steps2"] == kept and "bf16.ar" in state["parts"]


def test_no_time_is_said_and_used_later(tmp_path: Path) -> None:
    settings = tiny_settings(formats=("int4",), repeats=1)
    state = GpuRun(tmp_path, settings, seconds=-1).run()
    assert state["parts"] == {} and len(state["left"]) == 8 and state["left"][0] == "ceilings"
    assert "nothing measured yet" in (tmp_path / gpu.CHART).read_text()


def test_no_weights_is_the_reason_of_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*args: Any) -> None:
        calls.append(args)
        raise torch.cuda.OutOfMemoryError("tried to allocate 50 GB")

    monkeypatch.setattr(gpu, "random_weights", fails)
    state = GpuRun(tmp_path, tiny_settings(formats=("fp8",))).run()
    assert len(calls) == 1 and set(state["parts"]) == {"ceilings"} and len(state["failed"]) == 7
    assert all("no weights: tried to allocate 50 GB" in reason for reason in state["failed"].values())


def test_without_a_device_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="needs a CUDA device; --tiny"):
        GpuRun(tmp_path / "x", GpuSettings()).run()
    assert not (tmp_path / "x").exists()
    for wrong, words in (({"formats": ("fp4",)}, "bf16, fp8, int4; got fp4"), ({"repeats": 0}, "repeats must be")):
        with pytest.raises(RequestError, match=words):
            replace(GpuSettings(), **wrong)
