// Matmuls of more than 16 tokens by a matrix (linear.cu). How lanes share a matmul: linear.cu.
//
// Blocks of 64 or 128 outputs x 32, 64 or 128 tokens, with four warps side by side along the outputs, so that a
// weight is converted once in a block (twice in the largest). Where the tiles are fewer than the multiprocessors, k
// is split over blocks too: float32 partial sums in the workspace, added in order by a second kernel. The split
// depends on shapes alone, so that the workspace does not depend on the device.
#pragma once

#include <algorithm>

#include "linear.cuh"

namespace sinkexport {
namespace linear {

constexpr int kRowWarps = 4;    // side by side along the outputs
constexpr int kManyChunk = 64;  // k of a step

// Tiles of a warp, and warps side by side along the tokens.
template <int kRowTiles_, int kTokenTiles_, int kTokenWarps_, int kStages_>
struct ManyShape {
  static constexpr int kRowTiles = kRowTiles_, kTokenTiles = kTokenTiles_, kTokenWarps = kTokenWarps_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = kRowWarps * kTokenWarps * kWarpSize;
  static constexpr int kRows = kRowWarps * 16 * kRowTiles, kTokens = kTokenWarps * 8 * kTokenTiles;
  static constexpr int kTiles = kRows / kInt4TileOutputs;  // of INT4 weights
  // Of weights in a stage; with INT4 ones scales and zero points of two blocks a tile included.
  template <typename Weight>
  static constexpr int kWeightBytes =
      kIsInt4<Weight> ? kTiles * (kInt4TileBytes + 2 * kInt4GroupBytes) : kRows * kManyChunk * kBits<Weight> / 8;
  template <typename Weight>
  static constexpr int kStageBytes = kWeightBytes<Weight> + kTokens * kManyChunk * 2;
};

// Copies of a stage's INT4 weights, by all threads: 64 inputs of some tiles. Layout: weights, scales, zero points.
template <typename Shape>
struct ManyInt4 {
  static constexpr int kTiles = Shape::kTiles;
  static constexpr int kScalesAt = kTiles * kInt4TileBytes, kZerosAt = kScalesAt + kTiles * 2 * kInt4ScaleBytes;

  static __device__ __forceinline__ void copy(unsigned char* stage, const LinearParams& p, int first_tile, int step) {
    const Int4Sizes sizes(p);
    const int last_tile = sizes.num_tiles - 1;
    const auto* const weight = static_cast<const unsigned char*>(p.weight);
#pragma unroll
    for (int i = threadIdx.x; i < kTiles * kWarpSize; i += Shape::kThreads) {
      const size_t tile = min(first_tile + i / kWarpSize, last_tile);
      copyAsync(stage + i * 16, weight + (tile * sizes.num_steps + step) * kInt4TileBytes + i % kWarpSize * 16, 16);
    }
    // Of two blocks each: four units of scales, two of zero points.
    constexpr int kUnits = 8;
    const int tile_of_block = threadIdx.x / kUnits, unit = threadIdx.x % kUnits;
    if (tile_of_block >= kTiles || unit >= 6) return;
    const bool is_zeros = unit >= 4;
    const int which = is_zeros ? unit - 4 : unit / 2, group = (step * kInt4TileInputs >> sizes.block_shift) + which;
    const bool valid =
        group < sizes.num_groups && (which == 0 || p.block_size < kInt4TileInputs) && !(is_zeros && !p.zero_points);
    const size_t at =
        valid ? static_cast<size_t>(min(first_tile + tile_of_block, last_tile)) * sizes.num_groups + group : 0;
    if (is_zeros) {
      const void* const from = valid ? p.zero_points + at * kInt4TileOutputs : p.weight;
      copyAsync(stage + kZerosAt + (tile_of_block * 2 + which) * kInt4TileOutputs, from, valid ? 16 : 0);
    } else {
      const auto* const from = static_cast<const unsigned char*>(p.block_scale) + at * kInt4ScaleBytes + unit % 2 * 16;
      copyAsync(stage + kScalesAt + (tile_of_block * 2 + which) * kInt4ScaleBytes + unit % 2 * 16, from,
                valid ? 16 : 0);
    }
  }

