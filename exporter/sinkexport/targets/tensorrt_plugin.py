"""Opset 17 and nodes of the plugins in plugins/trt, for every TensorRT from 8.5 on."""

from __future__ import annotations

from sinkexport.targets.target import Target

TENSORRT_PLUGIN = Target(
    name="tensorrt",
    option="tensorrt",
    manifest_name="tensorrt",
    recipes="tensorrt",
    opset=17,  # the last that TensorRT 8.5's parser knows
    ir_version=8,  # ONNX 1.13, the first after opset 17
    quantization="plugin",
    ids="int32",  # TensorRT 8.5 has no int64 inputs
    position="int32 words",  # so that every position of the exact phase can be expressed
    has_plugins=True,
    chunk_size=256,  # matmuls do 2.6 times as many tokens a second as with 64 (7B on an H200)
    experts_in_place="float16",
    changes_attention=False,
    passes=(
        "fold_weight_transposes",
        "fold_constants",
        "make_reshapes_static",
        "smooth_inputs",
        "merge_projections",
        "quantize_matmuls",
        "use_expert_plugin",
        "expand_experts",
        "use_linear_plugin",  # matmuls that quantisation left in float16
        "use_attention_plugin",
        "use_int32_inputs",
        "fuse_plugin_linears",  # residuals, before norms take them
        "use_norm_plugin",
        "use_gate_plugin",
        "make_reshapes_static",
        "pack_heads",
        "fuse_plugin_linears",  # norms and gates
        "lower_to_opset17",
    ),
)
