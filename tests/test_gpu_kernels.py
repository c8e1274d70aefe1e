"""The table of bytes and FLOPs by kernel: against the floor of a step, figures by hand, and the kernels' own sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dgemma.bench import gpu_kernels
from dgemma.bench.floor import denoise_ops
from dgemma.bench.gpu_kernels import Kernel, kernels_of
from dgemma.bench.gpu_model import RELEASED


@pytest.fixture(scope="module")
def found() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in kernels_of(RELEASED, 1024, 256, 2)}


def test_products_are_those_of_the_floor(found: dict[str, Kernel]) -> None:
    """The draw's second look at 128 logits a row is the only work more."""
    floor = sum(op.count * op.work.flops for op in denoise_ops(RELEASED, 1024, [256], 2) if op.work)
    ours = sum(kernel.flops for name, kernel in found.items() if name != "vocab, draw")
    assert ours == pytest.approx(floor, rel=1e-6)


def test_no_kernel_moves_less_than_the_floor(found: dict[str, Kernel]) -> None:
    by_part: dict[str, float] = {}
    for op in denoise_ops(RELEASED, 1024, [256], 2):
        by_part[op.part] = by_part.get(op.part, 0.0) + op.count * op.bytes
    experts = found["experts"].bytes + found["router"].bytes
    assert by_part["experts"] <= experts < 1.1 * by_part["experts"]
    projections = found["q, k, v"].bytes + found["attention's output"].bytes
    assert by_part["projections"] <= projections < 1.2 * by_part["projections"]
    vocabulary = sum(kernel.bytes for name, kernel in found.items() if name.startswith("vocab"))
    assert 2 * by_part["vocabulary"] <= vocabulary < 2.6 * by_part["vocabulary"], "the embedding twice, and a scratch"


def test_figures_by_hand(found: dict[str, Kernel]) -> None:
    # 30 layers x 128 experts x 3 matrices of 2816 x 704, and 2048 slots x (3 x 2816 + 2 x 704) with 256 rows of output.
    assert found["experts"].bytes == 30 * (2 * 128 * 3 * 2816 * 704 + 2 * (2048 * 9856 + 256 * 2816))
    assert found["experts"].flops == 30 * 6 * 2048 * 2816 * 704
    # 25 layers see 1023 + 256 keys, 5 see 1024 + 256; all in two shares of float32.
    assert found["canvas_attention"].flops == 4 * 256 * (25 * 1279 * 16 * 256 + 5 * 1280 * 16 * 512)
    assert found["canvas_attention"].launches == 60
    assert found["middle"].bytes == 30 * 6 * 256 * 2816 * 2
    assert found["vocab, logits"].launches == 8


def test_a_model_without_experts_and_a_short_prefix() -> None:
    small = replace(RELEASED, num_experts=0, top_k_experts=0, expert_size=0)
    found = {kernel.name: kernel for kernel in kernels_of(small, 0, 256, 2)}
    assert not {"experts", "router", "choose"} & set(found)
    assert found["canvas_attention"].launches == 30, "one share"


def test_the_sizes_are_those_of_the_kernels() -> None:
    kit = pytest.importorskip("triton_kit")
    from dgemma.kernels import triton_attention, triton_vocab

    blocks = triton_vocab.shipped_blocks(kit.torch.bfloat16)
    assert (triton_vocab.TILE, blocks.chunk, blocks.shares) == (
        gpu_kernels.TILE, gpu_kernels.CHUNK, gpu_kernels.SHARES,
    )  # fmt: skip
    for dim in (256, 512):
        assert triton_attention.shipped_blocks(dim, kit.torch.bfloat16).share == gpu_kernels.KEYS_A_SHARE


def test_the_page_has_this_table(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_kernels.main()
    page = Path(__file__).parent.parent / "docs" / "gpu.md"
    assert capsys.readouterr().out.strip() in page.read_text(encoding="utf-8")
