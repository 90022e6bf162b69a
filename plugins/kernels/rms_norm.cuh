// The kernel behind rms_norm.h, and the shape of its launch.
#pragma once

#include <type_traits>

#include "halves.cuh"
#include "overlap.cuh"
#include "rms_norm.h"
#include "warp.cuh"

namespace sinkexport {
namespace rms_norm {

constexpr int kMostThreads = 1024;
constexpr int kMostPieces = 4;  // of a row that one thread holds
constexpr int kMostRowLength = kMostThreads * kMostPieces * kHalvesOfPiece;
constexpr int kShortRowsOfBlock = 4;  // rows that one warp can take, such as those of heads

// A block takes one row, its threads side by side (x), or several rows of one warp each (y).
struct Block {
  int threads, rows, pieces;  // pieces: most of a row that a thread holds
};

inline Block blockOf(const RmsNormParams& p) {
  const int pieces = p.row_length / kHalvesOfPiece;
  if (pieces <= kWarpSize) return {kWarpSize, kShortRowsOfBlock, 1};
  const int whole_warps = (pieces + kWarpSize - 1) / kWarpSize * kWarpSize;
  const int threads = whole_warps < kMostThreads ? whole_warps : kMostThreads;
  return {threads, 1, (pieces + threads - 1) / threads};
}

// Sum over all threads that share a row; everyone gets it. The order of additions depends on the row's length alone.
__device__ __forceinline__ float rowSum(float x) {
  __shared__ float sums[kMostThreads / kWarpSize];
  const int num_warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  x = warpSum(x);
  if (num_warps == 1) return x;  // the block's other rows have warps of their own
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  return warpSum(lane < num_warps ? sums[lane] : 0.0f);
}

template <typename Half, typename Weight, int kPieces>
__global__ void __launch_bounds__(kMostThreads) rmsNorm(const RmsNormParams p) {
  constexpr int kLineEntries = 128 / sizeof(Weight);
  allowNextKernel();
  const auto* const weight = static_cast<const Weight*>(p.weight);
  for (int k = threadIdx.x * kLineEntries; k < p.row_length; k += blockDim.x * kLineEntries) prefetchLine(weight + k);
  waitForEarlierKernels();

  const int row = blockIdx.x * blockDim.y + threadIdx.y, num_pieces = p.row_length / kHalvesOfPiece;
  if (row >= p.num_rows) return;  // a whole warp, and no barrier follows where rows share a block
  const size_t first = static_cast<size_t>(row) * num_pieces;
  Piece<Half> h[kPieces];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = threadIdx.x + i * blockDim.x;
    if (piece >= num_pieces) continue;
    const size_t at = first + piece;
    h[i] = static_cast<const Piece<Half>*>(p.x)[at];
    if (p.residual) {
      const Piece<Half> residual = static_cast<const Piece<Half>*>(p.residual)[at];
#pragma unroll
      for (int k = 0; k < kHalvesOfPiece; ++k) {
        h[i].halves[k] = fromFloat<Half>(toFloat(h[i].halves[k]) + toFloat(residual.halves[k]));
      }
      static_cast<Piece<Half>*>(p.sum)[at] = h[i];
    }
#pragma unroll
    for (int k = 0; k < kHalvesOfPiece; ++k) {
      const float value = toFloat(h[i].halves[k]);
      squares = fmaf(value, value, squares);
    }
  }
  const float inverse = 1.0f / sqrtf(rowSum(squares) / static_cast<float>(p.row_length) + p.epsilon);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = threadIdx.x + i * blockDim.x;
    if (piece >= num_pieces) continue;
    struct alignas(16) {
      Weight entries[kHalvesOfPiece];
    } factors;
    const auto* const words = reinterpret_cast<const uint4*>(weight + piece * kHalvesOfPiece);
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof factors / sizeof(uint4)); ++k) {
      reinterpret_cast<uint4*>(&factors)[k] = words[k];
    }
    Piece<Half> y;
#pragma unroll
    for (int k = 0; k < kHalvesOfPiece; ++k) {
      const float normal = toFloat(h[i].halves[k]) * inverse;
      if constexpr (std::is_same_v<Weight, float>) {
        y.halves[k] = fromFloat<Half>(normal * factors.entries[k]);
      } else {
        y.halves[k] = fromFloat<Half>(toFloat(fromFloat<Half>(normal)) * toFloat(factors.entries[k]));
      }
    }
    static_cast<Piece<Half>*>(p.y)[first + piece] = y;
  }
}

template <typename Half, typename Weight>
auto kernelOf(const Block& block) {
  return block.pieces == 1   ? rmsNorm<Half, Weight, 1>
         : block.pieces == 2 ? rmsNorm<Half, Weight, 2>
                             : rmsNorm<Half, Weight, kMostPieces>;
}

inline unsigned gridOf(const RmsNormParams& p, const Block& block) {
  return (p.num_rows + block.rows - 1) / block.rows;
}

}  // namespace rms_norm
}  // namespace sinkexport
