"""quantize_matmuls: which matmuls and tables it takes, and what it leaves. Forms in depth: test_quantize.py."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common
from sinkexport.graph.matmuls import find_matmuls
from sinkexport.graph.passes.fold_weight_transposes import FoldWeightTransposes
from sinkexport.graph.passes.quantize_matmuls import QuantizeMatmuls
from sinkexport.graph.quantize.plan import InputScale
from sinkexport.quant.weight import WeightScheme
from sinkexport.targets import CPU, ONNX, TARGETS, TENSORRT_NATIVE, TENSORRT_PLUGIN, Target

from tests.exporter.graph.passes.pass_checks import check_left_alone, kinds, numbers, parsed, written
from tests.exporter.graph.passes.plans import SimplePlan, context

K, N, ROWS = 32, 16, 7


def random_model(*, tied: bool = False) -> ir.Model:
    """An embedding and a matmul, by one matrix if `tied`."""
    matrix = "table" if tied else "w"
    rows = ROWS if tied else N
    model = parsed(
        f"x = Gather (table, ids) t = Transpose <perm = [1, 0]> ({matrix}) y = MatMul (x, t)",
        "int64[1, 3] ids, int64[1] position",
        f"float[1, 3, {rows}] y",
        ", ".join([written("table", numbers(ROWS, K)), written("w", numbers(N, K, seed=1))]),
    )
    FoldWeightTransposes()(model)
    return model


def run(model: ir.Model) -> np.ndarray:
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {"ids": np.array([[3, 0, 6]]), "position": np.zeros(1, np.int64)}
    return session.run(None, {i.name: given[i.name] for i in session.get_inputs()})[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", [ONNX, TENSORRT_NATIVE], ids=lambda target: target.name)
def test_weights_only(target: Target, tied: bool) -> None:
    want, model = run(random_model(tied=tied)), random_model(tied=tied)
    under_test = QuantizeMatmuls(context(target=target))
    assert under_test(model).modified
    assert not list(find_matmuls(model.graph))
    got = run(model)
    assert 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()
    check_left_alone(model, under_test)


def test_the_plugins_form() -> None:
    model = random_model()
    under_test = QuantizeMatmuls(context(target=TENSORRT_PLUGIN))
    assert under_test(model).modified
    assert {"Int8Linear", "Int8Rows"} <= set(kinds(model))
    check_left_alone(model, under_test)


@pytest.mark.parametrize(
    "plan", [SimplePlan(dynamic=True), SimplePlan(input_scale=InputScale(2.0 / 127))], ids=["dynamic", "static"]
)
def test_integer_inputs(plan: SimplePlan) -> None:
    want, model = run(random_model()), random_model()
    assert QuantizeMatmuls(context(plan))(model).modified
    assert "MatMulNBits" not in kinds(model)
    assert 0 < np.abs(run(model) - want).max() < 0.05 * np.abs(want).max()


def test_the_cpu_library_s_form_keeps_calibrated_ranges() -> None:
    """Its kernels find scales at run time: a matmul with a range from calibration stays ONNX Runtime's."""
    static, dynamic = random_model(), random_model()
    assert QuantizeMatmuls(context(SimplePlan(input_scale=InputScale(2.0 / 127)), CPU))(static).modified
    assert QuantizeMatmuls(context(SimplePlan(dynamic=True), CPU))(dynamic).modified
    assert "Int8Linear" not in kinds(static)
    assert "Int8Linear" in kinds(dynamic)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_left_alone(target: Target) -> None:
    """Without a plan, where the plan keeps everything, and where a matrix is none of the model's own."""
    check_left_alone(random_model(), QuantizeMatmuls())
    check_left_alone(random_model(), QuantizeMatmuls(context(SimplePlan(keep=("w", "table")), target)))
    computed = parsed("y = MatMul (x, k)", "float[1, 3, 4] x, float[4, 2] k", "float[1, 3, 2] y")
    check_left_alone(computed, QuantizeMatmuls(context(target=target)))


def test_a_table_can_stay_where_its_matmul_is_quantised() -> None:
    model = random_model()
    assert QuantizeMatmuls(context(SimplePlan(WeightScheme(8), keep=("table",))))(model).modified
    assert {"Gather", "MatMulNBits"} <= set(kinds(model))
    assert "GatherBlockQuantized" not in kinds(model)
