// The kernel of linear_wide.cu.
//
// Tiles of 128 outputs x 128 or 256 tokens. One thread of a block has the copy engine fill stages of 64 k; two
// warpgroups multiply, 64 outputs each, weights as the left factor: half ones out of shared memory, integers out of
// registers, which are made while the matmuls of the stage before are under way. Two blocks are a cluster: their tiles
// have the same tokens, of which each block copies one half into both. Blocks stay and take tile after tile, so that
// the next one's first stages are filled while the last one's sums are stored.
//
// Where p.is_gated, rows of a tile are 8 of gate and 8 of up in turn, so that a thread has both.
#pragma once

#include <algorithm>

#include "bulk_copy.cuh"
#include "gated_activation.cuh"
#include "linear_many.cuh"
#include "linear_wide.h"
#include "linear_wide_factors.cuh"
#include "wgmma.cuh"

namespace sinkexport {
namespace linear {

constexpr int kWideCluster = 2;       // blocks
constexpr int kWideWarpgroups = 2;    // that multiply
constexpr int kWideRows = 64;         // outputs of a warpgroup
constexpr int kWidePart = 128;        // tokens whose outputs are stored at a time
constexpr int kWideLine = 2 * kWideRows;  // bytes of one token's outputs, where they are stored from
constexpr int kWideThreads = (1 + kWideWarpgroups) * kWarpgroupSize;
constexpr int kMostSharedBytes = 227 << 10;

template <typename Weight_, typename Half_, int kTokens_>
struct WideShape {
  using Weight = Weight_;
  using Half = Half_;
  static constexpr int kTokens = kTokens_, kRows = kWideWarpgroups * kWideRows;
  static constexpr int kSums = kTokens / 2;  // of a thread
  // A stage: tokens, weights, and of INT4 weights the scales and zero points of two blocks a tile.
  static constexpr int kTokenBytes = kTokens * kManyChunk * 2, kWeightBytes = kRows * kManyChunk * kBits<Weight> / 8;
  static constexpr int kTiles = kRows / kInt4TileOutputs, kScaleBytes = kTiles * 2 * kInt4ScaleBytes;
  static constexpr int kAlignment = 1024;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes + (kIsInt4<Weight> ? kAlignment : 0);
  static_assert(kTiles * 2 * kInt4GroupBytes <= kAlignment && kStageBytes % kAlignment == 0);
  static constexpr int kOutBytes = kWidePart * kWideLine;  // of a warpgroup
  static constexpr int kFreeBytes = kMostSharedBytes - kAlignment - 256 - kWideWarpgroups * kOutBytes;
  static constexpr int kStages = std::min(8, kFreeBytes / kStageBytes);
  static constexpr int kSharedBytes = kAlignment + kStages * kStageBytes + kWideWarpgroups * kOutBytes;
};

// Tiles and splits of k.
struct WidePlan {
  int token_tiles, row_pairs, splits, steps_per_split, num_steps;
  __host__ __device__ int numTiles() const { return token_tiles * row_pairs * splits; }  // of a cluster
};

struct WideMaps {
  CUtensorMap x, weight, scales, zeros;  // the last two of INT4 weights
};

#ifdef SINKEXPORT_HAS_WGMMA

struct WideTile {
  int first_token, first_row, first_step, num_steps, split;
  __device__ __forceinline__ WideTile(const WidePlan& plan, int tile, int rank, int tokens, int rows) {
    first_token = tile % plan.token_tiles * tokens;
    const int rest = tile / plan.token_tiles;
    first_row = (rest % plan.row_pairs * kWideCluster + rank) * rows;
    split = rest / plan.row_pairs;
    first_step = split * plan.steps_per_split;
    num_steps = min(plan.steps_per_split, plan.num_steps - first_step);
  }
};

// Which stage is next, and the parity of its phase.
template <int kStages>
struct WideTurn {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// One thread: fills stages.
template <typename Shape>
__device__ __forceinline__ void fillStages(const WideMaps& maps, const LinearParams& p, const WidePlan& plan,
                                           uint32_t stages, uint32_t full, uint32_t empty, int rank) {
  using Weight = typename Shape::Weight;
  constexpr int kHalfTokens = Shape::kTokens / kWideCluster;
  const int num_groups = p.block_size && p.block_size < kInt4TileInputs ? 2 : 1;
  const uint32_t num_bytes =
      Shape::kTokenBytes + Shape::kWeightBytes +
      (kIsInt4<Weight> ? num_groups * Shape::kTiles * (kInt4ScaleBytes + (p.zero_points ? kInt4TileOutputs : 0)) : 0);
  WideTurn<Shape::kStages> turn;
  for (int i = blockIdx.x / kWideCluster; i < plan.numTiles(); i += gridDim.x / kWideCluster) {
    const WideTile tile(plan, i, rank, Shape::kTokens, Shape::kRows);
    for (int step = tile.first_step; step < tile.first_step + tile.num_steps; ++step) {
      const uint32_t to = stages + turn.stage * Shape::kStageBytes, barrier = full + turn.stage * 8;
      const uint32_t weights = to + Shape::kTokenBytes, first_k = step * kManyChunk;
      waitForPhase(empty + turn.stage * 8, turn.phase ^ 1);
      arriveExpecting(barrier, num_bytes);
      if constexpr (kIsInt4<Weight>) {
        const int first_tile = tile.first_row / kInt4TileOutputs / (p.is_gated ? 2 : 1), group = first_k / p.block_size;
        copyTile(weights, maps.weight, barrier, 0, step * 8, 0, first_tile);
        copyTile(weights + Shape::kWeightBytes, maps.scales, barrier, 0, group, 0, first_tile);
        if (p.zero_points) {
          copyTile(weights + Shape::kWeightBytes + Shape::kScaleBytes, maps.zeros, barrier, 0, group, 0, first_tile);
        }
      } else if (p.is_gated) {
        copyTile(weights, maps.weight, barrier, first_k, 0, 0, tile.first_row / 16);
      } else {
        copyTile(weights, maps.weight, barrier, first_k, tile.first_row, 0, 0);
      }
      copyTileToAll(to + rank * (Shape::kTokenBytes / kWideCluster), maps.x, barrier, first_k,
                    tile.first_token + rank * kHalfTokens, (1 << kWideCluster) - 1);
      turn.advance();
    }
  }
}

// --- what becomes of sums: sum[4 j + i] of row i / 2 * 8 + g of a warp's 16, and of token 8 j + 2 t + i % 2 ---

__device__ __forceinline__ void syncWarpgroup(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup), "n"(kWarpgroupSize) : "memory");
}

// Where the warp's rows of a tile are in the weight, in y, and what goes with them.
template <typename Weight, typename Half>
struct WideOutput {
  int near, far;           // of this lane, in the weight
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

// Begins copies of the residual of a part's tokens. Not one by one: each would wait for memory.
template <typename Half>
__device__ __forceinline__ void fetchResidual(const LinearParams& p, unsigned char* out, int first_token, int column) {
  const auto* const residual = static_cast<const Half*>(p.residual);
  const bool aligned = p.num_outputs % 8 == 0;
  withLines(p, first_token, column, p.num_outputs, 8, [&](size_t at, int to, int count) {
    if (aligned) {
      copyAsync(out + to, residual + at, 16);
    } else {
      copyPiece(reinterpret_cast<Half*>(out + to), residual + at, count, false);
    }
  });
  commitCopies();
}

// Sums of the tile's tokens from kPart * kWidePart on to y. The part's residual is on its way.
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
    waitForCopies<0>();
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
    if (p.residual) fetchResidual<typename Shape::Half>(p, out, tile.first_token + kWidePart, finish.column);
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

// --- the matmuls ---

// A warpgroup's sums of one tile after the other.
template <typename Shape>
struct WideMatmul {
  using Weight = typename Shape::Weight;
  using Half = typename Shape::Half;
  using Factors = uint32_t[kWideSteps][4];
  const LinearParams& p;
  const unsigned char* stages;
  uint32_t full, empty;
  int warpgroup;
  WideTurn<Shape::kStages> turn;  // of the stage that is multiplied next

