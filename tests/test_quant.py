"""Laws of every registered weight format: what is stored, how near it is, and that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dgemma.errors import ConfigError
from dgemma.kernels import scaled
from dgemma.kernels.matrix import Matrix
from dgemma.quant import FORMATS, WeightFormat, groups, int8dyn, make_format
from dgemma.quant.int4wo import Int4WeightOnly
from dgemma.quant.int8dyn import round_rows

EVERY = tuple((name, group) for name, kind in FORMATS.items() for group in (None, *kind.groups))
ROWS = (1, 7, 16, 256)
# Whole groups; a row that ends inside a group; a matrix smaller than any vector.
SHAPES = ((96, 128), (40, 72), (3, 12), (1, 1))
ids = [f"{name}-{group}" for name, group in EVERY]


@pytest.fixture(params=EVERY, ids=ids)
def weight_format(request: pytest.FixtureRequest) -> WeightFormat:
    return make_format(*request.param)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def matrix_of(weight_format: WeightFormat, weight: Tensor) -> Matrix:
    return weight_format.matrix(weight_format.quantize(weight), (weight.shape[0], weight.shape[1]))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# -- what is stored -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_what_quantize_makes(weight_format: WeightFormat, shape: tuple[int, int]) -> None:
    stored, layout = weight_format.quantize(normal(*shape)), weight_format.layout(shape)
    assert {name: (tuple(part.shape), part.dtype) for name, part in stored.items()} == {
        name: (part.shape, part.dtype) for name, part in layout.items()
    }
    assert all(part.is_contiguous() for part in stored.values())


def test_bits_a_weight() -> None:
    """Eight bits and a scale a row; four bits and two numbers a group."""
    for name, group, bits in (
        ("int8wo", None, 8.03),
        ("int8dyn", None, 8.03),
        ("fp8", None, 8.03),
        ("int4wo", 32, 5.0),
        ("int4wo", 128, 4.25),
    ):
        stored = make_format(name, group).quantize(normal(64, 1024))
        assert sum(part.nbytes for part in stored.values()) * 8 / 64 / 1024 == pytest.approx(bits, abs=0.01)


def test_a_matrix_keeps_what_is_stored_and_no_dense_copy(weight_format: WeightFormat) -> None:
    stored = weight_format.quantize(normal(256, 512))
    size = sum(part.nbytes for part in stored.values())
    assert weight_format.matrix(stored, (256, 512)).nbytes <= 1.02 * size


@pytest.mark.parametrize("shape", SHAPES)
def test_the_dense_matrix_is_near_the_weight(weight_format: WeightFormat, shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    dense = matrix_of(weight_format, weight).dense()
    assert dense.shape == shape and dense.dtype is torch.float32
    # Half a step of the coarsest scale: the row's largest magnitude / 127, or its range / 15 (and bfloat16 scales).
    rows = weight.abs().amax(1, keepdim=True)
    if weight_format.name == "int4wo":
        assert error(dense, weight) < 0.12
    elif weight_format.name == "fp8":
        # Half a step of a number with three bits behind the point; below 2^-6 steps are 2^-9.
        assert ((dense - weight).abs() <= torch.maximum(weight.abs() / 16, rows / 448 * 2**-10) * 1.0001).all()
    else:
        assert ((dense - weight).abs() <= rows / 127 * 0.5001).all()


def test_every_column_comes_back_to_its_place(weight_format: WeightFormat) -> None:
    """One large weight in each row, somewhere else each time: packing and unpacking agree about columns."""
    weight = torch.eye(72) * 5 + 0.01 * normal(72, 72)
    assert torch.equal(matrix_of(weight_format, weight).dense().argmax(1), torch.arange(72))


def test_int4_spans_never_lose_to_plain_rounding() -> None:
    weight = normal(64, 256) ** 3  # heavy tails, where cutting off wins most
    values = weight.view(64, -1, 64)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = (high - low) / 15
    plain = ((values - low) / scale).round() * scale + low
    dense = matrix_of(Int4WeightOnly(group=64), weight).dense()
    assert error(dense, weight) < 0.97 * error(plain.view(64, 256), weight)


def test_smaller_groups_are_nearer() -> None:
    weight = normal(64, 512)
    errors = [error(matrix_of(Int4WeightOnly(group=group), weight).dense(), weight) for group in (32, 64, 128)]
    assert errors == sorted(errors) and errors[0] < 0.95 * errors[2]


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_constant_weights_are_kept(weight_format: WeightFormat, value: float) -> None:
    dense = matrix_of(weight_format, torch.full((8, 64), value)).dense()
    torch.testing.assert_close(dense, torch.full((8, 64), value), rtol=2**-8, atol=1e-20)


# -- the product ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("panel", [1 << 21, 1 << 11])
def test_a_row_has_the_same_bits_in_every_batch(
    weight_format: WeightFormat,
    shape: tuple[int, int],
    dtype: torch.dtype,
    panel: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "_PANEL", panel)
    matrix = matrix_of(weight_format, normal(*shape))
    x = normal(256, shape[1], seed=1).to(dtype)
    x[100] *= 1000  # one row's range must not be another's
    whole = matrix(x)
    assert whole.dtype is dtype and whole.shape == (256, shape[0])
    for count in ROWS:
        for begin in {0, 256 - count, (100 - count // 2) % (257 - count)}:
            assert torch.equal(matrix(x[begin : begin + count]), whole[begin : begin + count]), (count, begin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_with_the_dense_matrix(
    weight_format: WeightFormat, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = matrix_of(weight_format, normal(*shape))
    x = normal(2, 9, shape[1], seed=2).to(dtype)
    rounded = x.float()
    if weight_format.name == "int8dyn":
        levels, step = round_rows(x.flatten(0, 1))
        rounded = ((levels.float() - 128) * step).view(x.shape)
        assert ((rounded - x.float()).abs() <= 0.5001 * step.view(2, 9, 1)).all()
    elif weight_format.name == "fp8":
        codes, scale = scaled.round_rows(x.flatten(0, 1))
        rounded = (codes.float() * scale[:, None]).view(x.shape)
        near = torch.maximum(x.abs().float() / 16, scale.view(2, 9, 1) * 2**-10)
        assert ((rounded - x.float()).abs() <= 1.0001 * near).all()
    want = rounded.double() @ matrix.dense().double().t()
    got = matrix(x)
    assert got.shape == (2, 9, shape[0]) and got.dtype is dtype
    assert error(got, want) < (1e-6 if dtype is torch.float32 else 2**-7)


def test_no_rows_and_rows_of_zeros(weight_format: WeightFormat) -> None:
    matrix = matrix_of(weight_format, normal(40, 72))
    assert matrix(torch.zeros(0, 72)).shape == (0, 40)
    assert torch.equal(matrix(torch.zeros(3, 72)), torch.zeros(3, 40))


def test_torchs_product_of_fp8_is_ours() -> None:
    """What a device calls, in the CPU's form of it: the same sums, rounded to bfloat16."""
    kind = make_format("fp8")
    stored, x = kind.quantize(normal(48, 64)), normal(33, 64, seed=3).bfloat16()
    x[7] *= 100
    rounded = scaled.round_rows(x)
    theirs = scaled.product(rounded, (stored["codes"], stored["scale"]))
    assert theirs.dtype is torch.bfloat16
    ours = kind.matrix(stored, (48, 64))(x)
    assert error(ours, theirs.float()) < 2**-9
    per_row = (ours.float() - theirs.float()).norm(dim=1) / theirs.float().norm(dim=1)
    assert float(per_row.max()) < 2**-8


