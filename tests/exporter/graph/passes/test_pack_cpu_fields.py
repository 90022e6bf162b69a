"""pack_cpu_fields: nodes of the CPU library have all fields in one attribute."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sinkexport.graph.passes.pack_cpu_fields import PackCpuFields
from sinkexport.graph.passes.use_cpu_attention import UseCpuAttention
from sinkexport.util.node_fields import read_fields, shown_fields

from tests.exporter.graph.passes.attention_graphs import attention_graph, attention_of
from tests.exporter.graph.passes.cpu_graphs import linear_graph, linear_of
from tests.exporter.graph.passes.pass_checks import check_left_alone, check_same_results, parsed


def test_a_matmul() -> None:
    model = linear_graph("y = Add (s, r)")
    before = read_fields(linear_of(model))
    check_same_results(model, PackCpuFields())
    assert set(linear_of(model).attributes) == {"fields"}
    assert read_fields(linear_of(model)) == pytest.approx(before)


def test_attention() -> None:
    model = attention_graph()
    UseCpuAttention()(model)
    before = read_fields(attention_of(model))
    assert PackCpuFields()(model).modified
    assert set(attention_of(model).attributes) == {"fields"}
    assert read_fields(attention_of(model)) == before
    check_left_alone(model, PackCpuFields())


def test_the_order_of_rows_stays_by_itself() -> None:
    model = linear_graph("y = Add (s, r)")
    linear_of(model).attributes["row_order"] = ir.AttrString("row_order", "2:1,0:2")
    PackCpuFields()(model)
    assert linear_of(model).attributes["row_order"].as_string() == "2:1,0:2"
    assert "row_order" not in linear_of(model).attributes["fields"].as_string()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-5, 1 / 3, 3e38, 1e-45, -2.5])
def test_numbers_keep_every_bit(value: float) -> None:
    name, _, text = shown_fields({"scale": value}).partition("=")
    assert name == "scale"
    assert np.float32(float(text)) == np.float32(value)
    assert not text.lstrip("-").isdigit()


def test_left_alone() -> None:
    check_left_alone(attention_graph(), PackCpuFields())  # traced: in no library's form
    check_left_alone(parsed("y = Exp (x)", "float[2] x", "float[2] y"), PackCpuFields())
