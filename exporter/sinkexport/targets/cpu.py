"""Nodes of this project's CPU library (plugins/cpu) in ONNX Runtime; what does not fit it, in standard operators."""

from __future__ import annotations

from sinkexport.targets.target import Target

CPU = Target(
    name="cpu",
    option="cpu",
    manifest_name="cpu",
    recipes="onnx",
    opset=24,
    ir_version=11,
    quantization="cpu",
    has_cpu_library=True,
    experts_in_place="float32",
    chunk_size=256,  # matmuls read each weight once for it, and rows without a token cost next to nothing
    passes=(
        "fold_weight_transposes",
        "fold_constants",
        "make_reshapes_static",
        "fuse_rms_norms",
        "smooth_inputs",
        "merge_projections",
        "quantize_matmuls",
        "use_cpu_experts",
        "quantize_experts",
        "expand_experts",
        "use_cpu_linears",  # matmuls that quantisation left in float32
        "use_cpu_attention",
        "expand_attention",  # what the library's attention does not do
        "make_reshapes_static",
        "fuse_cpu_slices",
        "fuse_cpu_head_norms",
        "fuse_cpu_additions",  # biases
        "fuse_cpu_experts",
        "order_cpu_heads",
        "pack_heads",
        "fuse_cpu_additions",
        "fuse_cpu_output_norms",  # after biases
        "fuse_cpu_additions",  # residuals, which are added last
        "fuse_cpu_activations",  # after biases
        "fuse_layer_norms",
        "fuse_cpu_norms",
        "skip_cpu_padding",
        "pack_cpu_fields",  # of finished nodes
        "drop_value_notes",
    ),
)
