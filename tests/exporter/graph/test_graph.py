"""Quality of the exported graph: what it must not contain, what it computes once, how many nodes a layer has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.exporter.tiny_models import DECODE_GRAPH, tiny_model
from tests.support import SharedExports, TinyBundle, export_model, random_ids

NODES_PER_LAYER = 42
"""Nodes of a Llama-like decoder with grouped queries, views included."""


@pytest.fixture
def decode_graph(shared_export: SharedExports) -> Callable[[str], onnx.ModelProto]:
    """Decode graphs of tiny models, by their names."""
    return lambda name: loaded(shared_export(name, **DECODE_GRAPH))


def loaded(bundle: TinyBundle) -> onnx.ModelProto:
    return onnx.load(bundle.path / "decode.onnx", load_external_data=False)


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt_neox", "stablelm", "glm"])
@pytest.mark.parametrize("batch", [1, 3])
def test_only_standard_operators_and_no_copies_of_the_window(
    name: str, batch: int, shared_export: SharedExports
) -> None:
    bundle = shared_export(name, **{**DECODE_GRAPH, "batch": batch})
    model = loaded(bundle)
    onnx.checker.check_model(bundle.path / "decode.onnx", full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24)]
    found = ops(model)
    num_layers = 2
    assert found["TensorScatter"] == 2 * num_layers
    assert found["Transpose"] == found["Expand"] == found["ScatterND"] == found["ScatterElements"] == 0
    window_values = {f"window_{kv}.{layer}{end}" for kv in "kv" for layer in range(num_layers) for end in ("", ".next")}
    for node in model.graph.node:
        if node.op_type not in ("TensorScatter", "Reshape", "MatMul"):
            assert not window_values & set(node.input), f"{node.op_type} reads the window itself"
    views = {
        node.output[0] for node in model.graph.node if node.op_type == "Reshape" and node.input[0] in window_values
    }
    for node in model.graph.node:
        if views & set(node.input):
            assert node.op_type == "MatMul"


@pytest.mark.slow
def test_position_work_is_done_once_a_step(decode_graph: Callable[[str], onnx.ModelProto]) -> None:
    for name in ("llama", "smollm3"):  # 2 and 4 layers
        found = ops(decode_graph(name))
        assert found["Cos"] == found["Sin"] == 2  # the token itself and the shift
        assert found["LessOrEqual"] == found["Equal"] == 1
        assert found["Neg"] == 1


@pytest.mark.slow
def test_norms_are_single_operators(decode_graph: Callable[[str], onnx.ModelProto]) -> None:
    found = ops(decode_graph("llama"))
    assert found["RMSNormalization"] == 5
    assert found["ReduceMean"] == found["Pow"] == 0
    found = ops(decode_graph("gpt_neox"))
    assert found["LayerNormalization"] == 5


@pytest.mark.slow
def test_node_count_per_layer(decode_graph: Callable[[str], onnx.ModelProto], tmp_path: Path) -> None:
    deeper = export_model(tiny_model("llama", num_hidden_layers=3), tmp_path / "deeper", **DECODE_GRAPH)
    assert len(loaded(deeper).graph.node) - len(decode_graph("llama").graph.node) <= NODES_PER_LAYER


def test_weights_are_one_file_and_tied_embeddings_stored_once(shared_export: SharedExports) -> None:
    bundle = shared_export("llama-tied", **DECODE_GRAPH)
    model = loaded(bundle)
    parameters = sum(p.numel() for p in tiny_model("llama-tied").parameters())
    size = (bundle.path / "weights.bin").stat().st_size
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {"weights.bin"}
    elements = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert parameters <= elements <= parameters + 16  # a few scalars of the graph
    assert size <= 4 * parameters + 4096 * len(external)


@pytest.mark.slow
def test_export_is_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_model("llama", tmp_path / name, **{**DECODE_GRAPH, "chunk_size": 12})
    for file in ("manifest.json", "decode.onnx", "prefill.onnx", "weights.bin"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_streams_of_a_batch_do_not_mix(shared_export: SharedExports) -> None:
    session = shared_export("llama", **{**DECODE_GRAPH, "batch": 3}).session()
    ids = random_ids(3, 40)
    first = np.stack([session.step(column)[0].copy() for column in ids.T])
    session.reset()
    ids[1:] = random_ids(2, 40, seed=9)
    second = np.stack([session.step(column)[0].copy() for column in ids.T])
    assert np.array_equal(first, second)


@pytest.mark.slow
def test_rotation_is_folded_away(decode_graph: Callable[[str], onnx.ModelProto]) -> None:
    """Every layer keeps its three rotations (query, key, query for the sinks) and none of the model's own code."""
    for name in ("llama", "phi3-partial", "stablelm", "cohere", "gpt_neox"):
        found = ops(decode_graph(name))
        assert found["RotaryEmbedding"] == 6, name
        assert found["Concat"] == 2, name  # sink and window logits
    assert torch.is_grad_enabled()
