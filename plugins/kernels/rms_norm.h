// Root-mean-square norms of rows (arXiv:1910.07467), after the addition of a residual stream where there is one.
#pragma once

#include "types.h"

namespace sinkexport {

// All pointers are device pointers, dense and row-major, 16-byte aligned. "half" is the type that `dtype` says.
// Outputs overlap no input.
struct RmsNormParams {
  int num_rows = 0;    // M: tokens, or heads of tokens
  int row_length = 0;  // K, a multiple of 8 up to 32768
  DType dtype = DType::kFloat16;
  bool float_weight = false;       // weight float32: multiplied before the only rounding; else after a rounding to half
  float epsilon = 0.0f;            // > 0, added to the mean of squares
  const void* x = nullptr;         // half [M, K]
  const void* weight = nullptr;    // half or float32 [K]
  const void* residual = nullptr;  // half [M, K]; null: none
  void* y = nullptr;    // half [M, K]: h / sqrt(mean(h^2) + epsilon) * weight, h = x + residual; float32 inside
  void* sum = nullptr;  // half [M, K]: h, rounded once and before the norm; null if and only if there is no residual
};

// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* rmsNormProblem(const RmsNormParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if rmsNormProblem says so.
cudaError_t launchRmsNorm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace sinkexport
