"""Predictions of all tokens of a chunk, by the prefill graph of a bundle for the CPU library.

The graph gives the last token's logits alone. Here the output projection takes what the last norm gave for all tokens,
and nothing else is changed: the same nodes, the same kernels, states in the same rings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from sinkexport.evaluation.perplexity import Ids, Prediction, Predictor
from sinkrt.backends.cpu_library import checked_library
from sinkrt.contract import Manifest
from sinkrt.errors import UsageError, problem

BETWEEN = {"Gather", "GatherElements", "Reshape"}
"""Operators that pick the last token's row."""


def chunk_predictor(bundle: Path, manifest: Manifest, ids: Ids, threads: int) -> Predictor:
    """Predict the tokens of ids [N] from an empty cache, in chunks.

    Raises: UsageError for a bundle without a prefill graph, and for one whose output projection is not understood.
    """
    if "prefill" not in manifest.graphs or manifest.stream.batch != 1:
        raise UsageError(
            problem("--chunks", received=str(bundle), expected="one stream and a prefill graph", fix="export again")
        )
    path = bundle / manifest.graphs["prefill"].file
    size, vocab = manifest.stream.chunk_size, manifest.model.vocab_size
    model = onnx.load(path, load_external_data=False)
    output = _without_last_row(model.graph, (1, size, vocab))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # states that are copied are meant to be
    options.register_custom_ops_library(str(checked_library(manifest.plugin_abi)))
    with tempfile.NamedTemporaryFile(dir=bundle, suffix=".onnx") as file:  # beside the weights
        onnx.save(model, file.name)
        session = ort.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])

    def predictions() -> Iterator[Prediction]:
        states = {state.input: np.zeros(state.shape, state.dtype) for state in manifest.states}
        names = [output, *(state.output for state in manifest.states)]
        for start in range(0, len(ids) - 1, size):
            part = ids[start : min(start + size, len(ids) - 1)]
            inputs = {
                "ids": np.pad(part, (0, size - len(part)))[None],
                "position": np.array([start], np.int64),
                "num_valid": np.array([len(part)], np.int64),
            }
            logits, *after = session.run(names, {**inputs, **states})
            states = {state.input: value for state, value in zip(manifest.states, after, strict=True)}
            yield Prediction(start + 1, logits.reshape(size, -1)[: len(part)])

    return Predictor("bundle", "chunks", len(ids) - 1, predictions)


def _without_last_row(graph: onnx.GraphProto, shape: tuple[int, int, int]) -> str:
    """Let the output projection take all rows; returns the name of what it gives, the graph's first output now."""
    producers = {name: node for node in graph.node for name in node.output}
    projection = producers["logits"]
    while projection.op_type in BETWEEN:
        projection = producers[projection.input[0]]
    rows = projection.input[0]
    while (node := producers.get(rows)) is not None and node.op_type in BETWEEN:
        rows = node.input[0]
    if not projection.op_type.endswith("Linear") or rows == projection.input[0]:
        raise UsageError(
            problem(
                "--chunks",
                received=f"a graph whose logits come from {projection.op_type}",
                expected="an output projection of the last token's row",
                fix="leave out --chunks",
            )
        )
    projection.input[0] = rows
    name = projection.output[0]
    for values in (graph.output, graph.value_info):
        for i in reversed([i for i, value in enumerate(values) if value.name in ("logits", name)]):
            del values[i]
    for node in [node for node in graph.node if name in node.input or "logits" in node.output]:
        graph.node.remove(node)
    graph.output.insert(0, onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return name
