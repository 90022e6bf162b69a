// INT4 weights in matmuls of up to 16 tokens (linear_few.cuh): a stage's copies, and their part of the sums.
#pragma once

#include <cstddef>

#include "linear.cuh"

namespace sinkexport {
namespace linear {

// Layout of a stage: weights of all tiles of outputs, scales, zero points; then tokens. There is room for blocks of 32.
template <typename Stage>
struct FewInt4 {
  static constexpr int kTilesAlongK = Stage::kChunk / kInt4TileInputs, kGroups = Stage::kChunk / 32;
  static constexpr int kScalesAt = Stage::kNumRowTiles * Stage::kTileBytes;
  static constexpr int kZerosAt = kScalesAt + Stage::kNumRowTiles * kGroups * kInt4ScaleBytes;
};

// By a warp. first_output: of its matrix among those of all; first_row: of the tile in its matrix; tile_step: outputs
// from one tile of 16 to the next.
template <typename Stage>
__device__ __forceinline__ void copyInt4(unsigned char* stage, const LinearParams& p, size_t first_output,
                                         int first_row, int tile_step, int first_k, int lane) {
  using Layout = FewInt4<Stage>;
  constexpr int kRowTiles = Stage::kNumRowTiles, kTilesAlongK = Layout::kTilesAlongK, kGroups = Layout::kGroups;
  const Int4Sizes sizes(p);
  const int step = first_k / kInt4TileInputs, num_steps = sizes.num_steps - step;
  const int row_tile = static_cast<int>((first_output + first_row) / kInt4TileOutputs);
  const auto hasRows = [&](int r) { return first_row + r * tile_step < p.num_outputs; };
  const auto* const from = static_cast<const unsigned char*>(p.weight) +
                           (static_cast<size_t>(row_tile) * sizes.num_steps + step) * kInt4TileBytes + lane * 16;
  const int tiles_apart = tile_step / kInt4TileOutputs;
  const size_t row_tile_bytes = static_cast<size_t>(sizes.num_steps) * kInt4TileBytes * tiles_apart;
  unsigned char* const to = stage + lane * 16;
  if (num_steps >= kTilesAlongK && hasRows(kRowTiles - 1)) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kTilesAlongK; ++i) {
        copyAsync(to + r * Stage::kTileBytes + i * kInt4TileBytes, from + r * row_tile_bytes + i * kInt4TileBytes, 16);
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll 1
      for (int i = 0; i < kTilesAlongK; ++i) {
        const bool valid = i < num_steps && hasRows(r);
        copyAsync(to + r * Stage::kTileBytes + i * kInt4TileBytes,
                  valid ? from + r * row_tile_bytes + i * kInt4TileBytes : p.weight, valid ? 16 : 0);
      }
    }
  }
  // Units of 16 bytes, of each tile two of scales and one of zero points a group: one for each lane, or two.
  const int group = first_k >> sizes.block_shift, groups = Stage::kChunk >> sizes.block_shift;
  const int num_groups = sizes.num_groups - group, num_units = (p.zero_points ? 3 : 2) * groups;
#pragma unroll
  for (int first = 0; first < 3 * kGroups; first += kWarpSize) {
    const bool is_zeros = first + lane >= 2 * groups;
    const int unit = first + lane - (is_zeros ? 2 * groups : 0), of_group = is_zeros ? unit : unit / 2;
    if (first + lane >= num_units) break;
    const auto* const base = is_zeros ? p.zero_points : static_cast<const uint8_t*>(p.block_scale);
    const int group_bytes = is_zeros ? kInt4TileOutputs : kInt4ScaleBytes;
    const size_t at = (static_cast<size_t>(row_tile) * sizes.num_groups + group) * group_bytes + unit * 16;
    unsigned char* const groups_to = stage + (is_zeros ? Layout::kZerosAt : Layout::kScalesAt) + unit * 16;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const bool valid = of_group < num_groups && hasRows(r);
      const size_t tiles_on = static_cast<size_t>(r) * tiles_apart;
      copyAsync(groups_to + r * kGroups * group_bytes,
                valid ? base + at + tiles_on * sizes.num_groups * group_bytes : base, valid ? 16 : 0);
    }
  }
}

