// Tiles of matmuls of few tokens (linear_few.cuh): where they lie, and what makes outputs of the sums of a block's
// warps.
#pragma once

#include "gated_activation.cuh"
#include "linear.cuh"

namespace sinkexport {
namespace linear {

// Some outputs of some tokens: what a block does at once.
struct FewTile {
  int first_row = 0;        // output, of its matrix
  int num_tokens = 0;       // > 0
  int first_token = 0;      // in the plan's order
  size_t first_output = 0;  // of its matrix among those of all: matrices before it * N
  int tile_step = 16;       // outputs from one tile of 16 to the next
};

// Writes a warp's sums where all read them, as [tokens, kRows].
template <typename Weight, typename Half, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void shareSums(const float (&sum)[kRowTiles][kTokenTiles][4], float* sums, int num_tokens,
                                          int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * j + 2 * t + i % 2;
        const float total = finished<Weight, Half>(sum[r][j], i);
        if (token < num_tokens) sums[token * 16 * kRowTiles + 16 * r + g + i / 2 * 8] = total;
      }
    }
  }
}

__device__ __forceinline__ float activatedBy(Activation activation, float x) {
  using gated_activation::activated;
  return activation == Activation::kSilu   ? activated<Activation::kSilu>(x)
         : activation == Activation::kGelu ? activated<Activation::kGelu>(x)
                                           : activated<Activation::kGeluTanh>(x);
}

// One of a tile's outputs: what makes it of its sums, which is read before they are there. Scales and biases are read
// at once, the residual later: an earlier kernel may write it.
template <typename Weight, typename Half, int kRows, bool kIsGated>
struct TileOutput {
  static constexpr int kOutputs = kIsGated ? kRows / 2 : kRows;  // of y, in a tile
  float scale[2], bias[2];                                       // of the gate, or of all, and of up
  float residual = 0.0f;
  size_t at = 0;
  bool valid = false;

  // i: of the tile's [tokens, outputs].
  template <typename Plan>
  __device__ __forceinline__ TileOutput(const LinearParams& p, const Plan& plan, const FewTile& tile, int i) {
    const int width = kIsGated ? p.num_outputs / 2 : p.num_outputs;
    const int token = i / kOutputs, output = tile.first_row + i % kOutputs;
    valid = token < tile.num_tokens && output < width;
    if (!valid) return;
    at = static_cast<size_t>(plan.outputRow(tile, token)) * width + output;
    const Output<Weight, Half> finish(p, tile.first_output + output);
    scale[0] = finish.scale, bias[0] = finish.bias;
    if constexpr (kIsGated) {
      const Output<Weight, Half> finish_up(p, width + output);
      scale[1] = finish_up.scale, bias[1] = finish_up.bias;
    }
  }

  __device__ __forceinline__ void readResidual(const LinearParams& p) {
    if (!kIsGated && valid && p.residual) residual = toFloat(static_cast<const Half*>(p.residual)[at]);
  }

  // sums: of all warps, [kWarps, tokens, kRows]; of_warp: entries of one. i: as above.
  template <int kWarps>
  __device__ __forceinline__ void store(const LinearParams& p, const float* sums, int of_warp, int i) const {
    if (!valid) return;
    const float* const from = sums + i / kOutputs * kRows + i % kOutputs;
    float totals[2] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      totals[0] += from[w * of_warp];
      if constexpr (kIsGated) totals[1] += from[w * of_warp + kOutputs];
    }
    float value = fmaf(totals[0], scale[0], bias[0]) + residual;
    if constexpr (kIsGated) value = activatedBy(p.activation, value) * fmaf(totals[1], scale[1], bias[1]);
    static_cast<Half*>(p.y)[at] = fromFloat<Half>(value);
  }
};

// All outputs of a tile. output: that of number threadIdx.x.
template <int kWarps, typename Output, typename Plan>
__device__ __forceinline__ void storeTile(const LinearParams& p, const Plan& plan, const FewTile& tile, Output output,
                                          const float* sums, int of_warp) {
  constexpr int kThreads = kWarps * kWarpSize;
  for (int i = threadIdx.x; i < tile.num_tokens * Output::kOutputs; i += kThreads) {
    if (i >= kThreads) {
      output = Output(p, plan, tile, i);
      output.readResidual(p);
    }
    output.template store<kWarps>(p, sums, of_warp, i);
  }
}

}  // namespace linear
}  // namespace sinkexport
