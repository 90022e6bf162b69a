"""Runs a bundle for the CPU library in ONNX Runtime and shows what each of the library's nodes read and gave."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from sinkexport.graph.operators import DOMAIN
from sinkrt.contract import Manifest, load_manifest

from tests.exporter.graph.cpu_evaluator import all_fields


class Shown(NamedTuple):
    """One node of one run. inputs: all of them; states as they were before. fields: of the node."""

    name: str
    kind: str
    fields: dict[str, Any]
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]
    input_names: list[str]


class ShownGraph:
    """A graph of a bundle. Its states begin empty, and are those of one stream."""

    def __init__(self, model: onnx.ModelProto, manifest: Manifest, library: Path) -> None:
        self.manifest = manifest
        self._constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
        self._nodes = [node for node in model.graph.node if node.domain == DOMAIN]
        names = [name for node in self._nodes for name in (*node.input, *node.output)]
        given = {one.name for one in model.graph.input}
        self._shown = [name for name in dict.fromkeys(names) if name and name not in self._constants.keys() | given]
        self._outputs = [one.name for one in model.graph.output]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._shown if name not in self._outputs)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # states that are copied are meant to be
        options.register_custom_ops_library(str(library))
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, np.ndarray], states: dict[str, np.ndarray]) -> tuple[np.ndarray, list[Shown]]:
        """Logits [1, vocab] and the nodes, in the graph's order. states: by input, replaced by those afterwards."""
        wanted = list(dict.fromkeys((*self._outputs, *self._shown)))
        feeds = {**inputs, **states}
        known = {one.name for one in self._session.get_inputs()}
        found = dict(
            zip(wanted, self._session.run(wanted, {k: v for k, v in feeds.items() if k in known}), strict=True)
        )
        values = {**self._constants, **feeds, **found}
        nodes = [
            Shown(
                name=node.output[0],
                kind=node.op_type,
                fields=node_fields(node),
                inputs=[values[name] for name in node.input],
                outputs=[values[name] for name in node.output],
                input_names=list(node.input),
            )
            for node in self._nodes
        ]
        for state in self.manifest.states:
            if state.output in found:
                states[state.input] = found[state.output]
        return found["logits"], nodes


class ShownBundle:
    """Steps and chunks of a bundle of one stream, by kernels of one instruction set. nodes: of the last run."""

    def __init__(self, folder: Path, library: Path, isa: str) -> None:
        self.manifest = load_manifest(folder)
        self.nodes: list[Shown] = []
        models = {role: onnx.load(folder / graph.file) for role, graph in self.manifest.graphs.items()}
        with kernels(isa):
            self._graphs = {role: ShownGraph(model, self.manifest, library) for role, model in models.items()}
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.position = 0
        self._states = {state.input: np.zeros(state.shape, state.dtype) for state in self.manifest.states}

    def step(self, token: int) -> np.ndarray:
        """Logits [vocab] after one more token."""
        return self._run("decode", {"ids": np.array([[token]], np.int64)}, 1)

    def chunk(self, ids: np.ndarray) -> np.ndarray:
        """Logits [vocab] after up to chunk_size more tokens."""
        size = self.manifest.stream.chunk_size
        padded = np.pad(ids, (0, size - len(ids)))[None].astype(np.int64)
        return self._run("prefill", {"ids": padded, "num_valid": np.array([len(ids)], np.int64)}, len(ids))

    def _run(self, role: str, inputs: dict[str, np.ndarray], count: int) -> np.ndarray:
        position = np.array([self.position], np.int64)
        logits, self.nodes = self._graphs[role].run({**inputs, "position": position}, self._states)
        self.position += count
        return logits.reshape(-1)


@contextlib.contextmanager
def kernels(isa: str) -> Iterator[None]:
    """Sessions that are loaded meanwhile use kernels of one instruction set."""
    with mock.patch.dict(os.environ, {"SINKEXPORT_CPU_ISA": isa}):
        yield


def node_fields(node: onnx.NodeProto) -> dict[str, Any]:
    """Fields of a node by name."""
    return all_fields({one.name: onnx.helper.get_attribute_value(one) for one in node.attribute})
