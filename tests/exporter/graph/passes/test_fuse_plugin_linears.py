"""fuse_plugin_linears: what matmuls of the TensorRT plugin take over, on one pattern each."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from sinkexport.graph.passes.fuse_plugin_linears import FusePluginLinears
from sinkexport.graph.plugin_linears import PluginLinear, find_plugin_linears

from tests.exporter.graph.passes.pass_checks import (
    check_left_alone,
    check_same_results,
    kinds,
    numbers,
    parsed,
    written,
)

K, N, ROUNDING = 16, 64, 2.0**-8
PLUGIN = 'plugin_version = "1", plugin_namespace = ""'
BARE = f"has_bias = 0, norm = 0, norm_epsilon = 0.0, has_residual = 0, gate = 0, {PLUGIN}"


def linear(y: str, x: str, weight: str, outputs: int = N) -> str:
    return f"{y} = ai.sinkexport.HalfLinear <num_outputs = {outputs}, {BARE}> ({x}, {weight})\n"


def norm(y: str, x: str, weight: str = "scale", *, float_weight: int = 0) -> str:
    fields = f"epsilon = 0.01, has_residual = 0, float_weight = {float_weight}, {PLUGIN}"
    return f"{y} = ai.sinkexport.RmsNorm <{fields}> ({x}, {weight})\n"


def gate(y: str, both: str, *, width: int = N // 2, activation: int = 2) -> str:
    fields = f"activation = {activation}, width = {width}, is_merged = 1, {PLUGIN}"
    return f"{y} = ai.sinkexport.GatedActivation <{fields}> ({both})\n"


def graph(body: str, outputs: str, between: str = "") -> ir.Model:
    """x [1, 3, K] and r [1, 3, N]; weights w and v [N, K], u [40, K], b [N]. between: types of values."""
    constants = [
        *(written(name, numbers(N, K, dtype="float16", seed=seed)) for seed, name in enumerate("wv")),
        written("u", numbers(40, K, dtype="float16", seed=2)),
        written("b", numbers(N, dtype="float16", seed=3)),
        written("scale", numbers(K, dtype="float16", seed=4)),
        written("wide", numbers(K, seed=5)),
        *filter(None, [between]),
    ]
    return parsed(body, f"float16[1, 3, {K}] x, float16[1, 3, {N}] r", outputs, ", ".join(constants))


def of(name: str, width: int) -> str:
    return f"float16[1, 3, {width}] {name}"


SUM = linear("s", "x", "w") + "y = Add (s, r)\n"
BOTH = linear("s", "x", "w") + "t = Add (b, s)\ny = Add (r, t)\n"
NORMED = norm("n", "x") + linear("y", "n", "w")
GATED = linear("s", "x", "w") + gate("y", "s")


@pytest.mark.parametrize(
    ("model", "expected", "takes"),
    [
        (graph(SUM, of("y", N), of("s", N)), ["HalfLinear"], ["residual"]),
        (graph(BOTH, of("y", N), f"{of('s', N)}, {of('t', N)}"), ["HalfLinear"], ["bias residual"]),
        (graph(NORMED, of("y", N), of("n", K)), ["HalfLinear"], ["norm_weight"]),
        (
            graph(norm("n", "x", "wide", float_weight=1) + linear("y", "n", "w"), of("y", N), of("n", K)),
            ["HalfLinear"],
            ["norm_weight"],
        ),
        (
            graph(NORMED + linear("z", "n", "v"), f"{of('y', N)}, {of('z', N)}", of("n", K)),
            ["HalfLinear", "HalfLinear"],  # each norms for itself
            ["norm_weight", "norm_weight"],
        ),
        (graph(GATED, of("y", N // 2), of("s", N)), ["HalfLinear"], ["gate"]),
        (
            graph(NORMED.replace("y =", "s =") + gate("y", "s"), of("y", N // 2), f"{of('n', K)}, {of('s', N)}"),
            ["HalfLinear"],
            ["norm_weight gate"],
        ),
    ],
    ids=["residual", "bias and residual", "norm", "norm of float32", "two readers of a norm", "gate", "norm and gate"],
)
def test_what_is_taken_over(model: ir.Model, expected: list[str], takes: list[str]) -> None:
    check_same_results(model, FusePluginLinears(), rtol=ROUNDING)
    assert kinds(model) == expected
    found = [one for _, one in find_plugin_linears(model.graph)]
    names = ("norm_weight", "bias", "residual", "gate")
    assert [" ".join(name for name in names if getattr(one, name) is not None) for one in found] == takes
    for node, one in find_plugin_linears(model.graph):
        assert PluginLinear.of(node) == one


@pytest.mark.parametrize(
    "model",
    [
        graph(SUM, f"{of('y', N)}, {of('s', N)}"),
        graph(linear("s", "x", "w") + "y = Add (s, s)\n", of("y", N), of("s", N)),
        graph(NORMED, f"{of('y', N)}, {of('n', K)}"),
        graph(NORMED + "z = Neg (n)\n", f"{of('y', N)}, {of('z', K)}", of("n", K)),
        graph(GATED, f"{of('y', N // 2)}, {of('s', N)}"),
        graph(linear("s", "x", "u", 40) + gate("y", "s", width=20), of("y", 20), of("s", 40)),
    ],
    ids=[
        "the matmul is read",
        "added to itself",
        "the norm is read",
        "not by linears alone",
        "both are read",
        "no whole tile of gates",
    ],
)
def test_what_stays(model: ir.Model) -> None:
    check_left_alone(model, FusePluginLinears())
