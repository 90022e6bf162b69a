// What the parts of linear_wide.cuh share: sizes of tiles and stages, and which tiles there are.
#pragma once

#include <algorithm>

#include "bulk_copy.cuh"
#include "linear_many.cuh"
#include "linear_wide.h"
#include "wgmma.cuh"

namespace sinkexport {
namespace linear {

constexpr int kWideCluster = 2;           // blocks
constexpr int kWideWarpgroups = 2;        // that multiply
constexpr int kWideRows = 64;             // outputs of a warpgroup
constexpr int kWidePart = 128;            // tokens whose outputs are stored at a time
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

#endif

}  // namespace linear
}  // namespace sinkexport
