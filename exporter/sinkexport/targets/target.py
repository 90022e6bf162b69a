"""What a target is: facts that the exporter reads, and the ordered names of its passes."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Target:
    """A form that bundles can have, described in data alone: it imports nothing, so that every layer may read it.

    name: unique among targets.
    option: value of ``--target`` that chooses it.
    recipes: name under which a recipe's ``targets`` lists it; targets that take the same recipes share one.
    native: whether ``--native`` chooses it, too. Of two targets with one option the one without is the usual form.
    manifest_name: what the manifest says, one of `sinkrt.contract.TARGETS`.
    opset, ir_version: of the finished graphs, in ONNX's own domain.
    ids: dtype of the token ids, ``int64`` or ``int32``.
    position: ``int64`` [B], or ``int32 words`` [B, 2]: t >> 16 and t & 0xffff.
    quantization: form of quantised matmuls, a key of `sinkexport.graph.quantize.forms.FORMS`.
    has_plugins: whether graphs have nodes that need this project's TensorRT plugins.
    has_int4_weights: whether weights can be INT4.
    has_int8_window: whether keys and values of the window can be INT8 (``--kv int8``).
    changes_attention: whether attention takes scales, biases and ACT (``--affine``, ``--sink-tuning`` with ``act``).
    has_circular_scatter: whether TensorScatter may write past the ring's end.
    has_cpu_library: whether graphs may have nodes that need this project's CPU library (plugins/cpu).
    experts_in_place: type of experts' matrices that nodes read where they lie; None: there are no such nodes.
    chunk_size: T, tokens of one run of the prefill graph where neither ``--chunk`` nor the window says otherwise.
    passes: names of files in ``graph/passes``, in the order in which they run.
    """

    name: str
    option: str
    manifest_name: str
    recipes: str
    opset: int
    ir_version: int
    quantization: Literal["ort", "qdq", "plugin", "cpu"]
    passes: tuple[str, ...]
    native: bool = False
    ids: Literal["int64", "int32"] = "int64"
    position: Literal["int64", "int32 words"] = "int64"
    has_plugins: bool = False
    has_cpu_library: bool = False
    experts_in_place: Literal["float16", "float32"] | None = None
    has_int4_weights: bool = True
    has_int8_window: bool = True
    changes_attention: bool = True
    has_circular_scatter: bool = True
    chunk_size: int = 64
