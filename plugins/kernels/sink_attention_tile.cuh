// One tile of the cache: how it comes to shared memory, and its two matmuls.
//
// Both matmuls put up with any order of what they sum over and of what they give. So a lane = 4 * g + c feeds whole
// pieces of 16 bytes to mma.m16n8k16 (no ldmatrix, no barrier but the warp's). Rows lie in shared memory as they do in
// the cache, an odd number of pieces apart:
//   S^T = K Q^T    of 16 keys each: keys g / 2 + 4 * (g % 2) and 8 more, dimensions of pieces c
//   O^T = V^T P^T  of 16 keys each: keys c, c+4, 8+c, 12+c, dimensions of pieces g / 2 + 4 * (g % 2)
// In this order the pieces that 8 lanes read at once lie in different banks. S^T leaves two keys by rows 2c and 2c+1 in
// a thread, which are its rows of O^T too; transposed, 8 x 8 at a time, that is P^T. int8 entries become exact 16-bit
// numbers in registers; scales go to the logits and to P.
#pragma once

#include <type_traits>

#include "cp_async.cuh"
#include "half_pairs.cuh"
#include "mma.cuh"
#include "sink_attention_config.cuh"

namespace sinkexport {
namespace sink_attention {

// A section of the cache, of one (stream, kv head). Rows 0 .. limit-1 of it are there.
struct Source {
  const char* k;
  const char* v;
  int limit;
};

// A lane's piece of 8 scales of every tile's keys or values. shift: float16 that come before the tile's first one.
struct ScaleSource {
  const char* at;
  int left;  // float16 from there to the array's end
  int shift;
};

// first, end: of the tiles' rows, and of all, in the arrays.
template <typename C>
__device__ ScaleSource scaleSource(const void* k_scale, const void* v_scale, size_t first, size_t end, int lane) {
  const bool is_value = lane >= C::kScalePieces;
  const size_t begin = first / 8 * 8 + 8 * (lane - (is_value ? C::kScalePieces : 0));
  const auto left = static_cast<int64_t>(end) - static_cast<int64_t>(begin);
  return {static_cast<const char*>(is_value ? v_scale : k_scale) + 2 * begin,
          static_cast<int>(left < INT32_MAX ? left : INT32_MAX), static_cast<int>(first % 8)};
}

// The warp's copy of a tile's scales. row0: its first row, a multiple of 8.
template <typename C>
__device__ void loadScales(const ScaleSource& source, int row0, uint4* target, int lane) {
  if (lane >= 2 * C::kScalePieces) return;
  const int left = source.left - row0;
  copyAsync(target + lane, source.at + (left > 0 ? 2 * row0 : 0), left >= 8 ? 16 : left > 0 ? 2 * left : 0);
}

// A step's queries, in shared memory.
template <typename C>
struct StepQueries {
  const typename C::Half* row;  // of the lane's group
  int c;

  __device__ uint4 piece(int r, int i) const {
    return *reinterpret_cast<const uint4*>(row + 8 * r * C::kRowStride + 8 * C::keyPiece(i, c));
  }
  __device__ uint2 tail(int r, int i) const {
    return *reinterpret_cast<const uint2*>(row + 8 * r * C::kRowStride + C::keyTailDim(c) + 4 * i);
  }
};

// A chunk's queries: a lane's share of them, in registers if they are held.
template <typename C>
struct ChunkQueries {
  using Half = typename C::Half;
  static constexpr int kPieces = C::kHoldsQueries ? C::kKeyPieces : 0, kTails = C::kHoldsQueries ? C::kKeyTail / 16 : 0;

  const Half* rows[C::kRowTiles];
  int c;
  uint4 pieces[C::kRowTiles][kPieces + 1];  // one more: there are no arrays of none
  uint2 tails[C::kRowTiles][kTails + 1];

  // rows: in global memory, of the lane's group in each row tile.
  __device__ void take(const Half* const (&from)[C::kRowTiles], int lane_in_quad) {
    c = lane_in_quad;
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      rows[r] = from[r];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) pieces[r][i] = read<uint4>(r, 8 * C::keyPiece(i, c));
#pragma unroll
      for (int i = 0; i < kTails; ++i) tails[r][i] = read<uint2>(r, C::keyTailDim(c) + 4 * i);
    }
  }
  __device__ uint4 piece(int r, int i) const {
    return C::kHoldsQueries ? pieces[r][i % (kPieces + 1)] : read<uint4>(r, 8 * C::keyPiece(i, c));
  }
  __device__ uint2 tail(int r, int i) const {
    return C::kHoldsQueries ? tails[r][i % (kTails + 1)] : read<uint2>(r, C::keyTailDim(c) + 4 * i);
  }

 private:
  template <typename Word>
  __device__ Word read(int r, int dim) const {
    return *reinterpret_cast<const Word*>(rows[r] + dim);
  }
};

