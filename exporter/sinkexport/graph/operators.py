"""The operators of domain ``ai.sinkexport`` as ONNX schemas, and their translation from the traced torch form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import onnx.defs
import onnxscript
import torch
from sinkrt.contract import MASS_KIND, SCALE_KINDS, STATE_KINDS

import sinkexport.model.attention
import sinkexport.model.block_attention
import sinkexport.model.experts  # noqa: F401 - all three register the torch operators that are translated

DOMAIN = "ai.sinkexport"
VERSION = 1
SINK_ATTENTION = "SinkAttention"
STREAM_ANGLES = "StreamAngles"
BLOCK_ATTENTION = "BlockAttention"
"""The block mode of SinkAttention: frames of video or audio (model/block_attention.py)."""
EXPERT_MATMUL = "ExpertMatmul"
"""Matmul by the matrices of MoE experts (model/experts.py)."""
INT8_LINEAR, INT8_ROWS = "Int8Linear", "Int8Rows"
"""Matmuls by INT8 weights and rows of INT8 tables, of the TensorRT plugin: made by a graph pass, never traced."""
HALF_LINEAR = "HalfLinear"
"""Matmuls by float16 weights, likewise."""
HALF_EXPERT_LINEAR, INT8_EXPERT_LINEAR = "HalfExpertLinear", "Int8ExpertLinear"
"""Matmuls by the matrices of chosen experts, float16 or INT8, likewise."""
RMS_NORM, GATED_ACTIVATION = "RmsNorm", "GatedActivation"
"""What is between matmuls, of the TensorRT plugin: made by graph passes, never traced."""

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
    """The operators by name. Inputs and attributes are explained at their torch form (model/)."""
    kinds = onnx.defs.OpSchema.AttrType
    states = [
        *(_Parameter(name, "T", "", param_option=_Option.Optional) for name in STATE_KINDS[:2]),
        *(_Parameter(name, "TW") for name in STATE_KINDS[2:]),
    ]
    sink_attention = _schema(
        SINK_ATTENTION,
        [
            *(_Parameter(name, "T") for name in ("q", "k", "v")),
            *states,
            _Parameter("position", "tensor(int64)"),
            *(_Parameter(name, "T", "", param_option=_Option.Optional) for name in ("shift_cos", "shift_sin")),
            _Parameter("num_valid", "tensor(int64)", "", param_option=_Option.Optional),
            *(_Parameter(name, SCALE_TYPE, "", param_option=_Option.Optional) for name in SCALE_KINDS),
            _Parameter("alibi_slopes", "tensor(float)", "", param_option=_Option.Optional),
            _Parameter("sink_logit", "T", "", param_option=_Option.Optional),
            _Parameter("sink_scale", "tensor(float)", "", param_option=_Option.Optional),
            *(_Parameter(name, "T", "", param_option=_Option.Optional) for name in ("affine_scale", "affine_bias")),
            _Parameter(MASS_KIND, "tensor(float)", "", param_option=_Option.Optional),
            _Parameter("calibrated", "tensor(float)", "", param_option=_Option.Optional),
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
        },
    )
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
            *states,
            _Parameter("position", "tensor(int64)"),
            *(_Parameter(name, "T", "", param_option=_Option.Optional) for name in ("shift_cos", "shift_sin")),
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
            _Parameter("picks", "tensor(int64)", "", param_option=_Option.Optional),
        ],
        [_Parameter("out", "T")],
        {"is_transposed": kinds.INT, "in_place": kinds.INT},
    )
    every = (sink_attention, stream_angles, block_attention, expert_matmul)
    return {schema.name: schema for schema in every}


def translations() -> dict[Any, Callable[..., Any]]:
    """torch operator -> function that adds the ONNX node, for ``torch.onnx.export(custom_translation_table=...)``."""
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    attention = onnxscript.values.Op(opset, SINK_ATTENTION, schemas()[SINK_ATTENTION])
    angles = onnxscript.values.Op(opset, STREAM_ANGLES, schemas()[STREAM_ANGLES])
    blocks = onnxscript.values.Op(opset, BLOCK_ATTENTION, schemas()[BLOCK_ATTENTION])

    def translate_attention(
        q: Any,
        k: Any,
        v: Any,
        sink_k: Any,
        sink_v: Any,
        window_k: Any,
        window_v: Any,
        position: Any,
        shift_cos: Any,
        shift_sin: Any,
        num_valid: Any,
        scale: float,
        softcap: float,
        interleaved: bool,
        window_k_scale: Any = None,
        window_v_scale: Any = None,
        alibi_slopes: Any = None,
        sink_logit: Any = None,
        sink_scale: Any = None,
        affine_scale: Any = None,
        affine_bias: Any = None,
        attention_mass: Any = None,
        calibrated: Any = None,
        act_alpha: float = 1.0,
        act_beta: float = 1.0,
        act_min_queries: int = 1,
    ) -> Any:
        return attention(
            q,
            k,
            v,
            sink_k,
            sink_v,
            window_k,
            window_v,
            position,
            shift_cos,
            shift_sin,
            num_valid,
            window_k_scale,
            window_v_scale,
            alibi_slopes,
            sink_logit,
            sink_scale,
            affine_scale,
            affine_bias,
            attention_mass,
            calibrated,
            scale=scale,
            softcap=softcap,
            interleaved=int(interleaved),
            act_alpha=act_alpha,
            act_beta=act_beta,
            act_min_queries=act_min_queries,
        )

    def translate_angles(position: Any, frequency: Any, num_tokens: int, behind: int) -> Any:
        return angles(position, frequency, num_tokens=num_tokens, behind=behind)

    def translate_blocks(
        q: Any,
        k: Any,
        v: Any,
        sink_k: Any,
        sink_v: Any,
        window_k: Any,
        window_v: Any,
        position: Any,
        shift_cos: Any,
        shift_sin: Any,
        oldest: Any,
        scale: float,
        interleaved: bool,
    ) -> Any:
        return blocks(
            q,
            k,
            v,
            sink_k,
            sink_v,
            window_k,
            window_v,
            position,
            shift_cos,
            shift_sin,
            oldest,
            scale=scale,
            interleaved=int(interleaved),
        )

    experts = onnxscript.values.Op(opset, EXPERT_MATMUL, schemas()[EXPERT_MATMUL])

    def translate_experts(x: Any, weight: Any, picks: Any, is_transposed: bool, in_place: bool = False) -> Any:
        return experts(x, weight, picks, is_transposed=int(is_transposed), in_place=int(in_place))

    return {
        torch.ops.sinkexport.expert_product.default: translate_experts,
        torch.ops.sinkexport.sink_attention.default: translate_attention,
        torch.ops.sinkexport.stream_angles.default: translate_angles,
        torch.ops.sinkexport.block_attention.default: translate_blocks,
    }
