// Matmuls by matrices that are chosen at run time, as in MoE layers: y = x . W[pick]^T * scale[pick], each
// row by a matrix of its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"
#include "types.h"

namespace sinkexport {

// All pointers are device pointers, dense and row-major, 16-byte aligned. "half" is the type that `dtype` says.
struct ExpertLinearParams {
  int num_experts = 0;  // E, 1 .. 512
  int num_picks = 0;    // P, 1 .. 2048: rows of y
  int num_rows = 0;     // R, which divides P: rows of x; row p of y is of row p / (P / R), the token that picked it
  int num_inputs = 0;   // K, a multiple of 16; with half and INT4 weights of 8
  int num_outputs = 0;  // N
  DType dtype = DType::kFloat16;
  WeightType weight_type = WeightType::kInt8;
  const int32_t* picks = nullptr;  // [P], 0 .. E - 1; what is beyond gives the nearest
  const void* x = nullptr;         // half [R, K]
  const void* weight = nullptr;    // int8 or half [E, N, K], or INT4 [E, ..] as linear.h says
  const float* scale = nullptr;    // [E, N], > 0; null but with INT8 weights
  void* y = nullptr;               // half [P, N]; sums are float32

  int block_size = 0;  // these three as in linear.h, [E, ..]
  const void* block_scale = nullptr;
  const uint8_t* zero_points = nullptr;
};

// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* expertLinearProblem(const ExpertLinearParams& params);
// Asynchronous on `stream`, capturable, no workspace. cudaErrorInvalidValue if expertLinearProblem says so.
cudaError_t launchExpertLinear(const ExpertLinearParams& params, cudaStream_t stream);

}  // namespace sinkexport