// A tile in a stage: rows of keys, then rows of values.
template <typename C, bool kInt8Tile>
struct Tile {
  using Half = typename C::Half;
  static constexpr int kKeys = kInt8Tile ? C::kWindowKeys : C::kOtherKeys;
  static constexpr int kGroups = kKeys / 8;
  static constexpr int kSteps = divideUp(kKeys, 16);  // of both matmuls
  static constexpr int kElement = kInt8Tile ? 1 : 2;  // bytes
  static constexpr int kRowBytes = C::kHeadDim * kElement;
  static constexpr int kRowPieces = kRowBytes / 16;
  static constexpr int kStride = rowStride(C::kHeadDim, kInt8Tile) / 16;    // in pieces, as all else here
  static constexpr int kTilesOfRead = kInt8Tile && C::kWideValues ? 8 : 4;  // that one read of a value feeds
  static constexpr int kValues = kKeys / 4;                                 // rows of a lane
  static constexpr int kValuesAt = kKeys * kStride;
  static_assert(2 * 16 * kKeys * kStride <= C::kStageBytes);

  using Dots = float[C::kRowTiles][kSteps][4];
  using Outs = float[C::kRowTiles][C::kOutTiles][4];

  // Where the i-th piece of lane c of a quad is in a row.
  static __device__ constexpr int keyPiece(int i, int c) { return kInt8Tile ? 4 * i + c : C::keyPiece(i, c); }
  // Row of lane group g's key of each group of 8, and of the i-th value of lane c of a quad.
  static __device__ constexpr int keyRow(int group, int g) { return 8 * group + spread(g); }
  static __device__ constexpr int valueRow(int i, int c) { return 8 * (i / 2) + c + 4 * (i % 2); }

  // Copies one tile into a stage, whole rows by neighbouring lanes; zeros for rows that are not there: logits of their
  // keys are masked, weights of their values zero. What is read of the row that this step writes counts for nothing:
  // `insert` replaces it.
  static __device__ void load(const Source& source, int row0, uint4* stage, int lane) {
    constexpr int kRowsAtOnce = 32 / kRowPieces, kLanes = kRowsAtOnce * kRowPieces;
    if (kLanes < 32 && lane >= kLanes) return;
    const int key0 = lane / kRowPieces, piece = lane % kRowPieces;
    uint4* const target = stage + key0 * kStride + piece;
    const size_t offset = static_cast<size_t>(row0) * kRowBytes + 16 * lane;
    const char *const k = source.k + offset, *const v = source.v + offset;
    auto copy = [&](auto is_checked) {
#pragma unroll
      for (int key = 0; key < kKeys; key += kRowsAtOnce) {
        if (kKeys % kRowsAtOnce != 0 && key + key0 >= kKeys) continue;
        const bool is_there = !decltype(is_checked)::value || row0 + key + key0 < source.limit;
        const int at = key * kRowBytes, num_bytes = is_there ? 16 : 0;
        copyAsync(target + key * kStride, is_there ? k + at : source.k, num_bytes);
        copyAsync(target + key * kStride + kValuesAt, is_there ? v + at : source.v, num_bytes);
      }
    };
    if (row0 + kKeys <= source.limit)
      copy(std::false_type{});
    else
      copy(std::true_type{});
  }

  // Puts the step's own token into the tile that holds its row. k, v: its row in shared memory.
  static __device__ void insert(const uint4* k, const uint4* v, int own_key, uint4* stage, int lane) {
    uint4* const target = stage + own_key * kStride;
    for (int piece = lane; piece < kRowPieces; piece += 32) {
      target[piece] = k[piece];
      target[kValuesAt + piece] = v[piece];
    }
  }

  // Zeros for values that are not there, from row `first` on: they may be anything, and their weights are zero.
  static __device__ void clearValues(int first, uint4* stage, int lane) {
    for (int i = lane; i < (kKeys - first) * kRowPieces; i += 32) {
      stage[kValuesAt + (first + i / kRowPieces) * kStride + i % kRowPieces] = make_uint4(0, 0, 0, 0);
    }
  }

