"""States are updated in place: input and output share a buffer. ONNX Runtime's scheduler does not know."""

from __future__ import annotations

from pathlib import Path

import onnx
from sinkrt.contract import Manifest


def assert_states_are_written_last(bundle: Path, manifest: Manifest) -> None:
    """What writes a state must be computed from all else that reads it, so that no order of nodes is a wrong one."""
    for role in manifest.graphs:
        graph = onnx.load(bundle / f"{role}.onnx", load_external_data=False).graph
        makers = {name: node for node in graph.node for name in node.output}
        for state in manifest.states:
            writer = makers[state.output]
            before = _ancestors(writer, makers)
            readers = [node for node in graph.node if state.input in node.input and node is not writer]
            late = [node.op_type for node in readers if not before.intersection(node.output)]
            assert not late, f"{role}: {state.input} is written by {writer.op_type} before it is read by {late}"


def _ancestors(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> set[str]:
    """Names of all values that a node is computed from."""
    found: set[str] = set()
    left = list(node.input)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += makers[name].input if name in makers else ()
    return found
