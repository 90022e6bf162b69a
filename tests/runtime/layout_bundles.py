"""Bundles of any layout of states, without torch and exporter: their graphs mix ids and states without attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sinkrt.contract import Manifest, StateSpec, TensorSpec, TokenizerFacts, hash_file
from sinkrt.contract.constants import LAYOUT_METADATA
from sinkrt.contract.layout import graph_layout

from tests.runtime.layouts import CacheSizes, Recurrent, cache, layout
from tests.runtime.toy import VOCAB_SIZE, Toy, toy_tokenizer, write_manifest

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "int64": TensorProto.INT64,
}


def kinds(batch: int = 2, chunk_size: int = 4) -> dict[str, Manifest]:
    """One layout of each kind of model, by name."""
    toy = Toy(batch=batch, chunk_size=chunk_size)
    plain, wide = CacheSizes(cache(0)), CacheSizes(cache(1, heads=(8, 4), dims=(8, 16)), window=5)
    latent = CacheSizes(cache(1, heads=(6, 1), dims=(12, 8), latent=True))
    return {
        "uniform": layout([plain, CacheSizes(cache(1))], toy=toy),
        "uneven": layout([plain, wide, CacheSizes(cache(1, 1))], toy=toy),
        "latent": layout([latent, CacheSizes(dataclasses.replace(latent.cache, layer=2), is_int8=True)], toy=toy),
        "recurrent": layout([plain], [Recurrent(1, 1, 1)], toy),
        "mixed": layout([latent], [Recurrent(0, 2, 1), Recurrent(1, 1, 0, (5,))], toy),
        "none": layout([], [Recurrent(0, 1, 1), Recurrent(1, 0, 2, ())], toy),
    }


def build_layout(folder: Path, manifest: Manifest) -> Path:
    """Write a bundle of this layout, with the toy's tokenizer, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for graph in manifest.graphs.values():
        model = _model(graph.inputs, graph.outputs, manifest.states)
        if (text := graph_layout(manifest)) is not None:
            helper.set_model_props(model, {LAYOUT_METADATA: text})
        onnx.save(model, folder / graph.file)
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    names = [*(graph.file for graph in manifest.graphs.values()), "tokenizer.json"]
    files = {name: hash_file(folder / name) for name in names}
    write_manifest(folder, dataclasses.replace(manifest, files=files, tokenizer=TokenizerFacts(names[-1], None)))
    return folder


def _model(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], states: Sequence[StateSpec]) -> onnx.ModelProto:
    """Each state is halved, and what the ids of the run add up to is added; logits show all states and the last id."""
    batch = inputs[0].shape[0]
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def add(op: str, *operands: str, output: str = "", **attributes: object) -> str:
        output = output or f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, list(operands), [output], **attributes))
        return output

    def constant(value: object, dtype: type = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), f"constant_{len(constants)}"))
        return constants[-1].name

    ids, zero = "ids", constant(0, np.int64)
    if len(inputs) == 3:  # the last of a chunk do not count
        places = constant(np.arange(inputs[0].shape[1])[None], np.int64)
        ids = add("Where", add("Less", places, "num_valid"), ids, constant(-1, np.int64))
    values = add("Gather", constant(random.standard_normal(VOCAB_SIZE)), add("Max", ids, zero))
    values = add("Where", add("GreaterOrEqual", ids, zero), values, constant(0))
    total = add("ReduceSum", values, constant([1], np.int64), keepdims=1)  # [B, 1]
    where = add("Mul", add("Cast", "position", to=TensorProto.FLOAT), constant(0.01))
    total = add("Add", total, add("Reshape", where, constant([batch, 1], np.int64)))
    logits = add("Mul", total, constant(random.standard_normal((1, VOCAB_SIZE))))
    for state in states:
        rank = len(state.shape)
        old = add("Cast", state.input, to=TensorProto.FLOAT)
        more = add("Reshape", total, constant([batch] + [1] * (rank - 1), np.int64))
        new = add("Add", add("Mul", old, constant(0.5)), more)
        new = add("Clip", new, constant(-100), constant(100))
        add("Cast", new, output=state.output, to=_TYPES[state.dtype])
        shown = add("Reshape", add("Cast", state.output, to=TensorProto.FLOAT), constant([batch, -1], np.int64))
        shown = add("ReduceMean", shown, constant([1], np.int64), keepdims=1)  # [B, 1]
        logits = add("Add", logits, add("Mul", shown, constant(random.standard_normal((1, VOCAB_SIZE)))))
    add("Identity", logits, output="logits")
    rows = [TensorSpec(state.input, (batch, *state.shape[1:]), state.dtype) for state in states]
    after = [TensorSpec(f"{spec.name}.next", spec.shape, spec.dtype) for spec in rows]
    infos = [
        [helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape) for spec in specs]
        for specs in ([*inputs, *rows], [*outputs, *after])
    ]
    graph = helper.make_graph(nodes, "layout", *infos, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
