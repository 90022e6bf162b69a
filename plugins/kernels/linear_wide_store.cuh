// The end of linear_wide.cuh's tiles. A lane's sum[4 j + i] is of row i / 2 * 8 + g of its warp's 16, and of token
// 8 j + 2 t + i % 2.
#pragma once

#include "gated_activation.cuh"
#include "linear_wide_shape.cuh"

#ifdef SINKEXPORT_HAS_WGMMA

namespace sinkexport {
namespace linear {

__device__ __forceinline__ void syncWarpgroup(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup), "n"(kWarpgroupSize) : "memory");
}

// Where the warp's rows of a tile are in the weight, in y, and what goes with them.
template <typename Weight, typename Half>
struct WideOutput {
  int near, far;            // of this lane, in the weight
  int column, num_columns;  // the warpgroup's first column of y, and how many y has
  float near_scale, far_scale, near_bias, far_bias;

  __device__ __forceinline__ WideOutput(const LinearParams& p, int first_row, int warpgroup, int warp, int g) {
    const int row = first_row + warpgroup * kWideRows + warp * 16, num_rows = p.num_outputs;
    near = (p.is_gated ? row / 2 : row) + g, far = near + (p.is_gated ? num_rows / 2 : 8);
    column = (first_row + warpgroup * kWideRows) / (p.is_gated ? 2 : 1);
    num_columns = p.is_gated ? num_rows / 2 : num_rows;
    const Output<Weight, Half> first(p, min(near, num_rows - 1)), second(p, min(far, num_rows - 1));
    near_scale = first.scale, near_bias = first.bias, far_scale = second.scale, far_bias = second.bias;
  }
  __device__ __forceinline__ float operator()(float sum, bool is_far) const {
    return is_far ? fmaf(sum, far_scale, far_bias) : fmaf(sum, near_scale, near_bias);
  }
};

// Columns of kWidePart tokens between y (or the residual) and shared memory, 16 bytes at a time. use(in memory, in
// shared memory, how many of 8 halves there are).
template <typename Use>
__device__ __forceinline__ void withLines(const LinearParams& p, int first_token, int column, int num_columns,
                                          int pieces, Use use) {
  const int thread = threadIdx.x % kWarpgroupSize;
  const int piece = thread % 8, left = num_columns - column - 8 * piece;
  if (piece >= pieces || left <= 0) return;
#pragma unroll 4
  for (int i = thread / 8; i < kWidePart; i += kWarpgroupSize / 8) {
    const int token = first_token + i;
    if (token >= p.num_rows) break;
    use(static_cast<size_t>(token) * num_columns + column + 8 * piece, i * kWideLine + (piece ^ i % 8) * 16,
        min(left, 8));
  }
}

template <typename Half>
__device__ __forceinline__ void copyPiece(Half* to, const Half* from, int count, bool aligned) {
  if (aligned) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
    for (int i = 0; i < count; ++i) to[i] = from[i];
  }
}

// silu, or gelu by tanh: x / (1 + e^-s), s of the latter a polynomial. Errors of a few units in float32's last place.
__device__ __forceinline__ float wideActivation(float x, bool is_gelu) {
  const float s = is_gelu ? 1.59576912160573072f * fmaf(0.044715f * x * x, x, x) : x;
  return __fdividef(x, 1.0f + __expf(-s));
}

// Sums of the tile's tokens from kPart * kWidePart on to y.
template <typename Shape, int kPart>
__device__ __forceinline__ void storePart(const float (&sum)[Shape::kSums], const LinearParams& p, unsigned char* out,
                                          const WideOutput<typename Shape::Weight, typename Shape::Half>& finish,
                                          int first_token, int warpgroup) {
  using Half = typename Shape::Half;
  constexpr int kFirst = kPart * kWidePart / 2;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % 4;
  const bool aligned = finish.num_columns % 8 == 0, is_gelu = p.activation == Activation::kGeluTanh;
  const uint32_t shared = sharedAddress(out);
  auto* const y = static_cast<Half*>(p.y);
  if (p.residual) {
    const auto* const residual = static_cast<const Half*>(p.residual);
    withLines(p, first_token, finish.column, finish.num_columns, 8, [&](size_t at, int to, int count) {
      copyPiece(reinterpret_cast<Half*>(out + to), residual + at, count, aligned);
    });
    syncWarpgroup(warpgroup);
  }
  if (p.is_gated) {
#pragma unroll
    for (int j = 0; j < kWidePart / 32; ++j) {  // 32 tokens x 8 outputs
      uint32_t m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = kFirst + (4 * j + i) * 4;
        m[i] = packHalves<Half>(wideActivation(finish(sum[at], false), is_gelu) * finish(sum[at + 2], true),
                                wideActivation(finish(sum[at + 1], false), is_gelu) * finish(sum[at + 3], true));
      }
      const int token = 32 * j + lane;
      storeTransposed(shared + token * kWideLine + (warp ^ token % 8) * 16, m);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidePart / 16; ++j) {  // 16 tokens x 16 outputs
      uint32_t m[4];
      const int token = 16 * j + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
      const uint32_t address = shared + token * kWideLine + (piece ^ token % 8) * 16;
      if (p.residual) loadTransposed(m, address);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = kFirst + 8 * j + 2 * i;
        float low = finish(sum[at], i % 2), high = finish(sum[at + 1], i % 2);
        if (p.residual) {
          float more_low, more_high;
          unpackHalves<Half>(m[i], more_low, more_high);
          low += more_low, high += more_high;
        }
        m[i] = packHalves<Half>(low, high);
      }
      storeTransposed(address, m);
    }
  }
  syncWarpgroup(warpgroup);
  withLines(p, first_token, finish.column, finish.num_columns, p.is_gated ? 4 : 8, [&](size_t at, int from, int count) {
    copyPiece(y + at, reinterpret_cast<const Half*>(out + from), count, aligned);
  });
  syncWarpgroup(warpgroup);
}

template <typename Shape>
__device__ __forceinline__ void storeTile(const float (&sum)[Shape::kSums], const LinearParams& p, unsigned char* out,
                                          const WideTile& tile, int warpgroup) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % 4;
  const WideOutput<typename Shape::Weight, typename Shape::Half> finish(p, tile.first_row, warpgroup, warp, lane / 4);
  storePart<Shape, 0>(sum, p, out, finish, tile.first_token, warpgroup);
  if constexpr (Shape::kTokens > kWidePart) {
    storePart<Shape, 1>(sum, p, out, finish, tile.first_token + kWidePart, warpgroup);
  }
}

// partial: [splits, M, N].
template <typename Shape>
__device__ __forceinline__ void storePartial(const float (&sum)[Shape::kSums], const LinearParams& p, float* partial,
                                             const WideTile& tile, int warpgroup) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % 4, t = lane % 4;
  const int row = tile.first_row + warpgroup * kWideRows + warp * 16 + lane / 4;
  float* const rows = partial + static_cast<size_t>(tile.split) * p.num_rows * p.num_outputs + row;
#pragma unroll
  for (int i = 0; i < Shape::kSums; ++i) {
    const int token = tile.first_token + i / 4 * 8 + 2 * t + i % 2, on = i % 4 / 2 * 8;
    if (token < p.num_rows && row + on < p.num_outputs) rows[static_cast<size_t>(token) * p.num_outputs + on] = sum[i];
  }
}

}  // namespace linear
}  // namespace sinkexport

#endif