  template <typename Factors>
  static __device__ __forceinline__ Int4Group<Factors> group(const unsigned char* stage, int tile, int which, int g,
                                                             bool has_zeros) {
    return {stage + kScalesAt + (tile * 2 + which) * kInt4ScaleBytes,
            stage + kZerosAt + (tile * 2 + which) * kInt4TileOutputs, g, has_zeros};
  }
};

// Grid: token tiles, output tiles, splits of k. `partial` [splits, M, N], or null if there is one split.
template <typename Weight, typename Half, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kTokenWarps > 1 ? 2 : 1)
    manyTokens(const LinearParams p, float* __restrict__ partial, int chunks_per_split) {
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kTokens = Shape::kTokens;
  constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles;
  constexpr int kStages = Shape::kStages, kStageBytes = Shape::template kStageBytes<Weight>;
  constexpr int kWeightBytes = Shape::template kWeightBytes<Weight>;
  constexpr int kRowBytes = kManyChunk * kBits<Weight> / 8;  // of weights in a stage
  constexpr int kOddPieces = kIsInt8<Weight> ? 0 : 1;        // by which pieces of odd rows trade places, as tokens' do
  constexpr int kOddTokenPieces = kIsInt4<Weight> ? 4 : 1;   // and those of odd tokens
  constexpr int kPairsAtOnce = Shape::kTokenWarps > 1 ? 1 : 2;  // two would spill where 128 registers are all there is
  using Factors = Int4Differences<Half>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int num_tokens = p.num_rows, num_inputs = p.num_inputs, num_outputs = p.num_outputs;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int row_of_warp = threadIdx.x / kWarpSize % kRowWarps * 16 * kRowTiles;
  const int token_of_warp = threadIdx.x / kWarpSize / kRowWarps * 8 * kTokenTiles;
  const int first_token = blockIdx.x * kTokens, first_row = blockIdx.y * kRows;
  const int first_chunk = blockIdx.z * chunks_per_split;
  const int num_steps = min(divideUp(num_inputs, kManyChunk) - first_chunk, chunks_per_split);

  waitForEarlierKernels();

  // Past the last output or token the last one is read again; sums of those are not stored.
  [[maybe_unused]] const Weight* const weight =
      static_cast<const Weight*>(p.weight) + (kIsInt4<Weight> ? 0 : static_cast<size_t>(first_row) * num_inputs);
  const Half* const x = static_cast<const Half*>(p.x) + static_cast<size_t>(first_token) * num_inputs;
  const int last_row = num_outputs - 1 - first_row, last_token = num_tokens - 1 - first_token;
  const auto copyStep = [&](int step) {
    if (step < num_steps) {
      unsigned char* const stage = shared + step % kStages * kStageBytes;
      const int first_k = (first_chunk + step) * kManyChunk;
      if constexpr (kIsInt4<Weight>) {
        ManyInt4<Shape>::copy(stage, p, first_row / kInt4TileOutputs, first_chunk + step);
      } else {
        constexpr int kUnit = kUnitWeights<Weight>, kPieces = kManyChunk / kUnit;
        const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, k = first_k + piece * kUnit;
        const int size = k < num_inputs ? 16 : 0;
        unsigned char* const to = stage + (row * kPieces + (piece ^ (row & 1) * kOddPieces)) * 16;
#pragma unroll
        for (int i = 0; i < kRows; i += kThreads / kPieces) {
          copyAsync(to + i * kRowBytes, weight + (size ? min(row + i, last_row) * num_inputs + k : 0), size);
        }
      }
      {
        constexpr int kPieces = kManyChunk / 8;
        const int token = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, k = first_k + piece * 8;
        const int size = k < num_inputs ? 16 : 0;
        // 16-byte pieces of odd tokens trade places, so that lanes of two tokens read from all banks.
        unsigned char* const to =
            stage + kWeightBytes + (token * kPieces + (piece ^ (token & 1) * kOddTokenPieces)) * 16;
#pragma unroll
        for (int i = 0; i < kTokens; i += kThreads / kPieces) {
          copyAsync(to + i * kManyChunk * 2, x + (size ? min(token + i, last_token) * num_inputs + k : 0), size);
        }
      }
    }
    commitCopies();
  };

  float sum[kRowTiles][kTokenTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copyStep(step);
  for (int step = 0; step < num_steps; ++step) {
    waitForCopies<kStages - 2>();
    __syncthreads();
    copyStep(step + kStages - 1);  // into the stage that all threads have read in the step before
    const unsigned char* const stage = shared + step % kStages * kStageBytes;
    const unsigned char* const tokens = stage + kWeightBytes;
#pragma unroll(kPairsAtOnce)
    for (int pair = 0; pair < 2; ++pair) {  // two k16 tiles, whose share of a token is one 16-byte piece
      uint32_t a[kRowTiles][2][4];
      [[maybe_unused]] uint32_t scales[kRowTiles];
      if constexpr (kIsInt4<Weight>) {
        const int which = p.block_size < kInt4TileInputs ? pair : 0, first_tile = row_of_warp / kInt4TileOutputs;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const auto group =
              ManyInt4<Shape>::template group<Factors>(stage, first_tile + r, which, g, p.zero_points != nullptr);
          scales[r] = group.scales;
          const uint2 words =
              *reinterpret_cast<const uint2*>(stage + (first_tile + r) * kInt4TileBytes + lane * 16 + pair * 8);
          group.factors.take(a[r][0], words.x);
          group.factors.take(a[r][1], words.y);
        }
      } else {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          using Words = std::conditional_t<kIsInt8<Weight>, uint2, uint4>;
          constexpr int kBytes = sizeof(Words);  // of 8 weights
          const unsigned char* const rows =
              stage + (row_of_warp + 16 * r + g) * kRowBytes + t * 2 * kBytes + (pair ^ (g & 1) * kOddPieces) * kBytes;
          const Words near = *reinterpret_cast<const Words*>(rows);
          const Words far = *reinterpret_cast<const Words*>(rows + 8 * kRowBytes);
          takeTile<Weight, Half>(a[r][0], near, far, 0);
          takeTile<Weight, Half>(a[r][1], near, far, 1);
        }
      }
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = token_of_warp + 8 * j + g, piece = kIsInt4<Weight> ? pair * 4 + t : t * 2 + pair;
        const uint4 b =
            *reinterpret_cast<const uint4*>(tokens + (token * 8 + (piece ^ (token & 1) * kOddTokenPieces)) * 16);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          if constexpr (kIsInt4<Weight>) {
            float part[4] = {};
            multiplyAdd<Half>(part, a[r][0], b.x, b.y);
            multiplyAdd<Half>(part, a[r][1], b.z, b.w);
            addScaled(sum[r][j], part, scales[r]);
          } else {
            multiplyAdd<Half>(sum[r][j], a[r][0], b.x, b.y);
            multiplyAdd<Half>(sum[r][j], a[r][1], b.z, b.w);
          }
        }
      }
    }
  }
  waitForCopies<0>();

  allowNextKernel();  // not before: the next one's blocks would crowd where there is room now
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int output = first_row + row_of_warp + 16 * r + g + i * 8;
      if (output >= num_outputs) continue;
      const Output<Weight, Half> finish(p, output);