// Where tokens of a chunk lie in shared memory, and how many bytes one has there.
struct FewTokens {
  const unsigned char* first;
  int bytes, count;
};

// sum += the chunk's INT4 weights by its tokens. kBlock: inputs that are summed before the scale joins, 32 or 64; a
// multiple of it is the block of weights. Tokens past the last are the last one again: their sums are not stored.
template <typename Stage, typename Half, int kRowTiles, int kTokenTiles, int kBlock, bool kHasZeros>
__device__ __forceinline__ void multiplyInt4(float (&sum)[kRowTiles][kTokenTiles][4], const unsigned char* stage,
                                             const FewTokens& tokens, int block_shift, int lane) {
  using Factors = Int4Differences<Half>;
  const int g = lane / 4, t = lane % 4;
  // Of each token tile: the two pieces of the first 64 inputs.
  const unsigned char* pieces[kTokenTiles][2];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int token = min(8 * j + g, tokens.count - 1), odd = (token & 1) * Stage::kOddPieces;
    const unsigned char* const of_token = tokens.first + token * tokens.bytes + t * 16;
    pieces[j][0] = of_token + odd * 16, pieces[j][1] = of_token + (Stage::kOddPieces - odd) * 16;
  }
#pragma unroll
  for (int step = 0; step < FewInt4<Stage>::kTilesAlongK; ++step) {
    uint4 b[kTokenTiles][2];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) b[j][i] = *reinterpret_cast<const uint4*>(pieces[j][i] + step * kInt4TileInputs * 2);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint4 words = *reinterpret_cast<const uint4*>(
          stage + (r * FewInt4<Stage>::kTilesAlongK + step) * kInt4TileBytes + lane * 16);
#pragma unroll
      for (int i = 0; i < kInt4TileInputs / kBlock; ++i) {
        const int group =
            r * FewInt4<Stage>::kGroups + (kBlock == 32 ? 2 * step + i : (step * kInt4TileInputs) >> block_shift);
        const Int4Group<Factors> of_block(stage + FewInt4<Stage>::kScalesAt + group * kInt4ScaleBytes,
                                          stage + FewInt4<Stage>::kZerosAt + group * kInt4TileOutputs, g, kHasZeros);
        float part[kTokenTiles][4] = {};
#pragma unroll
        for (int s = 0; s < kBlock / 16; ++s) {
          const int tile = i * (kBlock / 16) + s;
          uint32_t a[4];
          of_block.factors.take(a, wordOf(words, tile));
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) {
            const uint4 piece = b[j][tile / 2];
            const uint32_t b0 = tile % 2 ? piece.z : piece.x, b1 = tile % 2 ? piece.w : piece.y;
            multiplyAdd<Half>(part[j], a, b0, b1);
          }
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) addScaled(sum[r][j], part[j], of_block.scales);
      }
    }
  }
}

// The same for what the weights have.
template <typename Stage, typename Half, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiplyInt4(float (&sum)[kRowTiles][kTokenTiles][4], const unsigned char* stage,
                                             const FewTokens& tokens, const LinearParams& p, int lane) {
  const int block_shift = Int4Sizes(p).block_shift;
  if (p.block_size == 32) {
    if (p.zero_points) {
      multiplyInt4<Stage, Half, kRowTiles, kTokenTiles, 32, true>(sum, stage, tokens, block_shift, lane);
    } else {
      multiplyInt4<Stage, Half, kRowTiles, kTokenTiles, 32, false>(sum, stage, tokens, block_shift, lane);
    }
  } else if (p.zero_points) {
    multiplyInt4<Stage, Half, kRowTiles, kTokenTiles, 64, true>(sum, stage, tokens, block_shift, lane);
  } else {
    multiplyInt4<Stage, Half, kRowTiles, kTokenTiles, 64, false>(sum, stage, tokens, block_shift, lane);
  }
}

}  // namespace linear
}  // namespace sinkexport
