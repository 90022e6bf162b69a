"""The operators of domain ``ai.sinkexport``: their names, and the schemas of those that are traced."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from typing import Any

import onnx.defs
from sinkrt.contract import MASS_KIND, SCALE_KINDS, STATE_KINDS
from sinkrt.contract.constants import OPERATOR_DOMAIN

DOMAIN = OPERATOR_DOMAIN
VERSION = 1
SINK_ATTENTION = "SinkAttention"
STREAM_ANGLES = "StreamAngles"
BLOCK_ATTENTION = "BlockAttention"
"""The block mode of SinkAttention: frames of video or audio (model/block_attention.py)."""
EXPERT_MATMUL = "ExpertMatmul"
"""Matmul by the matrices of MoE experts (model/experts.py)."""
LAYER_MARK = "LayerMark"
"""Where a decoder layer begins, ends or is left out (model/repeated_layers.py); no finished graph has one."""
INT8_LINEAR, INT8_ROWS = "Int8Linear", "Int8Rows"
"""Matmuls by INT8 weights and rows of INT8 tables, of the TensorRT plugin: made by a graph pass, never traced."""
HALF_LINEAR = "HalfLinear"
"""Matmuls by float16 weights, likewise."""
HALF_EXPERT_LINEAR, INT8_EXPERT_LINEAR = "HalfExpertLinear", "Int8ExpertLinear"
INT4_EXPERT_LINEAR = "Int4ExpertLinear"
"""Matmuls by the matrices of chosen experts, float16, INT8 or INT4, likewise."""
RMS_NORM, GATED_ACTIVATION = "RmsNorm", "GatedActivation"
"""What is between matmuls, of the TensorRT plugin: made by graph passes, never traced."""
FLOAT_LINEAR, INT4_LINEAR = "FloatLinear", "Int4Linear"
"""Matmuls of the CPU library (plugins/cpu), which has an Int8Linear too: made by graph passes, never traced.

