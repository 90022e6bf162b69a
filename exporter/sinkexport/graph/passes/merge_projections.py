"""Join projections of one input into one MatMul and a Split (q, k, v; gate, up).

A decode step reads every weight once, so its speed is that of memory. Fewer, larger matmuls reach more of the
bandwidth and leave fewer nodes. Weights stay lazy: they are joined while the weights file is written.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from sinkexport.graph.builder import Builder
from sinkexport.graph.edit import is_weight, known_shape, lazy_weight
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.matmuls import ROWS, bias_addition, module_of, weight_operand
from sinkexport.graph.operators import DOMAIN, SINK_ATTENTION

_ON_THE_WAY = frozenset(
    (
        *("Add", "Mul", "Clip", "RMSNormalization", "LayerNormalization", "RotaryEmbedding"),
        *("Split", "Slice", "Gather", "Reshape", "Concat", "Squeeze", "Unsqueeze", "Transpose"),
    )
)
"""Operators between projections and attention."""


class MergeProjections(GraphPass):
    """MatMuls of one input with weights that nothing else reads become one MatMul and a Split.

    Biases are joined as well if every one of them has one. With a plan only weights of one kind are joined. For the CPU
    library what attention reads is one matmul, and what else reads the input another: its nodes take results whole.
    Both read one input where blocks lie side by side, as Cohere's do.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Join what reads one input."""
        plan = self.context.plan
        apart = self.context.target.has_cpu_library
        by_input: dict[tuple[ir.Value, object, bool], list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            x, weight = _operands(node)
            if x is not None and weight is not None and len(known_shape(weight)) == 2 and len(weight.uses()) == 1:
                kind = None if plan is None else plan.kind(module_of(str(weight.name)))
                by_input[x, kind, apart and _feeds_attention(node.outputs[0])].append(node)
        groups = [(x, matmuls) for (x, *_), matmuls in by_input.items() if len(matmuls) > 1]
        for x, matmuls in groups:
            _merge(model.graph, x, matmuls)
        return ir.passes.PassResult(model, bool(groups))


def _feeds_attention(value: ir.Value) -> bool:
    """Whether a SinkAttention reads a value, maybe normalised, rotated and viewed."""
    for use in value.uses():
        if use.node.domain == DOMAIN and use.node.op_type == SINK_ATTENTION:
            return True
        if not use.node.domain and use.node.op_type in _ON_THE_WAY and any(map(_feeds_attention, use.node.outputs)):
            return True
    return False


def _operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """x and W of ``x @ W`` with a constant W; else None."""
    if node.domain or node.op_type != "MatMul" or not is_weight(node.inputs[1]):
        return None, None
    return node.inputs[0], node.inputs[1]


def _merge(graph: ir.Graph, x: ir.Value, matmuls: list[ir.Node]) -> None:
    weights = [weight for node in matmuls if (weight := node.inputs[1]) is not None]
    widths = [known_shape(w)[1] for w in weights]
    results = [node.outputs[0] for node in matmuls]
    additions = [bias_addition(result) for result in results]
    b = Builder(graph)
    value = b.matmul(x, _joined(graph, weights))
    replaced = list(matmuls)
    if all(addition is not None for addition in additions):
        biases = [bias for addition in additions if (bias := weight_operand(addition)) is not None]
        value = b.op("Add", [value, _joined(graph, biases)])
        results = [addition.outputs[0] for addition in additions if addition is not None]
        replaced += [addition for addition in additions if addition is not None]
    parts = b.split(value, widths, -1)
    graph.insert_before(matmuls[0], b.nodes)
    for part, result in zip(parts, results, strict=True):
        ir.convenience.replace_all_uses_with(result, part, replace_graph_outputs=True)
    graph.remove(list(reversed(replaced)), safe=True)


def _joined(graph: ir.Graph, weights: list[ir.Value]) -> ir.Value:
    """Weights side by side along the last axis."""
    sources = [weight.const_value for weight in weights]
    name = "+".join(str(weight.name) for weight in weights)
    *rest, _ = known_shape(weights[0])
    width = sum(known_shape(weight)[-1] for weight in weights)
    joined = lazy_weight(
        graph,
        name,
        weights[0].dtype,  # type: ignore[arg-type]
        (*rest, width),
        lambda: np.concatenate([source.numpy() for source in sources], axis=-1),  # type: ignore[union-attr]
    )
    if all(ROWS in weight.meta for weight in weights):
        joined.meta[ROWS] = tuple(row for weight in weights for row in weight.meta[ROWS])
    return joined
