"""Names of its fields in every node of the CPU library.

ONNX Runtime shows an operator no attribute that it does not ask for: by these names a library notices a field of a
later version, which it would leave out.
"""

from __future__ import annotations

import onnx_ir as ir

from sinkexport.graph.cpu_nodes import is_cpu_node
from sinkexport.graph.graph_pass import GraphPass
from sinkexport.graph.packed_weights import ROW_ORDER

FIELDS = "fields"


class NameCpuFields(GraphPass):
    """Write the names of all other attributes, in order and with commas between them, into ``fields``.

    What no kernel reads is not named: the order of a matrix's rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Name the fields of every node."""
        modified = False
        for node in filter(is_cpu_node, model.graph):
            names = ir.AttrString(FIELDS, ",".join(sorted(set(node.attributes) - {FIELDS, ROW_ORDER})))
            if FIELDS not in node.attributes or node.attributes[FIELDS].as_string() != names.as_string():
                node.attributes[FIELDS] = names
                modified = True
        return ir.passes.PassResult(model, modified)
