"""Graphs whose states share a buffer with what becomes of them: every order of nodes must be a right one."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import parser
from sinkexport.graph.state_order import check_state_order
from sinkrt.errors import UsageError

GOOD = {
    "read, then written": "h = Mul(state, a)  y = MatMul(h, w)  state_next = Add(h, x)",
    "element by element": "state_next = Add(state, x)  y = MatMul(state_next, w)",
    "a copy": "h = Slice(state, a, b)  state_next = Concat<axis=1>(h, x)  y = Mul(state_next, w)",
    "views": "v = Reshape(state, s)  h = Mul(v, a)  state_next = Reshape(h, s)  y = Mul(h, w)",
    "unread": "state_next = Identity(x)  y = Mul(x, w)",
}
BAD = {
    "read at any time": ("state_next = Add(state, x)  y = MatMul(state, w)", "MatMul may read it after Add"),
    "a view read at any time": (
        "v = Reshape(state, s)  state_next = Mul(v, x)  y = MatMul(v, w)",
        "MatMul may read it after Mul",
    ),
    "written while it is read": ("state_next = MatMul(state, w)  y = Mul(x, w)", "MatMul reads it while it is written"),
    "rolled": ("state_next = Concat<axis=1>(state, x)  y = Mul(x, w)", "Concat reads it while it is written"),
}


def check(body: str) -> None:
    text = f"""<ir_version: 11, opset_import: ["": 24]>
    g (float[2, 2] state, float[2, 2] x, float[2, 2] w, float[2, 2] a, int64[1] b, int64[2] s)
      => (float[2, 2] y, float[2, 2] state_next) {{ {body} }}"""
    check_state_order(ir.from_proto(parser.parse_model(text)).graph, {"state": "state_next"})


@pytest.mark.parametrize("name", GOOD)
def test_states_written_last(name: str) -> None:
    check(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_states_that_may_be_read_too_late(name: str) -> None:
    body, reason = BAD[name]
    with pytest.raises(UsageError, match=f"state 'state': received {reason}"):
        check(body)
