"""The order in which a graph reads and writes a state: input and output are one buffer, which ONNX Runtime ignores.

Nodes run in any order that their data allows. So whatever reads a state must lead to the node that writes it.
"""

from __future__ import annotations

import onnx_ir as ir
from sinkrt.errors import UsageError, problem

from sinkexport.graph.operators import SINK_ATTENTION

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators whose output may be the memory of their input."""

WRITES_IN_PLACE = frozenset({"Where", "Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "TensorScatter", SINK_ATTENTION})
"""Operators that read each element of a state before they write it, and no other element after that.

SinkAttention is the CPU library's node, which writes its states last or tracks what it has written."""


def check_state_order(graph: ir.Graph, states: dict[str, str]) -> None:
    """Make sure that no order of nodes writes a state that is still read. states: output by input, names.

    Raises: UsageError naming the state.
    """
    outputs = {value.name: value for value in graph.outputs}
    inputs = {value.name: value for value in graph.inputs}
    for before, after in states.items():
        writer = outputs[after].producer()
        if writer is None:  # the state itself: nothing changes
            continue
        earlier = _ancestors(writer)
        for reader in _readers(inputs[before]):
            if reader is writer and writer.op_type not in WRITES_IN_PLACE | VIEWS:
                _refuse(before, f"{writer.op_type} reads it while it is written")
            if reader is not writer and reader not in earlier:
                _refuse(before, f"{reader.op_type} may read it after {writer.op_type} has written it")


def _readers(state: ir.Value) -> list[ir.Node]:
    """Nodes that read a state or a view of it; views count too."""
    found: list[ir.Node] = []
    for node in {use.node: None for use in state.uses()}:
        found.append(node)
        if node.op_type in VIEWS and node.inputs[0] is state:
            found += _readers(node.outputs[0])
    return found


def _ancestors(node: ir.Node) -> set[ir.Node]:
    """Nodes that a node is computed from."""
    found: set[ir.Node] = set()
    left = [node]
    while left:
        for value in left.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in found:
                found.add(producer)
                left.append(producer)
    return found


def _refuse(state: str, received: str) -> None:
    raise UsageError(
        problem(
            f"state '{state}'",
            received=received,
            expected="a graph that writes each state last",
            fix="report this model: it cannot be exported exactly",
        )
    )
