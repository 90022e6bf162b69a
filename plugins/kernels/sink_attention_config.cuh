// What the host and the attention kernel agree on: the arguments of a launch, tiles, warps and shared memory.
#pragma once

#include <cuda_runtime.h>

#include "halves.cuh"
#include "sink_attention.h"
#include "warp.cuh"

namespace sinkexport {
namespace sink_attention {

// What the host planned for one launch.
struct AttendArgs {
  SinkAttentionParams p;
  // Prefill: where q, k and v of the chunk lie after `prepare`; k and v of non-sinks are int8 entries as 16-bit numbers
  // where the window is int8, and then have scales.
  const void* q;         // half [B, Hq, T, D]
  const void* q_sink;    // half [B, Hq, T, D], as the sinks meet it
  const void* k;         // half [B, Hkv, T, D]
  const void* v;         // half [B, Hkv, T, D]
  const void* k_scale;   // float16 [B, Hkv, T], int8 only
  const void* v_scale;   // float16 [B, Hkv, T]
  float* partial_out;    // [B * Hq * T, num_splits, D], not normalised
  float2* partial_sums;  // [B * Hq * T, num_splits]: RowSums
  int num_splits;
  int tiles_per_split;  // of a step; those of a chunk are known on the device
  int row_warps;        // of a chunk's block: warps with rows of their own; the others take other tiles for them
  bool is_cluster;      // a step's splits are the blocks of a cluster, which merges them itself
};

// Keys of a tile: 16, and twice as many of short int8 rows, so that what a tile costs beside its bytes is shared. Half
// as many of 16-bit rows beside an int8 window, so that all tiles are of about one size in bytes.
__host__ __device__ constexpr int tileKeys(int head_dim, bool window_is_int8, bool tile_is_int8) {
  const int keys = window_is_int8 && head_dim <= 80 ? 32 : 16;
  return window_is_int8 && !tile_is_int8 ? keys / 2 : keys;
}

// Bytes from one row to the next in shared memory: an odd number of pieces of 16 bytes.
__host__ __device__ constexpr int rowStride(int head_dim, bool tile_is_int8) {
  return 16 * (head_dim * (tile_is_int8 ? 1 : 2) / 16 | 1);
}

// Which of 8 keys, or of 8 pieces of a value, is lane group g's.
__host__ __device__ constexpr int spread(int g) {
  return g / 2 + 4 * (g % 2);
}

// Floats of shared memory that Turns (sink_attention_rows.cuh) needs.
__host__ __device__ constexpr int turnsFloats(int head_dim) {
  return 4 * (head_dim / 2);
}

// Tiles that a warp has on their way or in use: as many as let three blocks find room on a multiprocessor of 227 KB.
__host__ __device__ constexpr int stagesOf(int tile_bytes_of_block) {
  const int number = 70 * 1024 / tile_bytes_of_block;
  return number < 2 ? 2 : number > 4 ? 4 : number;
}

template <int kHeadDim_, DType kDType, bool kInt8_, int kRowTiles_, bool kPrefill_>
struct Config {
  using Half = HalfOf<kDType>;
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_;
  static constexpr bool kInt8 = kInt8_, kPrefill = kPrefill_;

