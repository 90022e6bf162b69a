// What the kernels' parameter structs have in common. No TensorRT, no framework: CUDA's runtime header only.
#pragma once

#include <cuda_runtime_api.h>

namespace sinkexport {

// The type of activations, sinks and floating-point windows.
enum class DType : int { kFloat16 = 0, kBFloat16 = 1 };

}  // namespace sinkexport
