"""Plugin graphs of float16: between matmuls there are nodes of the plugin, which compute what was there before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sinkexport.quant.recipe import load_recipe
from sinkrt import Session

from tests.exporter.graph.plugin_evaluator import PluginBundle, errors_against
from tests.exporter.graph.test_plugin_target import S, T, W, exported
from tests.exporter.graph.test_quantize import with_rounded_weights
from tests.exporter.tiny_models import VOCAB_SIZE, tiny_model
from tests.support import random_ids

TWO_HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"head_dim": 64},
    "qwen3": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": S + W - 1},
    "phi3": TWO_HEADS,
    "qwen2": TWO_HEADS,
    "olmo2": TWO_HEADS,
}
REPLACED = {"ReduceMean", "Sqrt", "Reciprocal", "Pow", "Sigmoid", "Erf", "Tanh"}
VIEWS = {"Split", "Slice", "Reshape", "Transpose"}


def half_model(name: str) -> Any:
    model = tiny_model(name, **MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.4)
    return model.half()


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path, load_external_data=False).graph.node)


def counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in nodes_of(path))


def attributes(path: Path, op_type: str) -> list[dict[str, Any]]:
    return [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in nodes_of(path)
        if node.op_type == op_type
    ]


@pytest.mark.parametrize("recipe", [None, "int8-channel"])
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_llama_is_products_and_plugins(role: str, recipe: str | None, tmp_path: Path) -> None:
    options = {} if recipe is None else {"recipe": load_recipe(recipe)}
    exported(half_model("llama-tied"), tmp_path, target="tensorrt", dtype="fp16", chunk_size=T, **options)
    found = counts(tmp_path / f"{role}.onnx")
    for view in VIEWS:
        found.pop(view, None)
    linear = "HalfLinear" if recipe is None else "Int8Linear"
    ends = {"Gather": 2, "Cast": 1} if recipe is None else {"Gather": 1, "Cast": 1, "Int8Rows": 1}
    if role == "prefill":  # the last token that counts, of what the last norm makes
        ends = {**ends, "Gather": ends["Gather"] + 1, "Sub": 1, "Max": 1, "RmsNorm": 1}
    assert found == {**ends, "SinkAttention": 2, linear: 9}
    takes = [(f["norm"], f["has_residual"], f["gate"]) for f in attributes(tmp_path / f"{role}.onnx", linear)]
    layer = [(1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 0)]  # q|k|v, after attention, gate|up, down
    assert takes == [*layer, *layer, (0 if role == "prefill" else 1, 0, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norms", "takes"),
    [
        ("qwen3", (4, 0, 0), (5, 0, 4, 2)),  # of heads are left
        ("gemma2", (8, 4, 8), (0, 1, 0, 2)),  # weights of float32; norms after matmuls, too
        ("phi3", (0, 0, 0), (5, 0, 4, 2)),  # gate | up is the model's own
        ("olmo2", (9, 1, 9), (0, 0, 0, 2)),  # norms after matmuls: what is added to the stream is what they give
    ],
)
def test_what_other_families_have(
    name: str, norms: tuple[int, int, int], takes: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """norms: all, with a residual, with weights of float32. takes: matmuls with a norm of either type, a residual, a
    gate."""
    exported(half_model(name), tmp_path, target="tensorrt", dtype="fp16", chunk_size=T)
    path = tmp_path / "decode.onnx"
    left = set(counts(path)) & REPLACED
    assert left == ({"Tanh"} if name == "gemma2" else set())  # of the logits
    found = attributes(path, "RmsNorm")
    assert (len(found), sum(n["has_residual"] for n in found), sum(n["float_weight"] for n in found)) == norms
    linears = attributes(path, "HalfLinear")
    assert takes == (
        *(sum(linear["norm"] == kind for linear in linears) for kind in (1, 2)),
        sum(linear["has_residual"] for linear in linears),
        sum(linear["gate"] > 0 for linear in linears),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_onnx_bundle_does(name: str, tmp_path: Path) -> None:
    """Chunks first, then steps past two wraps, against ONNX Runtime in float32 on the same weights."""
    model = half_model(name)
    manifest = exported(model, tmp_path / "plugin", target="tensorrt", dtype="fp16")
    exported(model.float(), tmp_path / "onnx")
    errors = errors_against(tmp_path / "plugin", manifest, tmp_path / "onnx", VOCAB_SIZE)
    assert max(errors) < 0.02
    assert np.median(errors) < 0.006


@pytest.mark.slow
def test_biases_are_added_by_int8_products(tmp_path: Path) -> None:
    options = {"dtype": "fp16", "recipe": load_recipe("int8-channel"), "chunk_size": 1}
    manifest = exported(half_model("qwen2"), tmp_path / "plugin", target="tensorrt", **options)
    path = tmp_path / "plugin" / "decode.onnx"
    assert counts(path)["Add"] == 0
    assert [matmul["has_bias"] for matmul in attributes(path, "Int8Linear")] == [1, 0, 0, 0, 1, 0, 0, 0, 0]
    exported(with_rounded_weights(half_model("qwen2").float()), tmp_path / "onnx", chunk_size=1)
    under_test, ids = PluginBundle(tmp_path / "plugin", manifest), random_ids(16, seed=3, first=0)
    with Session.load(tmp_path / "onnx") as session:
        for t in range(len(ids)):
            got, want = under_test.step(ids[t : t + 1]), session.step(ids[t : t + 1])
            assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.02


@pytest.mark.slow
def test_graphs_of_float32_and_native_ones_have_no_such_nodes(tmp_path: Path) -> None:
    exported(half_model("llama-tied").float(), tmp_path / "wide", target="tensorrt", chunk_size=1)
    exported(half_model("llama-tied"), tmp_path / "native", target="tensorrt", dtype="fp16", native=True, chunk_size=1)
    exported(half_model("llama-tied"), tmp_path / "onnx", dtype="fp16", chunk_size=1)
    for folder in ("wide", "native", "onnx"):
        assert not {"RmsNorm", "GatedActivation", "HalfLinear"} & set(counts(tmp_path / folder / "decode.onnx"))
    assert counts(tmp_path / "wide" / "decode.onnx")["ReduceMean"] == 5
    assert counts(tmp_path / "native" / "decode.onnx")["RMSNormalization"] == 5