#pragma unroll
      for (int j = 0; j < 2 * kTokenTiles; ++j) {
        const int token = first_token + token_of_warp + j / 2 * 8 + 2 * t + j % 2;
        if (token >= num_tokens) continue;
        const float total = finished<Weight, Half>(sum[r][j / 2], 2 * i + j % 2);
        if (partial) {
          partial[(static_cast<size_t>(blockIdx.z) * num_tokens + token) * num_outputs + output] = total;
        } else {
          storeOutput<Half>(p, static_cast<size_t>(token) * num_outputs + output, finish(total));
        }
      }
    }
  }
}

constexpr int kSumThreads = 256;

// y from `partial` [num_splits, M, N], added in order.
template <typename Weight, typename Half>
__global__ void __launch_bounds__(kSumThreads)
    sumSplits(const LinearParams p, const float* __restrict__ partial, int num_splits) {
  waitForEarlierKernels();
  const size_t count = static_cast<size_t>(p.num_rows) * p.num_outputs;
  const size_t i = static_cast<size_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  float total = 0.0f;
#pragma unroll 4
  for (int s = 0; s < num_splits; ++s) total += partial[s * count + i];
  storeOutput<Half>(p, i, Output<Weight, Half>(p, static_cast<int>(i % p.num_outputs))(total));
}

