"""Traces that torch's converter need not trace again to decompose their operators, as none would change."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

OWN_DOMAINS = ("sinkexport", "onnx")
"""Namespaces of operators that are translated as they are."""

KEPT = frozenset(
    (
        aten.add.Tensor,
        aten.clamp.default,
        aten.div.Tensor,
        aten.embedding.default,
        aten.expand.default,
        aten.gather.default,
        aten.gelu.default,
        aten.layer_norm.default,
        aten.linear.default,
        aten.matmul.default,
        aten.mean.dim,
        aten.mul.Tensor,
        aten.permute.default,
        aten.pow.Tensor_Scalar,
        aten.rsqrt.default,
        aten.select.int,
        aten.silu.default,
        aten.slice.Tensor,
        aten.sub.Tensor,
        aten.tanh.default,
        aten.transpose.int,
        aten.type_as.default,
        aten.unsqueeze.default,
        aten.view.default,
    )
)
"""Operators that a second trace leaves as they are, found by comparing both ways in all families that are tested."""

NO_OPS = frozenset((aten.to.dtype, aten.contiguous.default))
"""Operators that hand on what they are given where it is as they make it."""

RESHAPES = frozenset((aten.reshape.default, aten.flatten.using_ints))
"""Operators that are a view of a tensor without gaps."""


def without_second_trace(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program`, whose `run_decompositions` renames nodes where no operator has anything to decompose.

    torch's converter calls it with its table of decompositions. It would run each operator once more, which takes as
    long as the first trace. program: functional (model/fold_rotation.py), without nodes that nothing reads.
    """
    program.run_decompositions = functools.partial(_decomposed, program)
    return program


def _decomposed(
    program: torch.export.ExportedProgram, table: Container[Any] | None = None, **others: Any
) -> torch.export.ExportedProgram:
    nodes = [node for node in program.graph_module.graph.nodes if node.op not in ("placeholder", "output")]
    if others or table is None or not all(_stays(node, table) for node in nodes):
        return torch.export.ExportedProgram.run_decompositions(program, table, **others)
    _renumber(program.graph_module)
    results = program.graph_module.graph.output_node().args[0]
    for spec, node in zip(program.graph_signature.output_specs, results, strict=True):
        spec.arg = dataclasses.replace(spec.arg, name=node.name)
    return program


def _stays(node: Node, table: Container[Any]) -> bool:
    """Whether a second trace would have the same node, but for its name, or a plain view or nothing in its place."""
    if node.op != "call_function":
        return False
    target = node.target
    if target is operator.getitem or getattr(target, "namespace", "") in OWN_DOMAINS:
        return True
    return (target in KEPT and target not in table) or _is_no_op(node) or _is_view(node)


def _is_no_op(node: Node) -> bool:
    """Whether a cast or a copy has nothing to do."""
    source = node.args[0] if node.args else None
    if node.target not in NO_OPS or not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return (before.dtype, before.shape, before.stride()) == (after.dtype, after.shape, after.stride())


def _is_view(node: Node) -> bool:
    """Whether a reshape needs no copy."""
    source = node.args[0] if node.args else None
    if node.target not in RESHAPES or not isinstance(source, Node):
        return False
    value = source.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_contiguous()


def _renumber(module: torch.fx.GraphModule) -> None:
    """Give nodes the names that a second trace gives, and casts and reshapes the forms."""
    graph, copies = Graph(), dict[Node, Node]()
    parts: dict[Node, list[Node]] = {}  # by node with several results, the nodes that take each of them
    for node in module.graph.nodes:
        if node.op == "call_function" and _is_no_op(node):
            copies[node] = copies[node.args[0]]
            continue
        if node.target is operator.getitem and node.args[0] in parts:
            copies[node] = parts[node.args[0]][node.args[1]]
        else:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            target = node.target
            if node.op == "call_function" and _is_view(node):
                shape = args[1] if target is aten.reshape.default else list(node.meta["val"].shape)
                target, args = aten.view.default, (args[0], shape)
            copies[node] = graph.create_node(node.op, target, args, kwargs, _name(node, target), node.type)
            results = node.meta.get("val")
            if node.op == "call_function" and isinstance(results, list | tuple):
                parts[node] = [
                    graph.create_node("call_function", operator.getitem, (copies[node], index))
                    for index in range(len(results))
                ]
        copies[node].meta = node.meta
    for part in (one for each in parts.values() for one in each if not one.users):
        graph.erase_node(part)
    graph.set_codegen(module.graph._codegen)
    module.graph = graph


def _name(node: Node, target: Any) -> str | None:
    """Name of a node but for its number. None: what torch makes of its target."""
    if node.op != "call_function":
        return node.name
    if target is operator.getitem:
        return None
    return re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", target.overloadpacket.__name__).lower()
