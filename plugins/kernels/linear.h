// Matmuls by constant matrices, y = x . W^T + bias: W in INT8 with a scale an output (W8A16), or of x's own type.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace sinkexport {

enum class WeightType : int {
  kInt8 = 0,  // y = x . W^T * scale + bias
  kHalf = 1,  // of `dtype`; y = x . W^T + bias
};

// All pointers are device pointers, dense and row-major, 16-byte aligned. "half" is the type that `dtype` says.
struct LinearParams {
  int num_rows = 0;     // M: tokens; 1 .. 16 read the weights once at memory speed, more (prefill) use tensor cores
  int num_inputs = 0;   // K, a multiple of 16; with half weights of 8
  int num_outputs = 0;  // N
  DType dtype = DType::kFloat16;
  const void* x = nullptr;       // half [M, K]
  const void* weight = nullptr;  // int8 or half [N, K], as weight_type says
  const float* scale = nullptr;  // [N], > 0; null with half weights
  const void* bias = nullptr;    // half [N]; null: none
  void* y = nullptr;             // half [M, N]; sums are float32

  // Nothing that was put into the stream before this and may not have ended by now writes `weight`, as is so for a
  // model's weights. Where a kernel can start before the one ahead of it ends (compute capability 9.0 and above), its
  // first weights are then read early; all else waits.
  bool constant_weight = false;
  WeightType weight_type = WeightType::kInt8;
};

size_t linearWorkspaceBytes(const LinearParams& params);
// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* linearProblem(const LinearParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if linearProblem says so.
cudaError_t launchLinear(const LinearParams& params, void* workspace, cudaStream_t stream);

}  // namespace sinkexport
