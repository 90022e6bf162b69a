// The kernel of linear_wide.cu.
//
// Tiles of 128 outputs x 128 or 256 tokens. One thread of a block has the copy engine fill stages of 64 k; two
// warpgroups multiply, 64 outputs each, weights as the left factor: half ones out of shared memory, integers out of
// registers, which are made while the matmuls of the stage before are under way. Two blocks are a cluster: their tiles
// have the same tokens, and each block copies one half of them into both. Blocks stay and take tile after tile, so that
// the next one's first stages are filled while the last one's sums are stored.
//
// Where p.is_gated, rows of a tile are 8 of gate and 8 of up in turn, so that a thread has both.
#pragma once

#include "linear_wide_factors.cuh"
#include "linear_wide_shape.cuh"
#include "linear_wide_store.cuh"

namespace sinkexport {
namespace linear {

#ifdef SINKEXPORT_HAS_WGMMA

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