The TensorRT plugin has an Int4Linear of its own, with other fields and layout.
"""
BF16_LINEAR, BF16_ROWS, BF16_EXPERT_LINEAR = "Bf16Linear", "Bf16Rows", "Bf16ExpertLinear"
"""The same with weights in bfloat16, likewise."""
FLOAT_ROWS, INT4_ROWS = "FloatRows", "Int4Rows"
"""Rows of tables of the CPU library, which has Int8Rows too, likewise; the TensorRT plugin has Int4Rows of its own."""
FLOAT_EXPERT_LINEAR = "FloatExpertLinear"
"""Matmul by the matrices of chosen experts of the CPU library, which has an Int8ExpertLinear too, likewise."""


class Input(enum.IntEnum):
    """Inputs of SinkAttention by index. BlockAttention has the first ten, and then the oldest block."""

    Q = 0
    K = 1
    V = 2
    SINK_K = 3
    SINK_V = 4
    WINDOW_K = 5
    WINDOW_V = 6
    POSITION = 7
    SHIFT_COS = 8
    SHIFT_SIN = 9
    NUM_VALID = 10
    OLDEST = 10
    WINDOW_K_SCALE = 11
    WINDOW_V_SCALE = 12
    ALIBI_SLOPES = 13
    SINK_LOGIT = 14
    SINK_SCALE = 15
    AFFINE_SCALE = 16
    AFFINE_BIAS = 17
    ATTENTION_MASS = 18
    CALIBRATED = 19


SCALE_TYPE = "tensor(float16)"
_FLOATS = ["tensor(float)", "tensor(float16)"]
_Parameter = onnx.defs.OpSchema.FormalParameter
_Attribute = onnx.defs.OpSchema.Attribute
_Option = onnx.defs.OpSchema.FormalParameterOption


def _schema(name: str, inputs: list[Any], outputs: list[Any], attributes: dict[str, Any]) -> onnx.defs.OpSchema:
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[("T", _FLOATS, "Weights and sinks"), ("TW", [*_FLOATS, "tensor(int8)"], "Window")],
        attributes=[_Attribute(key, kind) for key, kind in attributes.items()],
    )


@functools.cache
def schemas() -> Mapping[str, onnx.defs.OpSchema]:
    """The traced operators by name. Inputs and attributes are explained at their torch form (model/)."""
    kinds = onnx.defs.OpSchema.AttrType
    stream_angles = _schema(
        STREAM_ANGLES,
        [_Parameter("position", "tensor(int64)"), _Parameter("frequency", "tensor(int64)")],
        [_Parameter(name, "tensor(float)") for name in ("cos", "sin")],
        {"num_tokens": kinds.INT, "behind": kinds.INT},
    )
    block_attention = _schema(
        BLOCK_ATTENTION,
        [
            *(_Parameter(name, "T") for name in ("q", "k", "v")),
            *(_optional(name, "T") for name in STATE_KINDS[:2]),
            *(_Parameter(name, "TW") for name in STATE_KINDS[2:]),
            _Parameter("position", "tensor(int64)"),
            *(_optional(name, "T") for name in ("shift_cos", "shift_sin")),
            _Parameter("oldest", "tensor(int64)"),
        ],
        [
            *(_Parameter(name, "T") for name in ("out", "next_sink_k", "next_sink_v")),
            *(_Parameter(name, "TW") for name in ("next_window_k", "next_window_v")),
        ],
        {"scale": kinds.FLOAT, "interleaved": kinds.INT},
    )
    expert_matmul = _schema(
        EXPERT_MATMUL,
        [
            *(_Parameter(name, "T") for name in ("x", "weight")),
            _optional("picks", "tensor(int64)"),
        ],
        [_Parameter("out", "T")],
        {"is_transposed": kinds.INT, "in_place": kinds.INT},
    )
    layer_mark = _schema(
        LAYER_MARK, [_Parameter("hidden", "T")], [_Parameter("same", "T")], {"layer": kinds.INT, "role": kinds.INT}
    )
    every = (_sink_attention(), stream_angles, block_attention, expert_matmul, layer_mark)
    return {schema.name: schema for schema in every}


def _optional(name: str, kind: str) -> Any:
    return _Parameter(name, kind, "", param_option=_Option.Optional)


def _sink_attention() -> onnx.defs.OpSchema:
    kinds = onnx.defs.OpSchema.AttrType
    return _schema(
        SINK_ATTENTION,
        [
            *(_Parameter(name, "T") for name in ("q", "k")),
            *(_optional(name, "T") for name in ("v", "sink_k", "sink_v")),
            _Parameter("window_k", "TW"),
            _optional("window_v", "TW"),
            _Parameter("position", "tensor(int64)"),
            *(_optional(name, "T") for name in ("shift_cos", "shift_sin")),
            _optional("num_valid", "tensor(int64)"),
            *(_optional(name, SCALE_TYPE) for name in SCALE_KINDS),
            _optional("alibi_slopes", "tensor(float)"),
            _optional("sink_logit", "T"),
            _optional("sink_scale", "tensor(float)"),
            *(_optional(name, "T") for name in ("affine_scale", "affine_bias")),
            _optional(MASS_KIND, "tensor(float)"),
            _optional("calibrated", "tensor(float)"),
        ],
        [
            *(_Parameter(name, "T") for name in ("out", "next_sink_k", "next_sink_v")),
            *(_Parameter(name, "TW") for name in ("next_window_k", "next_window_v")),
            *(_Parameter(f"next_{name}", SCALE_TYPE) for name in SCALE_KINDS),
            _Parameter(f"next_{MASS_KIND}", "tensor(float)"),
        ],
        {
            "scale": kinds.FLOAT,
            "softcap": kinds.FLOAT,
            "interleaved": kinds.INT,
            "act_alpha": kinds.FLOAT,
            "act_beta": kinds.FLOAT,
            "act_min_queries": kinds.INT,
            "latent_dim": kinds.INT,
        },
    )
