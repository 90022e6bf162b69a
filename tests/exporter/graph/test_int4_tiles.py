"""INT4 weights for the TensorRT plugin: their bytes are what the kernels' header says, and stand for the matrix."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from sinkexport.graph.passes.fold_weight_transposes import FoldWeightTransposes
from sinkexport.graph.passes.quantize_matmuls import QuantizeMatmuls
from sinkexport.graph.quantize import int4_tiles
from sinkexport.loading.weights.packed_matrices import tiled_rows
from sinkexport.quant.weight import QuantizedWeight, WeightScheme
from sinkexport.targets import TENSORRT_PLUGIN
from sinkrt.errors import UsageError

from tests.exporter.graph.passes.pass_checks import check_left_alone, evaluated, kinds, numbers, parsed, written
from tests.exporter.graph.passes.plans import SimplePlan, context
from tests.plugins import int4_layout

SCHEMES = [WeightScheme(4, block, symmetric) for block in (32, 64, 128) for symmetric in (True, False)]


@pytest.mark.parametrize("shape", [(16, 64), (1, 8), (33, 200), (5, 40, 72)], ids=str)
def test_bytes_are_where_the_header_says(shape: tuple[int, ...]) -> None:
    integers = np.random.default_rng(0).integers(0, 16, shape).astype(np.uint8)
    packed = torch.from_numpy(int4_tiles.tiles(integers))
    np.testing.assert_array_equal(int4_layout.integers(packed, *shape[-2:]).numpy(), integers)
    whole = int4_layout.padded(torch.from_numpy(integers), 16, 64, int4_tiles.SYMMETRIC_ZERO)
    assert torch.equal(packed, int4_layout.tiles(whole))
    values = torch.from_numpy(int4_tiles.groups(integers))
    np.testing.assert_array_equal(int4_layout.by_output(values, shape[-2]).numpy(), integers)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.block_size}-{s.symmetric}")
def test_constants_stand_for_the_rounded_matrix(scheme: WeightScheme) -> None:
    matrix = np.random.default_rng(1).normal(size=(35, 200)).astype(np.float32)
    weight = QuantizedWeight("w", ir.tensor(matrix), scheme, transposed=True)
    graph = ir.Graph([], [], nodes=[])
    tiles, scales, *zeros = (
        torch.from_numpy(v.const_value.numpy()) for v in int4_tiles.stored_int4(graph, weight, (35,))
    )
    assert len(zeros) == int4_tiles.int4_fields(weight)["has_zero_points"] == (not scheme.symmetric)
    points = zeros[0].view(torch.uint8) if zeros else None
    dense = int4_layout.dense(tiles.view(torch.uint8), scales, points, (35, 200), scheme.block_size or 0)
    want = QuantizedWeight(
        "w",
        ir.tensor(matrix),
        WeightScheme(4, scheme.block_size, scheme.symmetric, "absmax", "float16"),
        transposed=True,
    )
    np.testing.assert_allclose(dense.numpy(), want.dequantized(), rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.block_size}-{s.symmetric}")
def test_a_written_graph_is_read_back(scheme: WeightScheme) -> None:
    """Through what compares a bundle's weights with the model's file."""
    matrices = numbers(3, 35, 200)
    weight = QuantizedWeight("w", ir.tensor(matrices.reshape(105, 200)), scheme, transposed=True)
    graph = ir.Graph([], [], nodes=[])
    tiles, scales, *zeros = int4_tiles.stored_int4(graph, weight, (3, 35))
    x = ir.Value(name="x", shape=ir.Shape((2, 200)))
    node = ir.node(
        "Int4ExpertLinear", [x, tiles, scales, *zeros], {"num_outputs": 35, **int4_tiles.int4_fields(weight)}
    )
    graph.append(node)
    arrays = [value.const_value.numpy() for value in (tiles, scales, *zeros)]
    found = tiled_rows(tiles, arrays[0], arrays[1], arrays[2] if zeros else None)
    assert (found.shape, found.num_experts) == ((105, 200), 3)
    rows, columns = np.array([0, 17, 34, 35, 104]), np.arange(200)
    rounded = QuantizedWeight(
        "w", ir.tensor(matrices.reshape(105, 200)), dataclasses.replace(scheme, scale_dtype="float16"), transposed=True
    )
    values, steps = found.read(rows, columns)
    np.testing.assert_allclose(values, rounded.dequantized()[rows], rtol=1e-6)
    np.testing.assert_array_equal(steps, rounded.scales()[rows].repeat(scheme.block_size or 0, axis=1)[:, :200])


def embedding_and_matmul(depth: int, *, tied: bool = False) -> ir.Model:
    rows = 7
    matrix = "table" if tied else "w"
    model = parsed(
        f"x = Gather (table, ids) t = Transpose <perm = [1, 0]> ({matrix}) y = MatMul (x, t)",
        "int32[1, 3] ids, int64[1] position",
        f"float16[1, 3, {rows}] y",
        ", ".join(
            [
                written("table", numbers(rows, depth, dtype="float16")),
                written("w", numbers(rows, depth, dtype="float16", seed=1)),
            ]
        ),
    )
    FoldWeightTransposes()(model)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.block_size}-{s.symmetric}")
def test_a_graph_computes_the_same(scheme: WeightScheme, tied: bool) -> None:
    model = embedding_and_matmul(40, tied=tied)
    ids = np.array([[3, 0, 6]], np.int32)
    (want,) = evaluated(model, {"ids": ids, "position": np.zeros(1, np.int64)})
    under_test = QuantizeMatmuls(context(SimplePlan(scheme), TENSORRT_PLUGIN))
    assert under_test(model).modified
    assert {"Int4Linear", "Int4Rows"} <= set(kinds(model))
    (got,) = evaluated(model, {"ids": ids, "position": np.zeros(1, np.int64)})
    assert 0 < np.abs(got.astype(np.float64) - want).max() < 0.25 * np.abs(want).max()
    check_left_alone(model, under_test)


def test_int8_weights_beside_them_have_a_scale_an_output() -> None:
    model = embedding_and_matmul(48)
    assert QuantizeMatmuls(context(SimplePlan(WeightScheme(8, 32)), TENSORRT_PLUGIN))(model).modified
    assert {"Int8Linear", "Int8Rows"} <= set(kinds(model))


@pytest.mark.parametrize(
    ("scheme", "depth", "refusal"),
    [
        (
            WeightScheme(4, 16),
            32,
            "received 4 bits, blocks of 16, expected what the Int4Linear plugin takes: blocks of 32",
        ),
        (WeightScheme(4), 32, "received 4 bits, a scale for each channel, expected what the Int4Linear plugin takes"),
        (WeightScheme(4, 32), 36, "received 36 inputs, expected what the Int4Linear plugin takes: a multiple of 8"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(scheme: WeightScheme, depth: int, refusal: str) -> None:
    with pytest.raises(UsageError) as failure:
        QuantizeMatmuls(context(SimplePlan(scheme), TENSORRT_PLUGIN))(embedding_and_matmul(depth))
    assert refusal in str(failure.value)