  // A lane of a quad holds pieces of 8 dimensions (16 bytes of 16-bit numbers) of a key, in int8 kernels two at a time.
  // It also holds its share of the 16 or 32 dimensions that are left over. A lane of eight does so of a value.
  static constexpr int kKeyTail = kHeadDim % (kInt8 ? 64 : 32);
  static constexpr int kKeyPieces = (kHeadDim - kKeyTail) / 32;
  // Whether a lane takes 16 bytes of an int8 value at once; otherwise 8.
  static constexpr bool kWideValues = kInt8 && kHeadDim % 128 == 0;
  static constexpr int kValueTail = kHeadDim % 64;
  static constexpr int kWholeTiles = (kHeadDim - kValueTail) / 16;  // of pieces; four a piece
  static constexpr int kOutTiles = kHeadDim / 16;                   // of 16 dimensions of O^T
  static constexpr int kWarpRows = 8 * kRowTiles;
  // A chunk's queries stay in registers as far as these go; those of larger heads are read for every tile.
  static constexpr bool kHoldsQueries = kPrefill && kHeadDim <= 128;
  // int8 takes more arithmetic a byte, and more warps to hide it; in one block, so that fewer splits have to be merged.
  static constexpr int kWarps = kHeadDim > 128 ? (kInt8 ? 4 : 2) : kInt8 && kRowTiles == 1 ? 8 : 4;
  static constexpr int kThreads = kWarpSize * kWarps;
  // Tiles of each type: its keys, then its values.
  static constexpr int kWindowKeys = tileKeys(kHeadDim, kInt8, kInt8), kOtherKeys = tileKeys(kHeadDim, kInt8, false);
  static constexpr int kWindowBytes = 2 * kWindowKeys * rowStride(kHeadDim, kInt8);
  static constexpr int kOtherBytes = 2 * kOtherKeys * rowStride(kHeadDim, false);
  static constexpr int kStageBytes = kWindowBytes > kOtherBytes ? kWindowBytes : kOtherBytes;
  static constexpr int kStages = kInt8 ? 2 : stagesOf(kWarps * kStageBytes);
  // As far as registers go.
  static constexpr int kBlocksOfSm = kWarps == 8 || kPrefill || (kHeadDim > 128 && kRowTiles == 2) ? 2 : 3;
  static constexpr int kScalePieces = kWindowKeys / 8 + 1;  // of 8 float16; a tile may begin in the middle of one
  static constexpr int kStageScales = 2 * kScalePieces;     // pieces of a stage: keys' scales, then values'
  static constexpr int kValueScalesAt = 8 * kScalePieces;   // float16 before those of values

  // Shared memory: stages (later the warps' outputs) | q | q for sinks | new row | its scales | scales | sums | turns.
  // In 16-bit numbers. The pieces that 8 lanes read of two rows lie in different banks: rows are 64 bytes out of step
  // (modulo 128) where a quad reads 64 in a row, 16 (modulo 32) where it reads every other 16.
  static constexpr int kRowStride = kInt8 ? kHeadDim + 8 : 64 * divideUp(kHeadDim - 32, 64) + 32;
  static constexpr int kStagesBytes = kWarps * kStages * kStageBytes;
  static constexpr int kQueryBytes = kPrefill ? 0 : kWarpRows * kRowStride * 2;
  static constexpr int kNewRowBytes = kHeadDim * 2;
  static constexpr int kNewScaleBytes = 16;
  static constexpr int kScaleBytes = kInt8 ? kWarps * kStages * kStageScales * 16 : 0;
  static constexpr int kSumsBytes = kWarps * kWarpRows * 8;
  static constexpr int kSharedBytes = kStagesBytes + 2 * kQueryBytes + 2 * kNewRowBytes + kNewScaleBytes + kScaleBytes +
                                      kSumsBytes + 4 * turnsFloats(kHeadDim);
  static_assert(kWarps * kWarpRows * kHeadDim * 4 <= kStagesBytes, "the warps' outputs take the place of the stages");
  static_assert(kSharedBytes <= 96 * 1024, "more than a block of compute capability 7.2 can have; 8.6, 8.9, 12.0: 99");

  // Behind all that, in a cluster: a block's share of what all blocks summed | their sums.
  static constexpr int kMostClusterBlocks = 8;
  static constexpr int kMostRows = kPrefill ? kWarps * kWarpRows : kWarpRows;  // of a block
  static constexpr int kReceivedBytes = (kMostRows * kHeadDim + 4 * kMostClusterBlocks) * 4;
  static constexpr int kClusterBytes = kReceivedBytes + kMostClusterBlocks * kMostRows * 8;

  // Which piece of 8 dimensions is the i-th of lane c of a quad (keys) or of lane g of eight (values). Piece 2i and
  // 2i+1 are neighbours in int8 kernels, whose 16 bytes are 16 dimensions.
  static __device__ constexpr int keyPiece(int i, int c) { return kInt8 ? 8 * (i / 2) + 2 * c + i % 2 : 4 * i + c; }
  static __device__ constexpr int valuePiece(int i, int g) {
    return kWideValues ? 16 * (i / 2) + 2 * spread(g) + i % 2 : 8 * i + spread(g);
  }
  // First of lane c's share of a key's tail, and of lane g's of a value's.
  static __device__ constexpr int keyTailDim(int c) { return kHeadDim - kKeyTail + kKeyTail / 4 * c; }
  static __device__ constexpr int valueTailDim(int g) { return kHeadDim - kValueTail + kValueTail / 8 * g; }
  // Dimension of row g of an output tile; row 8 + g is the next one.
  static __device__ constexpr int outDim(int tile, int g) {
    if (tile >= kWholeTiles) return valueTailDim(g) + 2 * (tile - kWholeTiles);
    return 8 * valuePiece(tile / 4, g) + 2 * (tile % 4);
  }
};

// Where a block and a thread of it stand. Grid: (blocks of rows) x [B, Hkv], splits. A chunk's last rows have the most
// keys, so they come first.
template <typename C>
struct Place {
  int lane, warp, g, c;  // g, c: of eight groups of four lanes, and in the group
  int stream, kv_head, num_heads;
  size_t head_row, window_row, sink_row, chunk_row;  // first row of [B, Hkv], and of its sections' arrays
  int group;                                         // query heads that share kv_head
  int num_rows, row_begin;  // rows of (stream, kv_head), and the block's first one: token * group + head in group
  int block_rows;
  int parts, part;  // of the tiles: the warps of a part have rows of their own
  int warp_row;     // the warp's first row, of the block's

