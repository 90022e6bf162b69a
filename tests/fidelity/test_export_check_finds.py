"""The check of an export finds a graph that is wrong in one place, in either graph and whatever the cache's size."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from sinkexport.config import ExportConfig
from sinkexport.pipeline.bundle_writer import hash_bundle
from sinkexport.pipeline.check_export import MAX_STREAMED_TOKENS, check_export
from sinkrt.contract import MANIFEST_NAME, load_manifest
from sinkrt.errors import UsageError

from tests.exporter.tiny_models import tiny_model
from tests.support import export_model

DIFFERS = "the exported graph differs from the model"
S = 4
GEOMETRIES = {
    "streamed": (12, 8),  # by the reference, token by token
    "from random caches": (MAX_STREAMED_TOKENS, 8),
    "large chunks": (2 * MAX_STREAMED_TOKENS, 2 * MAX_STREAMED_TOKENS),  # short ones would be fed step by step
}
"""W and T."""

Fault = Callable[[onnx.GraphProto], None]


def is_read_as(graph: onnx.GraphProto, old: str, new: str, but: onnx.NodeProto) -> None:
    """Let all nodes but one read another value."""
    for node in graph.node:
        if node is not but:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new


def added(graph: onnx.GraphProto, name: str, number: int, place: int) -> onnx.NodeProto:
    """A value that is larger by a number, computed before the node of this place."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(number, np.int64), f"fault.{name}"))
    node = onnx.helper.make_node("Add", [name, f"fault.{name}"], [f"wrong.{name}"])
    graph.node.insert(place, node)
    return graph.node[place]


def wrong_position(graph: onnx.GraphProto) -> None:
    """All of the graph takes its tokens for those of the next position."""
    is_read_as(graph, "position", "wrong.position", added(graph, "position", 1, 0))


def wrong_slot(graph: onnx.GraphProto) -> None:
    """The keys of the last layer go to the slot of the next token."""
    place, scatter = next((i, node) for i, node in enumerate(graph.node) if node.output[0] == "window_k.1.next")
    slot = scatter.input[2]
    modulo = next(node for node in graph.node if node.output[0] == slot)
    later = added(graph, slot, 1, place)
    wrapped = onnx.helper.make_node("Mod", [later.output[0], modulo.input[1]], ["wrong.slot"])
    graph.node.insert(place + 1, wrapped)
    scatter.input[2] = "wrong.slot"


def wrong_angles(graph: onnx.GraphProto) -> None:
    """Rotation is faster by a hundredth."""
    frequency = next(one for one in graph.initializer if one.name == "frequency_")
    numbers = onnx.numpy_helper.to_array(frequency)
    faster = (numbers * 1.01).astype(numbers.dtype)
    frequency.CopyFrom(onnx.numpy_helper.from_array(faster, frequency.name))


def states_of_another_layer(graph: onnx.GraphProto) -> None:
    """Two layers' values are swapped as they are kept: the logits of this very run are right."""
    for layer in (0, 1):
        name, own = f"window_v.{layer}.next", f"own.{layer}"
        writer = next(node for node in graph.node if name in node.output)
        writer.output[0] = own
        is_read_as(graph, name, own, writer)
    for layer in (0, 1):
        graph.node.append(onnx.helper.make_node("Identity", [f"own.{layer}"], [f"window_v.{1 - layer}.next"]))


def wrong_norm(graph: onnx.GraphProto) -> None:
    """The last layer has the norm of the first."""
    first, last = (f"model.model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))
    is_read_as(graph, last, first, graph.node[0])


FAULTS = (wrong_position, wrong_slot, wrong_angles, states_of_another_layer, wrong_norm)


@pytest.fixture(scope="module", params=GEOMETRIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that nothing was compared with."""
    window_size, chunk_size = GEOMETRIES[request.param]
    folder = tmp_path_factory.mktemp("right") / "bundle"
    export_model(tiny_model("llama"), folder, ExportConfig(S, window_size, chunk_size=chunk_size), check=False)
    check_export(folder, load_manifest(folder), tiny_model("llama"))
    return folder


def sealed(folder: Path) -> Path:
    """A bundle whose manifest has the hashes of its changed files."""
    manifest = dataclasses.replace(load_manifest(folder), files=hash_bundle(folder))
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("file", ["decode.onnx", "prefill.onnx"])
def test_a_fault_in_one_graph_is_found(bundle: Path, fault: Fault, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / file, load_external_data=False)
    fault(model.graph)
    (folder / file).write_bytes(model.SerializeToString())
    sealed(folder)
    with pytest.raises(UsageError, match=DIFFERS):
        check_export(folder, load_manifest(folder), tiny_model("llama"))


def test_another_weight_in_one_layer_is_found(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    graph = onnx.load(folder / "decode.onnx", load_external_data=False).graph
    tensor = next(one for one in graph.initializer if "layers.1.mlp.down_proj" in one.name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    numbers = np.memmap(
        folder / place["location"], np.float32, "r+", int(place["offset"]), (int(place["length"]) // 4,)
    )
    numbers *= 1.02
    numbers.flush()
    sealed(folder)
    with pytest.raises(UsageError, match=DIFFERS):
        check_export(folder, load_manifest(folder), tiny_model("llama"))
