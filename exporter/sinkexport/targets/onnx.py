"""Standard ONNX operators and ONNX Runtime's own for quantised matmuls: runs on its CPU and CUDA providers."""

from __future__ import annotations

from sinkexport.targets.target import Target

ONNX = Target(
    name="onnx",
    option="onnx",
    manifest_name="onnx",
    recipes="onnx",
    opset=24,
    ir_version=11,  # ONNX 1.19, the first with opset 24
    quantization="ort",
    passes=(
        "fold_weight_transposes",  # first: folded as constants, weights would be copied and lose their names
        "fold_constants",
        "make_reshapes_static",
        "fuse_rms_norms",
        "smooth_inputs",
        "merge_projections",
        "quantize_matmuls",
        "quantize_experts",
        "expand_experts",
        "expand_attention",
        "make_reshapes_static",
    ),
)