  // Weights of the stage after `turn`, or of its own.
  __device__ __forceinline__ void takeFactors(Factors& a, WideTurn<Shape::kStages> from) const {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % 4;
    const unsigned char* const weights = stages + from.stage * Shape::kStageBytes + Shape::kTokenBytes;
    waitForPhase(full + from.stage * 8, from.phase);
    if constexpr (kIsInt8<Weight>) {
      takeInt8<Half>(a, weights + (warpgroup * kWideRows + warp * 16) * kManyChunk, lane);
    } else {
      const unsigned char* const scales = weights + Shape::kWeightBytes;
      const Int4Stage stage{weights, scales, scales + Shape::kScaleBytes, p.zero_points != nullptr,
                            p.block_size < kInt4TileInputs ? 2 : 1};
      takeInt4<Half>(a, stage, warpgroup * (kWideRows / kInt4TileOutputs) + warp, p.is_gated, lane);
    }
  }

  // Both blocks may fill the stage again.
  __device__ __forceinline__ void release(int stage) const {
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();
    if (lane < kWideCluster) arriveAt(empty + stage * 8, lane);
  }

  // Weights in shared memory: the matmuls of two stages are under way.
  __device__ __forceinline__ void multiplyHalves(float (&sum)[Shape::kSums], int num_steps) {
    int before = -1;
    for (int step = 0; step < num_steps; ++step) {
      const unsigned char* const tokens = stages + turn.stage * Shape::kStageBytes;
      const unsigned char* const weights = tokens + Shape::kTokenBytes + warpgroup * kWideRows * kManyChunk * 2;
      const uint64_t a = describeFactor(sharedAddress(weights)), b = describeFactor(sharedAddress(tokens));
      waitForPhase(full + turn.stage * 8, turn.phase);
      beginMatmuls();
#pragma unroll
      for (int s = 0; s < kWideSteps; ++s) {
        multiplyWide<Half>(sum, a + s * kFactorStep, b + s * kFactorStep, step > 0 || s > 0);
      }
      commitMatmuls();
      waitForMatmuls<1>();
      if (before >= 0) release(before);
      before = turn.stage;
      turn.advance();
    }
    waitForMatmuls<0>();
    release(before);
  }

