"""All fields of every node of the CPU library in one attribute.

ONNX Runtime keeps every attribute of a node twice, each in some hundred bytes, for both graphs of a bundle. And it
shows an operator no attribute that it does not ask for: a field of a later version would be left out without a word.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.cpu_nodes import is_cpu_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.packed_weights import ROW_ORDER
from sinkexport.util.node_fields import FIELDS, read_fields, shown_fields


class PackCpuFields(GraphPass):
    """Write all attributes of finished nodes as one, ``fields``.

    What no kernel reads stays by itself: the order of a matrix's rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Pack the fields of every node."""
        modified = False
        for node in filter(is_cpu_node, model.graph):
            if FIELDS in node.attributes:
                continue
            fields = read_fields(node)
            for name in set(fields) - {ROW_ORDER}:
                del node.attributes[name]
            fields.pop(ROW_ORDER, None)
            node.attributes[FIELDS] = ir.AttrString(FIELDS, shown_fields(fields))
            modified = True
        return ir.passes.PassResult(model, modified)
