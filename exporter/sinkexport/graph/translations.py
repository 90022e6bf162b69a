"""The traced torch form of this project's operators -> ONNX nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnxscript
import torch

import sinkexport.model.attention
import sinkexport.model.block_attention
import sinkexport.model.experts
import sinkexport.model.repeated_layers  # noqa: F401 - all four register the torch operators that are translated
from sinkexport.graph.operators import (
    BLOCK_ATTENTION,
    DOMAIN,
    EXPERT_MATMUL,
    LAYER_MARK,
    SINK_ATTENTION,
    STREAM_ANGLES,
    VERSION,
    schemas,
)


def translations() -> dict[Any, Callable[..., Any]]:
    """torch operator -> function that adds the ONNX node, for ``torch.onnx.export(custom_translation_table=...)``."""
    return {
        torch.ops.sinkexport.expert_matmul.default: _translate_experts,
        torch.ops.sinkexport.sink_attention.default: _translate_attention,
        torch.ops.sinkexport.stream_angles.default: _translate_angles,
        torch.ops.sinkexport.block_attention.default: _translate_blocks,
        torch.ops.sinkexport.layer_mark.default: _translate_mark,
    }


@functools.cache
def _operator(name: str) -> Any:
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), name, schemas()[name])


def _translate_attention(
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
    latent_dim: int = 0,
) -> Any:
    return _operator(SINK_ATTENTION)(
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
        latent_dim=latent_dim,
    )


def _translate_angles(position: Any, frequency: Any, num_tokens: int, behind: int) -> Any:
    return _operator(STREAM_ANGLES)(position, frequency, num_tokens=num_tokens, behind=behind)


def _translate_blocks(
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
    return _operator(BLOCK_ATTENTION)(
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


def _translate_experts(x: Any, weight: Any, picks: Any, is_transposed: bool, in_place: bool = False) -> Any:
    return _operator(EXPERT_MATMUL)(x, weight, picks, is_transposed=int(is_transposed), in_place=int(in_place))


def _translate_mark(hidden: Any, layer: int, role: int) -> Any:
    return _operator(LAYER_MARK)(hidden, layer=layer, role=role)
