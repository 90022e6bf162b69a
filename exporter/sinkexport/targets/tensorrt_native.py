"""Standard ONNX operators alone, for TensorRT >= 10.15 without a plugin."""

from __future__ import annotations

from sinkexport.targets.target import Target

TENSORRT_NATIVE = Target(
    name="tensorrt-native",
    option="tensorrt",
    native=True,
    manifest_name="tensorrt",
    recipes="tensorrt",
    opset=24,
    ir_version=11,
    quantization="qdq",
    has_int4_weights=False,
    has_int8_window=False,
    has_circular_scatter=False,  # TensorRT's parser refuses it
    passes=(
        "fold_weight_transposes",
        "fold_constants",
        "make_reshapes_static",
        "fuse_rms_norms",
        "smooth_inputs",
        "merge_projections",
        "quantize_matmuls",
        "expand_experts",
        "expand_attention",
        "make_reshapes_static",
    ),
)
