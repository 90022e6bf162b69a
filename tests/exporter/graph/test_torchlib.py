"""torch's table of ONNX forms is the same, however it is made."""

from __future__ import annotations

import onnxscript
from onnxscript.function_libs.torch_lib.ops import core
from sinkexport.graph.torchlib import PARSED, quick_table


def test_a_function_has_its_domain_without_being_parsed() -> None:
    function, slow = core.aten_addmm, vars(onnxscript.TracedOnnxFunction)[PARSED]
    with quick_table():
        quick = function.function_ir
        assert vars(quick) == {"domain": function.opset.domain}
    assert function.function_ir.domain == quick.domain
    assert vars(onnxscript.TracedOnnxFunction)[PARSED] is slow
