"""name_cpu_fields: nodes of the CPU library name their fields."""

from __future__ import annotations

from sinkexport.graph.passes.name_cpu_fields import NameCpuFields
from sinkexport.graph.passes.use_cpu_attention import UseCpuAttention

from tests.exporter.graph.passes.attention_graphs import attention_graph, attention_of
from tests.exporter.graph.passes.cpu_graphs import linear_graph, linear_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, parsed


def test_a_matmul_and_attention() -> None:
    matmul = linear_graph("y = Add (s, r)")
    check_same_results(matmul, NameCpuFields())
    attention = attention_graph()
    UseCpuAttention()(attention)
    assert NameCpuFields()(attention).modified
    check_left_alone(attention, NameCpuFields())
    for node in (linear_of(matmul), attention_of(attention)):
        names = node.attributes["fields"].as_string().split(",")
        assert names == sorted(set(node.attributes) - {"fields"})


def test_a_changed_node_is_named_anew() -> None:
    model = linear_graph("y = Add (s, r)")
    NameCpuFields()(model)
    linear_of(model).attributes.pop("gated")
    assert NameCpuFields()(model).modified
    assert "gated" not in linear_of(model).attributes["fields"].as_string()


def test_left_alone() -> None:
    check_left_alone(attention_graph(), NameCpuFields())  # traced: in no library's form
    check_left_alone(parsed("y = Exp (x)", "float[2] x", "float[2] y"), NameCpuFields())
