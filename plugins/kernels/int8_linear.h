// Products by INT8 weights with floating-point inputs (W8A16): y = x . W^T * scale + bias, W int8 [N, K].
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace sinkexport {

// All pointers are device pointers, dense and row-major, 16-byte aligned. "half" is the type that `dtype` says.
struct Int8LinearParams {
  int num_rows = 0;     // M: tokens; 1 .. 16 read the weights once at memory speed, more (prefill) use tensor cores
  int num_inputs = 0;   // K, a multiple of 16
  int num_outputs = 0;  // N
  DType dtype = DType::kFloat16;
  const void* x = nullptr;         // half [M, K]
  const int8_t* weight = nullptr;  // [N, K]
  const float* scale = nullptr;    // [N], > 0
  const void* bias = nullptr;      // half [N]; null: none
  void* y = nullptr;               // half [M, N]; sums are float32

  // Nothing that was put into the stream before this and may not have ended by now writes `weight`, as is so for a
  // model's weights. Where a kernel can start before the one ahead of it ends (compute capability 9.0 and above), its
  // first weights are then read early; all else waits.
  bool constant_weight = false;
};

size_t int8LinearWorkspaceBytes(const Int8LinearParams& params);
// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* int8LinearProblem(const Int8LinearParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if int8LinearProblem says so.
cudaError_t launchInt8Linear(const Int8LinearParams& params, void* workspace, cudaStream_t stream);

}  // namespace sinkexport
