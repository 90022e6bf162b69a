"""Remove the identity rotation from a trace: x * 1 + turned(x) * 0 is x.

Works on any family's rotary code, since it follows values and not names: what stems from the handed-out cos is
known to be all ones, from sin all zeros, and multiplying, adding, slicing and joining with those is resolved. Code that
rotates complex numbers multiplies them by 1 + 0i, and making them of pairs and pairs of them again is resolved as well.
A rotation that is not recognised stays in the graph: slower, never wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from sinkrt.errors import UsageError, problem
from torch.fx import Graph, GraphModule, Node

from sinkexport.families.rope import HANDED_COMPLEX, HANDED_COS, HANDED_SIN

aten = torch.ops.aten

_KEEPS_CONTENT = frozenset(
    (
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.view.default,
        aten.reshape.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.clone.default,
        aten.repeat_interleave.self_int,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten._to_copy.default,
        aten.transpose.int,
    )
)


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program without operators that write in place: each value has one writer.

    An in-place operator often has no user: what it wrote is read through another name of the same memory. Passes that
    follow values would take it for dead. Where there is none, the program is handed back as it is.

    Raises: UsageError if an operator that writes in place is left, or if the model writes into tensors of its own:
        that is a state which a bundle would not have.
    """
    if _writes_in_place(program):
        program = program.run_decompositions({})
    _refuse_writes(program)
    return program


def _writes_in_place(program: torch.export.ExportedProgram) -> list[str]:
    """Operators of `program` that write into their arguments."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.nodes if _is_mutable(node)]


def _is_mutable(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and bool(getattr(schema, "is_mutable", False))


def _refuse_writes(program: torch.export.ExportedProgram) -> None:
    signature = program.graph_signature
    written = (
        signature.buffers_to_mutate,
        getattr(signature, "parameters_to_mutate", {}),
        signature.user_inputs_to_mutate,
    )
    found = [f"'{name}'" for names in written for name in names.values()] or _writes_in_place(program)
    if found:
        raise UsageError(
            problem(
                "model",
                received=f"code that writes into {found[0]} from token to token",
                expected="no state but that of attention and of known recurrent layers",
                fix="this model cannot be exported exactly",
            )
        )


def fold_rotation(program: torch.export.ExportedProgram) -> int:
    """Simplify `program`, which must be `functional`, in place. Returns the number of nodes removed.

    Raises: UsageError as `functional`.
    """
    _refuse_writes(program)
    graph = program.graph_module.graph
    before = len(graph.nodes)
    uniform = _handed_out(program)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        _drop_no_op(node)
        known = _uniform_value(node, uniform)
        if known is not None:
            uniform[node] = known
        elif (replacement := _simplified(node, uniform)) is not None:
            node.replace_all_uses_with(replacement)
    _join_adjacent_slices(graph)
    for node in reversed(list(graph.nodes)):
        # Asserts on metadata have no users and no effect on values; custom operators always have users here.
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    program.graph_module.recompile()
    return before - len(graph.nodes)


def _handed_out(program: torch.export.ExportedProgram) -> dict[Node, float]:
    """The placeholders of `HandedOutRotary`."""
    values: dict[Node, float] = {}
    buffers = program.graph_signature.inputs_to_buffers
    for node in program.graph_module.graph.nodes:
        name = buffers.get(node.name, "") if node.op == "placeholder" else ""
        if f".{HANDED_COS}" in name or f".{HANDED_COMPLEX}" in name:
            values[node] = 1.0
        elif f".{HANDED_SIN}" in name:
            values[node] = 0.0
    return values


_SHAPES = frozenset((aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int))

_COPIES = frozenset(
    (
        aten.to.dtype,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.dropout.default,
        aten._to_copy.default,
        aten.detach.default,
        aten.slice.Tensor,
    )
)


def _drop_no_op(node: Node) -> None:
    """Casts to the type that a tensor has, slices of all of it, and dropout or clones that change nothing."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or node.target not in _COPIES:
        return
    if node.target is aten.dropout.default and node.args[2]:
        return
    if node.target is aten.clone.default and node.kwargs:  # to another layout in memory, which a view may need
        return
    if _same_tensor(source, node):
        node.replace_all_uses_with(source)


