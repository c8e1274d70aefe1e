"""The memory plan against numbers worked out by hand from the released model's shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma.bench.gpu_model import RELEASED
from dgemma.bench.plan import RESERVE, memory_plan, weight_bytes, workspace
from dgemma.cli import main
from dgemma.config import LayerConfig, ModelConfig

# By hand: the shapes of every tensor of the released checkpoint's text model.
H, V, MLP, EXPERTS, INNER = 2816, 262_144, 2112, 128, 704
SLIDING, FULL = 25, 5
ATTENTION = {  # rows x columns of q, k, (v,) o
    "sliding": [(4096, H), (2048, H), (2048, H), (H, 4096)],
    "full": [(8192, H), (1024, H), (H, 8192)],
}
GATED = [(MLP, H), (MLP, H), (H, MLP)]
EXPERT = [(2 * INNER, H), (H, INNER)]
MATRICES = [
    *ATTENTION["sliding"] * SLIDING, *ATTENTION["full"] * FULL, *GATED * 31, *EXPERT * (EXPERTS * 30)
]  # fmt: skip
PLAIN = (
    V * H + 30 * (EXPERTS * H + H + EXPERTS) + 30 * 7 * H + 2 * H + SLIDING * 2 * 256 + FULL * 2 * 512 + 30 * 2
)  # embedding; routers; norms of layers, the last one and self-conditioning's; of q and k; scalars


def test_the_shapes_are_those_of_the_released_model() -> None:
    """25,251 M text parameters: the released total without the vision part (and with both halves' scalars)."""
    weights = sum(rows * columns for rows, columns in MATRICES)
    assert weights + PLAIN == pytest.approx(25.251e9, rel=1e-4)
    assert weight_bytes(RELEASED, None) == 2 * (weights + PLAIN) == pytest.approx(50.50e9, rel=1e-3)


def test_fp8_and_int4_weights_by_hand() -> None:
    fp8 = sum(rows * columns + 4 * rows for rows, columns in MATRICES) + 2 * PLAIN
    assert weight_bytes(RELEASED, "fp8") == fp8 == pytest.approx(26.0e9, rel=0.01)
    # Half a byte a weight, and four bytes for each group of 64 columns; all rows end with a whole group here.
    int4 = sum(rows * columns // 2 + 4 * rows * columns // 64 for rows, columns in MATRICES) + 2 * PLAIN
    assert weight_bytes(RELEASED, "int4wo") == int4 == pytest.approx(15.27e9, rel=0.01)


def test_keys_and_values_by_hand() -> None:
    """8,192 bytes a token and sliding layer, up to the window and what a pass adds; 4,096 a token and full layer."""
    plan = memory_plan(RELEASED)
    assert plan.kv_per_1000 == 1000 * FULL * 4096
    assert plan.ring == (1023 + 512) * SLIDING * 8192
    assert plan.copy_per_1000 == 1000 * 4096


def test_keys_and_values_in_fp8_by_hand() -> None:
    """Each vector of 256 or 512 has as many bytes and a scale of 4; what a pass copies is widened by way of float32."""
    plan = memory_plan(RELEASED)
    assert plan.kv_per_1000_fp8 == 1000 * FULL * 2 * 2 * (512 + 4)
    assert plan.ring_fp8 == (1023 + 512) * SLIDING * 2 * 8 * (256 + 4)
    assert plan.copy_per_1000_fp8 == 1000 * 2 * 512 * (2 + 2 + 4)
    (tight,) = (fit for fit in memory_plan(RELEASED, cards=(26,)).fits if fit.format == "fp8")
    left = 26 * 2**30 - RESERVE - tight.weights - sum(plan.workspace.values()) - plan.ring_fp8
    assert 0 < tight.context < tight.context_fp8 == left // (FULL * 2064 + 8192) < 262_144
    assert 0.50 < plan.kv_per_1000_fp8 / plan.kv_per_1000 < plan.ring_fp8 / plan.ring < 0.51


def test_the_workspace_by_hand() -> None:
    rows = 512
    assert workspace(RELEASED, rows) == {
        "stream": 4 * 512 * 2816 * 2,
        "heads": 2 * 512 * (16 * 512 + 2 * 8 * 256) * 2,
        "mlp": 3 * 512 * 2112 * 2,
        "experts": 512 * 8 * (704 + 2816) * 2,
        "vocabulary": 2 * 512 * 2816 * 4 + 512 * 256 * 8,
    }


def test_which_cards_hold_what() -> None:
    plan = memory_plan(RELEASED)
    fits = {(fit.card_gib, fit.format): fit for fit in plan.fits}
    assert {key for key, fit in fits.items() if fit.fits} == {
        (24, "int4"), (32, "int4"), (32, "fp8"), (80, "bf16"), (80, "fp8"), (80, "int4")
    }  # fmt: skip
    one = fits[32, "fp8"]
    left = 32 * 2**30 - RESERVE - one.weights - sum(plan.workspace.values()) - plan.ring
    assert one.context == min(262_144, left // (FULL * 4096 + 4096)) and 100_000 < one.context <= 262_144
    assert fits[24, "int4"].context == 262_144  # the model's own limit


@pytest.fixture
def config_alone(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED.to_hf()))
    return tmp_path


def test_info_prints_the_plan_of_a_config_alone(config_alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(config_alone), "--plan", "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)["plan"]
    assert plan["weights"] == {name: weight_bytes(RELEASED, kind) for name, kind in
                               (("bf16", None), ("fp8", "fp8"), ("int4", "int4wo"))}  # fmt: skip
    assert main(["info", str(config_alone), "--plan"]) == 0
    text = capsys.readouterr().out
    for words in (
        "weights, int4",
        "15.3 GB",
        "KV, 1,000 tokens",
        "20.5 MB",
        "KV, 1,000 tokens, fp8",
        "10.3 MB",
        "24 GiB, bf16",
        "no",
        "not measured",
    ):
        assert words in text
    assert main(["info", str(config_alone)]) == 0
    assert "memory plan" not in capsys.readouterr().out


def test_a_dense_model_and_one_of_sliding_layers_have_a_plan() -> None:
    layer = LayerConfig(kind="sliding", num_kv_heads=1, head_dim=8)
    config = ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_heads=2, layers=(layer, layer), num_experts=0,
        top_k_experts=0, expert_size=0, sliding_window=8, max_positions=128,
    )  # fmt: skip
    plan = memory_plan(config, cards=(24,))
    assert (
        plan.kv_per_1000
        == plan.copy_per_1000
        == plan.kv_per_1000_fp8
        == plan.copy_per_1000_fp8
        == plan.workspace["experts"]
        == 0
    )
    assert {fit.context for fit in plan.fits} == {0}  # its context is shorter than a canvas: nothing fits in it