  // Integers: while those of one stage are under way, the next one's factors are made.
  __device__ __forceinline__ void multiplyIntegers(float (&sum)[Shape::kSums], int num_steps) {
    Factors factors[2];
    int before = -1;
    const auto multiply = [&](const Factors& a, Factors& next, int step) {
      const uint64_t b = describeFactor(sharedAddress(stages + turn.stage * Shape::kStageBytes));
      const int stage = turn.stage;
      beginMatmuls();
#pragma unroll
      for (int s = 0; s < kWideSteps; ++s) multiplyWide<Half>(sum, a[s], b + s * kFactorStep, step > 0 || s > 0);
      commitMatmuls();
      waitForMatmuls<1>();
      if (before >= 0) release(before);
      before = stage;
      turn.advance();
      if (step + 1 < num_steps) takeFactors(next, turn);
    };
    takeFactors(factors[0], turn);
    for (int step = 0; step < num_steps; step += 2) {
      multiply(factors[0], factors[1], step);
      if (step + 1 < num_steps) multiply(factors[1], factors[0], step + 1);
    }
    waitForMatmuls<0>();
    release(before);
  }

  __device__ __forceinline__ void operator()(float (&sum)[Shape::kSums], int num_steps) {
    if constexpr (kIsHalf<Weight>) {
      multiplyHalves(sum, num_steps);
    } else {
      multiplyIntegers(sum, num_steps);
    }
    keepHere(sum);
  }
};

// A warpgroup: all its tiles.
template <typename Shape>
__device__ __forceinline__ void multiplyTiles(const LinearParams& p, const WidePlan& plan, float* partial,
                                              unsigned char* stages, unsigned char* out, uint32_t full, uint32_t empty,
                                              int rank, int warpgroup) {
  WideMatmul<Shape> matmul{p, stages, full, empty, warpgroup, {}};
  float sum[Shape::kSums];
#pragma unroll
  for (int i = 0; i < Shape::kSums; ++i) sum[i] = 0.0f;
  for (int i = blockIdx.x / kWideCluster; i < plan.numTiles(); i += gridDim.x / kWideCluster) {
    const WideTile tile(plan, i, rank, Shape::kTokens, Shape::kRows);
    if (p.residual && !partial) {
      fetchResidual<typename Shape::Half>(p, out, tile.first_token, tile.first_row + warpgroup * kWideRows);
    }
    matmul(sum, tile.num_steps);
    if (partial) {
      storePartial<Shape>(sum, p, partial, tile, warpgroup);
    } else {
      storeTile<Shape>(sum, p, out, tile, warpgroup);
    }
  }
}

#define SINKEXPORT_WIDE_CLUSTER __cluster_dims__(kWideCluster, 1, 1)
#else
#define SINKEXPORT_WIDE_CLUSTER
#endif

// partial: null if there is one split. Shared memory that is not dynamic: only where there is code (linear_wide.cu).
template <typename Shape>
__global__ void SINKEXPORT_WIDE_CLUSTER __launch_bounds__(kWideThreads, 1)
    wideTokens([[maybe_unused]] const __grid_constant__ WideMaps maps, [[maybe_unused]] const LinearParams p,
               [[maybe_unused]] const WidePlan plan, [[maybe_unused]] float* __restrict__ partial) {
#ifdef SINKEXPORT_HAS_WGMMA
  __shared__ uint64_t barriers[2 * Shape::kStages];
  extern __shared__ unsigned char dynamic[];
  unsigned char* const stages = dynamic + (-sharedAddress(dynamic) & (Shape::kAlignment - 1));
  const uint32_t full = sharedAddress(barriers), empty = full + Shape::kStages * 8;
  const int warpgroup = threadIdx.x / kWarpgroupSize, rank = rankInCluster();
  if (threadIdx.x == 0) {
    prefetchMap(maps.x);
    prefetchMap(maps.weight);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      beginBarrier(full + stage * 8, 1);
      beginBarrier(empty + stage * 8, kWideCluster * kWideWarpgroups * 4);  // of warps
    }
    publishBarriers();
  }
  syncCluster();
  waitForEarlierKernels();
  // Registers: 40 x 128 + 232 x 256 of 65,536.
  if (warpgroup == 0) {
    giveRegisters<40>();
    if (threadIdx.x == 0) fillStages<Shape>(maps, p, plan, sharedAddress(stages), full, empty, rank);
    __syncwarp();
    syncCluster();
  } else {
    takeRegisters<232>();
    unsigned char* const out = stages + Shape::kStages * Shape::kStageBytes + (warpgroup - 1) * Shape::kOutBytes;
    multiplyTiles<Shape>(p, plan, partial, stages, out, full, empty, rank, warpgroup - 1);
    allowNextKernel();
    syncCluster();  // no block may end while the other one can still write to it or arrive there
  }
#endif
}

}  // namespace linear
}  // namespace sinkexport