  __device__ explicit Place(const AttendArgs& args)
      : lane(threadIdx.x % kWarpSize),
        warp(threadIdx.x / kWarpSize),
        g(lane / 4),
        c(lane % 4),
        num_heads(args.p.batch * args.p.num_kv_heads),
        group(args.p.num_q_heads / args.p.num_kv_heads),
        num_rows(group * args.p.num_tokens) {
    const int row_warps = C::kPrefill ? args.row_warps : 1;
    const int head = blockIdx.x % num_heads;
    stream = head / args.p.num_kv_heads, kv_head = head % args.p.num_kv_heads;
    head_row = head;
    window_row = head_row * args.p.window_size;
    sink_row = head_row * args.p.num_sinks;
    chunk_row = head_row * args.p.num_tokens;
    block_rows = row_warps * C::kWarpRows;
    row_begin = (gridDim.x / num_heads - 1 - blockIdx.x / num_heads) * block_rows;
    parts = C::kWarps / row_warps, part = warp / row_warps;
    warp_row = warp % row_warps * C::kWarpRows;
  }

  __device__ int tokenOf(int row) const { return C::kPrefill ? row / group : 0; }
  __device__ int headOf(int row) const { return kv_head * group + (C::kPrefill ? row % group : row); }
  __device__ int rowsHere() const { return min(block_rows, num_rows - row_begin); }
};

// The block's shared memory.
template <typename C>
struct Shared {
  using Half = typename C::Half;

  float* outs;    // [warp][row][D], once the stages are done with
  uint4* stages;  // [warp][stage]
  Half* q;        // a step's, rows of kRowStride
  Half* q_sink;   // the same, as the sinks meet them
  uint4* new_k;   // the step's own row
  uint4* new_v;
  __half* new_scales;  // of k, of v
  uint4* scales;       // of the stages
  float2* sums;        // [warp][row]: RowSums
  float* turns;
  float* received;        // in a cluster: [block][share of rows x D]
  float2* received_sums;  // [block][row]

  __device__ explicit Shared(uint4* memory) {
    outs = reinterpret_cast<float*>(memory);
    stages = memory;
    char* bytes = reinterpret_cast<char*>(memory) + C::kStagesBytes;
    q = reinterpret_cast<Half*>(bytes);
    q_sink = reinterpret_cast<Half*>(bytes += C::kQueryBytes);
    new_k = reinterpret_cast<uint4*>(bytes += C::kQueryBytes);
    new_v = reinterpret_cast<uint4*>(bytes += C::kNewRowBytes);
    new_scales = reinterpret_cast<__half*>(bytes += C::kNewRowBytes);
    scales = reinterpret_cast<uint4*>(bytes += C::kNewScaleBytes);
    sums = reinterpret_cast<float2*>(bytes += C::kScaleBytes);
    turns = reinterpret_cast<float*>(bytes + C::kSumsBytes);
    bytes = reinterpret_cast<char*>(memory) + C::kSharedBytes;
    received = reinterpret_cast<float*>(bytes);
    received_sums = reinterpret_cast<float2*>(bytes + C::kReceivedBytes);
  }

  __device__ uint4* stage(int warp, int i) const { return stages + (warp * C::kStages + i) * (C::kStageBytes / 16); }
  __device__ uint4* stageScales(int warp, int i) const { return scales + (warp * C::kStages + i) * C::kStageScales; }
};

}  // namespace sink_attention
}  // namespace sinkexport