def _uniform_value(node: Node, uniform: dict[Node, float]) -> float | None:
    """The one number that all elements of `node` have, if that is known."""
    known = [uniform.get(arg) if isinstance(arg, Node) else None for arg in node.args]
    if node.target in (aten.ones_like.default, aten.ones.default):
        return 1.0
    if node.target in _KEEPS_CONTENT:
        return known[0]
    if node.target is aten.cat.default:
        parts = {uniform.get(part) for part in node.args[0]}
        return parts.pop() if len(parts) == 1 else None
    if node.target is aten.neg.default and known[0] is not None:
        return -known[0] + 0.0
    if node.target is aten.mul.Tensor and 0.0 in known:
        return 0.0
    folds: dict[Any, Callable[..., float]] = {
        aten.mul.Tensor: operator.mul,
        aten.add.Tensor: operator.add,
        aten.sub.Tensor: operator.sub,
    }
    if node.target in folds and len(known) == 2 and not node.kwargs and None not in known:
        return folds[node.target](*known)
    return None


def _simplified(node: Node, uniform: dict[Node, float]) -> Node | None:
    """Operand that `node` equals if the other is all ones or all zeros, or what it makes back of it."""
    if (made_of := _undone(node)) is not None:
        return made_of
    if node.target not in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
        return None
    left, right = node.args
    neutral = 1.0 if node.target is aten.mul.Tensor else 0.0
    if isinstance(right, Node) and uniform.get(right) == neutral and _same_tensor(left, node):
        return left
    if node.target is not aten.sub.Tensor and isinstance(left, Node) and uniform.get(left) == neutral:
        return right if _same_tensor(right, node) else None
    return None


_OF_COMPLEX = "sinkexport_pairs_of_complex"
"""Mark of pairs that were made into complex numbers and are pairs again."""


def _undone(node: Node) -> Node | None:
    """What a node makes again of complex numbers that nothing has happened to: pairs, or the shape before the pairs."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not source.args or not isinstance(source.args[0], Node):
        return None
    origin = source.args[0]
    if node.target is aten.view_as_real.default and source.target is aten.view_as_complex.default:
        origin.meta[_OF_COMPLEX] = True
        return origin if _same_tensor(origin, node) else None
    if node.target in _SHAPES and source.target in _SHAPES and _OF_COMPLEX in source.meta:
        return origin if _same_tensor(origin, node) else None
    return None


def _join_adjacent_slices(graph: Graph) -> None:
    """cat(x[..., :r], x[..., r:]) is x: what partial rotary leaves behind."""
    for node in list(graph.nodes):
        if node.target is not aten.cat.default:
            continue
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        source = _sliced_whole(list(parts), int(dim), node)
        if source is not None:
            node.replace_all_uses_with(source)


def _sliced_whole(parts: list[Any], dim: int, node: Node) -> Node | None:
    source, end = None, 0
    rank = node.meta["val"].dim()
    parts = [part for part in parts if part.meta["val"].numel()]  # a head that turns whole has an empty rest
    if len(parts) == 1 and _same_tensor(parts[0], node):
        return parts[0]
    for part in parts:
        if not isinstance(part, Node) or part.target is not aten.slice.Tensor or len(part.args) > 4:
            return None
        origin, axis, start, stop = (*part.args, 0, None, None)[:4] if len(part.args) < 4 else part.args
        if source not in (None, origin) or int(axis) % rank != dim % rank or start != end:
            return None
        source, end = origin, stop
    if isinstance(source, Node) and _same_tensor(source, node):
        return source
    return None


def _same_tensor(candidate: Any, node: Node) -> bool:
    """Same shape and type: replacing cannot hide a broadcast or a cast."""
    if not isinstance(candidate, Node):
        return False
    a, b = candidate.meta.get("val"), node.meta.get("val")
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
