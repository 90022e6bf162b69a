// The kernel behind gated_activation.h.
#pragma once

#include "gated_activation.h"
#include "halves.cuh"
#include "overlap.cuh"

namespace sinkexport {
namespace gated_activation {

constexpr int kThreads = 128;  // few, so that one token's row is spread over many multiprocessors

template <Activation kActivation>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * x * erfcf(x * -0.70710678118654752f);  // 1 + erf would cancel where x is negative
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const float inner = 0.79788456080286536f * fmaf(0.044715f * x * x, x, x);  // sqrt(2 / pi)
    return x / (1.0f + expf(-2.0f * inner));                                   // (1 + tanh(y)) / 2 = 1 / (1 + e^-2y)
  } else {
    return x / (1.0f + expf(-x));
  }
}

// A block column for each row.
template <typename Half, Activation kActivation>
__global__ void __launch_bounds__(kThreads) gatedActivation(const GatedActivationParams p) {
  allowNextKernel();
  waitForEarlierKernels();
  const int num_pieces = p.width / kHalvesOfPiece, piece = blockIdx.y * kThreads + threadIdx.x;
  if (piece >= num_pieces) return;
  const size_t row = blockIdx.x, from = row * (p.row_stride / kHalvesOfPiece) + piece;
  const Piece<Half> gate = static_cast<const Piece<Half>*>(p.gate)[from];
  const Piece<Half> up = static_cast<const Piece<Half>*>(p.up)[from];
  Piece<Half> out;
#pragma unroll
  for (int k = 0; k < kHalvesOfPiece; ++k) {
    out.halves[k] = fromFloat<Half>(activated<kActivation>(toFloat(gate.halves[k])) * toFloat(up.halves[k]));
  }
  static_cast<Piece<Half>*>(p.out)[row * num_pieces + piece] = out;
}

template <typename Half>
auto kernelOf(Activation activation) {
  return activation == Activation::kSilu   ? gatedActivation<Half, Activation::kSilu>
         : activation == Activation::kGelu ? gatedActivation<Half, Activation::kGelu>
                                           : gatedActivation<Half, Activation::kGeluTanh>;
}

inline unsigned blocksOf(const GatedActivationParams& p) {  // along a row
  constexpr int kHalvesOfBlock = kThreads * kHalvesOfPiece;
  return (p.width + kHalvesOfBlock - 1) / kHalvesOfBlock;
}

}  // namespace gated_activation
}  // namespace sinkexport