def test_float_products_stand_in_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without byte products gets the same numbers, up to the rounding of float32."""
    weight, x = normal(96, 128), normal(33, 128, seed=3)
    fast = matrix_of(make_format("int8dyn"), weight)
    monkeypatch.setattr(int8dyn, "has_byte_products", lambda device: False)
    slow = matrix_of(make_format("int8dyn"), weight)
    assert torch.equal(fast.dense(), slow.dense())
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not int8dyn.has_byte_products(torch.device("cpu")), reason="this processor has no byte products")
def test_bytes_do_not_overflow() -> None:
    """Largest activations times largest weights: sums of pairs leave 16 bits, where older instructions saturate."""
    matrix = matrix_of(make_format("int8dyn"), torch.ones(32, 2048))
    torch.testing.assert_close(matrix(torch.ones(4, 2048)), torch.full((4, 32), 2048.0))
    torch.testing.assert_close(matrix(-torch.ones(4, 2048)), torch.full((4, 32), -2048.0))


# -- refusals -------------------------------------------------------------------------------


def test_gradients_are_refused_by_name(weight_format: WeightFormat) -> None:
    matrix = matrix_of(weight_format, normal(40, 72))
    with torch.enable_grad(), pytest.raises(ConfigError, match="no gradient"):
        matrix(normal(3, 72).requires_grad_())


@pytest.mark.parametrize(
    ("name", "group", "words"),
    [
        ("int3", None, "unknown weight format 'int3'; known: int8wo, int4wo, int8dyn, fp8"),
        ("int4wo", 48, "int4wo takes a group of 32, 64, 128; got 48"),
        ("int8wo", 0, "takes a group of 32, 64, 128; got 0"),
        ("int8dyn", 32, "takes no group, got 32"),
    ],
)
def test_wrong_formats_name_what_is_allowed(name: str, group: int | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_format(name, group)