// --- launches ---

// How many tiles and splits of k a matmul of more than 16 tokens has; by shapes alone.
struct ManyPlan {
  dim3 grid;
  int chunks_per_split;
};

template <typename Shape>
ManyPlan planMany(const LinearParams& p, int wanted_blocks) {
  constexpr int kLeastChunks = 8;  // of a split, for its first copies not to be all of it
  ManyPlan plan{dim3(divideUp(p.num_rows, Shape::kTokens), divideUp(p.num_outputs, Shape::kRows)), 0};
  const int num_chunks = divideUp(p.num_inputs, kManyChunk);
  const int tiles = plan.grid.x * plan.grid.y;
  const int splits = std::max(1, std::min(wanted_blocks / tiles, num_chunks / kLeastChunks));
  plan.chunks_per_split = divideUp(num_chunks, splits);
  plan.grid.z = divideUp(num_chunks, plan.chunks_per_split);
  return plan;
}

template <typename Weight, typename Half, typename Shape>
cudaError_t launchMany(const LinearParams& p, const ManyPlan& plan, void* workspace, const Device& device,
                       cudaStream_t stream) {
  float* const partial = plan.grid.z > 1 ? static_cast<float*>(workspace) : nullptr;
  const cudaError_t error =
      launch(manyTokens<Weight, Half, Shape>, plan.grid, Shape::kThreads,
             Shape::kStages * Shape::template kStageBytes<Weight>, device, stream, p, partial, plan.chunks_per_split);
  if (error != cudaSuccess || !partial) return error;
  const size_t count = static_cast<size_t>(p.num_rows) * p.num_outputs;
  const dim3 grid(static_cast<unsigned>((count + kSumThreads - 1) / kSumThreads));
  return launch(sumSplits<Weight, Half>, grid, kSumThreads, 0, device, stream, p, partial,
                static_cast<int>(plan.grid.z));
}

using Low = ManyShape<1, 4, 1, 4>;   // 64 outputs x 32 tokens
using Wide = ManyShape<2, 8, 1, 4>;  // 128 x 64
using Tall = ManyShape<2, 8, 2, 3>;  // 128 x 128

// Calls use(shape, plan) for the shape of tiles that a matmul of more than 16 tokens takes: the largest that makes
// enough blocks.
template <typename Use>
auto withManyShape(const LinearParams& p, Use use) {
  constexpr unsigned kWantedBlocks = 264, kEnoughBlocks = 192;
  const auto blocks = [](const ManyPlan& plan) { return plan.grid.x * plan.grid.y * plan.grid.z; };
  const ManyPlan tall = planMany<Tall>(p, kWantedBlocks), wide = planMany<Wide>(p, kWantedBlocks);
  if (p.num_rows > Wide::kTokens && blocks(tall) >= kEnoughBlocks) return use(Tall{}, tall);
  if (p.num_rows > Low::kTokens && blocks(wide) >= kEnoughBlocks) return use(Wide{}, wide);
  return use(Low{}, planMany<Low>(p, 2 * kWantedBlocks));
}

}  // namespace linear
}  // namespace sinkexport
