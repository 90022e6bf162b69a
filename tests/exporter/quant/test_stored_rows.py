"""Rows of a model's matrices are found among those of a checkpoint by their numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sinkexport.quant.stored import Indices, StoredMatrix
from sinkexport.quant.stored_rows import RowIndex
from sinkexport.quant.weight import Rounded

DEPTH, BLOCK = 64, 32


def matrix(
    seed: int,
    width: int = 8,
    *,
    symmetric: bool = True,
    bits: int = 4,
    block: int | None = BLOCK,
    order: bool = False,
    zero_rows: tuple[int, ...] = (),
    name: str = "w",
) -> StoredMatrix:
    """A random one. zero_rows: outputs whose scales are 0."""
    random = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    codes = random.integers(0, 2 * half, (width, DEPTH))
    groups = DEPTH // (block or DEPTH)
    scales = random.uniform(-1, 1, (width, groups)).astype(np.float32)
    scales[list(zero_rows)] = 0
    zeros = None if symmetric else random.integers(0, 2 * half, (width, groups)).astype(np.uint8)
    integers = (codes - half).astype(np.int8) if symmetric else codes.astype(np.uint8)

    def read(rows: Indices | None) -> Rounded:
        some = slice(None) if rows is None else rows
        return Rounded(integers[some], scales[some], None if zeros is None else zeros[some])

    places = random.permutation(DEPTH) if order else None
    return StoredMatrix(name, (width, DEPTH), 8 if bits == 8 else 4, block, symmetric, read, "test", places)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_in_any_order(dtype: str) -> None:
    first, second = matrix(0), matrix(1, 5)
    both = np.concatenate([first.dequantized(), second.dequantized()]).astype(dtype)
    order = np.random.default_rng(2).permutation(len(both))[:9]
    found = RowIndex([first, second], dtype).find(both[order])
    assert found is not None
    wanted = np.concatenate([first.read(None).integers, second.read(None).integers])[order]
    assert np.array_equal(found.read().integers, wanted)
    assert found.symmetric


def test_rows_with_and_without_zero_points() -> None:
    """Signed integers are made unsigned, with the zero point that stands for them."""
    with_zeros, without = matrix(0, symmetric=False), matrix(1)
    rows = np.concatenate([without.dequantized(), with_zeros.dequantized()])
    found = RowIndex([with_zeros, without], "float32").find(rows)
    assert found is not None
    integers, scales, zeros = found.read()
    assert zeros is not None
    by_group = np.repeat(integers.astype(np.float32), 1, axis=1).reshape(16, 2, BLOCK)
    values = (by_group - zeros[..., None]) * scales[..., None]
    assert np.array_equal(values.reshape(16, DEPTH), rows)
    assert (zeros[:8] == 8).all()


def test_an_order_of_inputs_belongs_to_the_form() -> None:
    first, second = matrix(0, order=True), matrix(1, order=True)
    index = RowIndex([first, second], "float32")
    assert index.find(first.dequantized()) is not None
    assert index.find(np.concatenate([first.dequantized(), second.dequantized()])) is None


@pytest.mark.parametrize("other", [{"bits": 8}, {"block": None}])
def test_several_forms_are_no_matrix(other: dict[str, int | None]) -> None:
    first, second = matrix(0), matrix(1, **other)  # type: ignore[arg-type]
    rows = np.concatenate([first.dequantized(), second.dequantized()])
    assert RowIndex([first, second], "float32").find(rows) is None


def test_one_number_off_is_another_row() -> None:
    first = matrix(0)
    index, rows = RowIndex([first], "float32"), first.dequantized()
    rows[3, 7] = np.nextafter(rows[3, 7], np.float32(9))
    assert index.find(rows) is None
    assert index.find(rows[:3]) is not None
    assert index.find(rows[:3, :32]) is None
    assert index.find(rows[:0]) is None


def test_zeros_have_no_sign() -> None:
    """A negative scale times 0 is -0."""
    first = matrix(0)
    rows = first.dequantized()
    assert RowIndex([first], "float32").find(np.where(rows == 0, np.float32(0), rows)) is not None


@pytest.mark.parametrize("other", [{"bits": 8}, {"block": None}, {"order": True}, {}])
def test_a_row_that_several_matrices_have(other: dict[str, Any]) -> None:
    """It comes from the matrix of the other rows, whatever the form of the one that has it too."""
    with_zeros = {"zero_rows": (3, 5)}
    first = matrix(0, order=bool(other.get("order")), name="a", **with_zeros)
    second = matrix(1, name="b", **{**other, **with_zeros})
    for matrices in ([first, second], [second, first]):
        index = RowIndex(matrices, "float32")
        for one in matrices:
            found = index.find(one.dequantized())
            assert found is not None
            assert found.matrices == (one,)


def test_matrices_that_are_equal_are_each_found_once() -> None:
    first, second = matrix(0, name="a"), matrix(0, name="b")
    index, rows = RowIndex([first, second], "float32"), first.dequantized()
    found = index.find(rows)
    assert found is not None
    other = index.find(rows, used={found.first.name})
    assert other is not None
    assert {found.first.name, other.first.name} == {"a", "b"}
    assert len(other.matrices) == 1
    assert index.find(rows, used={"a", "b"}) is not None


def test_many_equal_rows() -> None:
    """Padding of tables: as many candidates as matrices, not as rows."""
    matrices = [matrix(seed, 64, zero_rows=tuple(range(32)), name=str(seed)) for seed in range(9)]
    index = RowIndex(matrices, "float32")
    for one in matrices:
        found = index.find(one.dequantized())
        assert found is not None
        assert found.matrices == (one,)
    assert index.find(matrices[0].dequantized()[:32]) is not None  # zeros alone
