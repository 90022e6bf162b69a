// The gate of a feed-forward block: activation(gate) * up (arXiv:2002.05202).
#pragma once

#include "types.h"

namespace sinkexport {

// kGelu: x Phi(x); kGeluTanh: its approximation by tanh (arXiv:1606.08415).
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// All pointers are device pointers, 16-byte aligned. "half" is the type that `dtype` says.
struct GatedActivationParams {
  int num_rows = 0;    // M: tokens
  int width = 0;       // N, a multiple of 8
  int row_stride = 0;  // halves from one row of gate, and of up, to the next: N, or 2 N where rows are gate | up
  DType dtype = DType::kFloat16;
  Activation activation = Activation::kSilu;
  const void* gate = nullptr;  // half [M, N]
  const void* up = nullptr;    // half [M, N]
  void* out = nullptr;         // half [M, N], dense: computed in float32, rounded once; overlaps no input
};

// nullptr if it can be launched, else one line that says what is wrong and what is expected.
const char* gatedActivationProblem(const GatedActivationParams& params);
// Asynchronous on `stream`, capturable, allocates nothing. cudaErrorInvalidValue if gatedActivationProblem says so.
cudaError_t launchGatedActivation(const GatedActivationParams& params, cudaStream_t stream);

}  // namespace sinkexport