  // Adds q . k, no scales yet: [row tile][16 keys]{key of g: rows 2c, 2c+1; key of 8 + g: likewise}.
  template <typename Queries>
  static __device__ void multiplyKeys(const Queries& queries, const uint4* stage, int lane, Dots& dots) {
    const int g = lane / 4, c = lane % 4;
    auto rowOf = [&](int group) { return stage + keyRow(group, g) * kStride; };
#pragma unroll
    for (int i = 0; i < C::kKeyPieces; ++i) {
      uint4 query[C::kRowTiles];
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) query[r] = queries.piece(r, i);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint4 k[2] = {};
#pragma unroll
        for (int half = 0; half < 2 && 2 * step + half < kGroups; ++half) {
          // int8: read once for both values of i
          const uint4 piece = rowOf(2 * step + half)[keyPiece(kInt8Tile ? i / 2 : i, c)];
          if constexpr (kInt8Tile) {
            int8ToHalves<Half>(i % 2 ? piece.z : piece.x, k[half].x, k[half].y);
            int8ToHalves<Half>(i % 2 ? piece.w : piece.y, k[half].z, k[half].w);
          } else {
            k[half] = piece;
          }
        }
#pragma unroll
        for (int r = 0; r < C::kRowTiles; ++r) {
          multiplyAdd<Half>(dots[r][step], {k[0].x, k[1].x, k[0].y, k[1].y}, query[r].x, query[r].y);
          multiplyAdd<Half>(dots[r][step], {k[0].z, k[1].z, k[0].w, k[1].w}, query[r].z, query[r].w);
        }
      }
    }
    multiplyKeyTails(queries, stage, lane, dots);
  }

  // The same of the dimensions that are left over, 4 of each lane at a time.
  template <typename Queries>
  static __device__ void multiplyKeyTails(const Queries& queries, const uint4* stage, int lane, Dots& dots) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < C::kKeyTail / 16; ++i) {
      const int d = C::keyTailDim(c) + 4 * i;
      uint2 query[C::kRowTiles];
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) query[r] = queries.tail(r, i);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint2 k[2] = {};
#pragma unroll
        for (int half = 0; half < 2 && 2 * step + half < kGroups; ++half) {
          const uint4* const row = stage + keyRow(2 * step + half, g) * kStride;
          const void* at = reinterpret_cast<const char*>(row) + d * kElement;
          if constexpr (kInt8Tile)
            int8ToHalves<Half>(*static_cast<const uint32_t*>(at), k[half].x, k[half].y);
          else
            k[half] = *static_cast<const uint2*>(at);
        }
#pragma unroll
        for (int r = 0; r < C::kRowTiles; ++r) {
          multiplyAdd<Half>(dots[r][step], {k[0].x, k[1].x, k[0].y, k[1].y}, query[r].x, query[r].y);
        }
      }
    }
  }

  // The 16 keys of one step, kDims dimensions of each lane (from `dim` on), to the output tiles from first_tile on.
  // weights: pairs of halves, of the tile's groups of 8 keys from `group` on.
  template <int kDims, int kAll>
  static __device__ void addPiece(const uint32_t (&weights)[C::kRowTiles][kAll], int group, const uint4* stage,
                                  int step, int dim, int first_tile, int c, Outs& out) {
    constexpr int kBytes = kDims * kElement, kWords = divideUp(kBytes, 4);
    struct alignas(kBytes) Piece {
      std::conditional_t<kBytes == 2, uint16_t, uint32_t> word[kWords];
    };
    Piece v[4];
#pragma unroll
    for (int key = 0; key < 4; ++key) {
      v[key] = {};
      if (4 * step + key >= kValues) continue;
      const uint4* const row = stage + kValuesAt + valueRow(4 * step + key, c) * kStride;
      v[key] = *reinterpret_cast<const Piece*>(reinterpret_cast<const char*>(row) + dim * kElement);
    }
    auto add = [&](int tile, const uint32_t (&a)[4]) {
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) {
        const uint32_t upper = 2 * step + 1 < kGroups ? weights[r][group + (2 * step + 1) % kGroups] : 0;
        multiplyAdd<Half>(out[r][tile], a, weights[r][group + 2 * step], upper);
      }
    };
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t w[4] = {v[0].word[word], v[1].word[word], v[2].word[word], v[3].word[word]};
      if constexpr (kInt8Tile) {
#pragma unroll
        for (int two = 0; two < (kBytes == 2 ? 1 : 2); ++two) {  // dimensions 4 * word + 2 * two + 0, 1
          uint32_t a[4];
          int8ToHalves<Half>(__byte_perm(w[0], w[1], two ? 0x7362 : 0x5140), a[0], a[1]);
          int8ToHalves<Half>(__byte_perm(w[2], w[3], two ? 0x7362 : 0x5140), a[2], a[3]);
          add(first_tile + 2 * word + two, a);
        }
      } else {
        add(first_tile + word, {__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632),
                                __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[2], w[3], 0x7632)});
      }
    }
  }

  // Adds weights . v of the tile.
  template <int kAll>
  static __device__ void addValues(const uint32_t (&weights)[C::kRowTiles][kAll], int group, const uint4* stage,
                                   int lane, Outs& out) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < C::kWholeTiles; tile += kTilesOfRead) {
        addPiece<2 * kTilesOfRead>(weights, group, stage, step, C::outDim(tile, g), tile, c, out);
      }
      if constexpr (C::kValueTail > 0) {
        addPiece<C::kValueTail / 8>(weights, group, stage, step, C::valueTailDim(g), C::kWholeTiles, c, out);
      }
    }
  }
};

}  // namespace sink_attention
}  // namespace sinkexport
