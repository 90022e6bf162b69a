"""What reads the kernels' headers, and what compares two builds of them."""

from __future__ import annotations

import ctypes

import pytest

from plugins.capi import header
from plugins.capi.kernels import SinkAttentionParams
from plugins.tools.compare_machine_code import Kernel, compare

STRUCT = """
// A comment; struct Other {
struct Params {
  int num_rows = 0;  // M; of x
  DType dtype = DType::kFloat16;
  bool is_late = false;

  const void* x = nullptr;
  const float* scale =
      nullptr;  // [N]
};
"""


def test_fields_are_those_of_the_header(tmp_path):
    (tmp_path / "one.h").write_text(STRUCT)
    assert header.fields("one.h", "Params", tmp_path) == [
        ("num_rows", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("is_late", ctypes.c_bool),
        ("x", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
    ]


def test_types_that_nobody_expects_are_refused(tmp_path):
    (tmp_path / "one.h").write_text("struct Params {\n  double x = 0;\n};\n")
    with pytest.raises(ValueError, match=r"one\.h: received 'double x = 0', expected a number, an enumeration or"):
        header.fields("one.h", "Params", tmp_path)
    with pytest.raises(ValueError, match=r"one\.h: received no struct Other, expected one"):
        header.fields("one.h", "Other", tmp_path)


def test_the_kernels_own_headers():
    names = [name for name, _ in SinkAttentionParams._fields_]
    assert names[:3] == ["batch", "num_tokens", "num_q_heads"]
    assert names[-1] == "out"
    assert header.DTYPES == {"float16": 0, "bfloat16": 1}
    assert header.WEIGHT_TYPES == {"int8": 0, "half": 1, "int4": 2}
    assert header.ACTIVATIONS == {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def test_kernels_are_compared_by_code_and_name():
    add, multiply = Kernel("ab" * 32, "8 registers"), Kernel("cd" * 32, "9 registers")
    assert compare({"add": add, "multiply": multiply}, {"multiply": multiply, "add": add}) == (2, 0, [])
    assert compare({"add": add, "multiply": multiply}, {"plus": add, "multiply": multiply}) == (1, 1, [])
    before, after = {"add": add, "twice": add}, {"plus": add, "twice": multiply}
    assert compare(before, after) == (
        0,
        1,
        ["twice\n  before: 2 instructions, 8 registers\n  after:  2 instructions, 9 registers"],
    )
