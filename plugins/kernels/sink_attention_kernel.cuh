// The attention kernel itself: flash decoding on tensor cores, for a step (T = 1) and for a chunk (prefill).
//
// A block owns one (stream, kv head), 8 or 16 rows and one split of the cache. A row is a query head of the group at
// one of the T tokens: row = token * group + head in group. Each warp takes every kWarps-th tile of keys by itself,
// with its own online softmax; warps meet once, at the end.
//
// Both products put up with any order of what they sum over and of what they give, so a lane = 4 * g + c feeds whole
// pieces of 16 bytes to mma.m16n8k16 (no ldmatrix, no barrier but the warp's), of rows that lie in shared memory as
// they do in the cache, an odd number of pieces apart:
//   S^T = K Q^T    of 16 keys each: keys g / 2 + 4 * (g % 2) and 8 more, dimensions of pieces c
//   O^T = V^T P^T  of 16 keys each: keys c, c+4, 8+c, 12+c, dimensions of pieces g / 2 + 4 * (g % 2)
// In this order the pieces that 8 lanes read at once lie in different banks. S^T leaves two keys by rows 2c and 2c+1 in
// a thread, which are its rows of O^T too; transposed, 8 x 8 at a time, that is P^T. int8 entries become exact 16-bit
// numbers in registers; scales go to the logits and to P.
#pragma once

#include <type_traits>

#include "overlap.cuh"
#include "sink_attention_common.cuh"

namespace sinkexport {
namespace detail {

// What the host planned for one launch. "row chunk": kRowTiles * 8 rows of a block.
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
  int tiles_per_split;
};

// Weights are 2^(kBias + logit - base), where no logit is more than kSlack above the base: so sums need not be scaled
// down for every new largest logit. Up to 64: keeps weight * scale of small int8 rows out of float16's denormals; the
// largest scale of a float16 row is 516, so that 64 * scale does not overflow either.
constexpr float kBias = 4.0f, kSlack = 2.0f;

__host__ __device__ constexpr int divUp(int a, int b) {
  return (a + b - 1) / b;
}

// Keys of a tile: 16, and twice as many of short int8 rows, so that what a tile costs beside its bytes is shared. Of
// 16-bit rows beside an int8 window half as many, so that all tiles are of about one size in bytes.
__host__ __device__ constexpr int tileKeys(int head_dim, bool window_is_int8, bool tile_is_int8) {
  const int keys = window_is_int8 && head_dim <= 80 ? 32 : 16;
  return window_is_int8 && !tile_is_int8 ? keys / 2 : keys;
}

// Bytes from one row to the next in shared memory: an odd number of pieces of 16 bytes.
__host__ __device__ constexpr int rowStride(int head_dim, bool tile_is_int8) {
  return 16 * (head_dim * (tile_is_int8 ? 1 : 2) / 16 | 1);
}

// Of 8 keys, or of 8 pieces of a value, the one that is lane group g's.
__host__ __device__ constexpr int spread(int g) {
  return g / 2 + 4 * (g % 2);
}

// Tiles that a warp has on their way or in use: as many as let three blocks find room on a multiprocessor of 227 KB.
__host__ __device__ constexpr int stagesOf(int tile_bytes_of_block) {
  const int number = 70 * 1024 / tile_bytes_of_block;
  return number < 2 ? 2 : number > 4 ? 4 : number;
}

template <int kHeadDim, bool kInt8, int kRowTiles>
struct Config {
  // A lane of a quad holds pieces of 8 dimensions (16 bytes of 16-bit numbers) of a key, in int8 kernels two at a time,
  // and its share of the 16 or 32 dimensions that are left over. A lane of eight does so of a value.
  static constexpr int kKeyTail = kHeadDim % (kInt8 ? 64 : 32);
  static constexpr int kKeyPieces = (kHeadDim - kKeyTail) / 32;
  // Whether a lane takes 16 bytes of an int8 value at once; otherwise 8.
  static constexpr bool kWideValues = kInt8 && kHeadDim % 128 == 0;
  static constexpr int kValueTail = kHeadDim % 64;
  static constexpr int kWholeTiles = (kHeadDim - kValueTail) / 16;  // of pieces; four a piece
  static constexpr int kOutTiles = kHeadDim / 16;                   // of 16 dimensions of O^T
  static constexpr int kRows = 8 * kRowTiles;
  // int8 takes more arithmetic a byte, and more warps to hide it; in one block, so that fewer splits have to be merged.
  static constexpr int kWarps = kHeadDim > 128 ? (kInt8 ? 4 : 2) : kInt8 && kRowTiles == 1 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  // Of any tile: its keys, then its values.
  static constexpr int kWindowKeys = tileKeys(kHeadDim, kInt8, kInt8), kOtherKeys = tileKeys(kHeadDim, kInt8, false);
  static constexpr int kWindowBytes = 2 * kWindowKeys * rowStride(kHeadDim, kInt8);
  static constexpr int kOtherBytes = 2 * kOtherKeys * rowStride(kHeadDim, false);
  static constexpr int kStageBytes = kWindowBytes > kOtherBytes ? kWindowBytes : kOtherBytes;
  static constexpr int kStages = kInt8 ? 2 : stagesOf(kWarps * kStageBytes);
  // As far as registers go.
  static constexpr int kBlocksOfSm = kWarps == 8 || (kHeadDim > 128 && kRowTiles == 2) ? 2 : 3;
  static constexpr int kScalePieces = kWindowKeys / 8 + 1;  // of 8 float16; a tile may begin in the middle of one

  // Shared memory: stages (later the warps' outputs) | q | q for sinks | new row | its scales | scales | sums | turns.
  // In 16-bit numbers. The pieces that 8 lanes read of two rows lie in different banks: rows are 64 bytes out of step
  // (modulo 128) where a quad reads 64 in a row, 16 (modulo 32) where it reads every other 16.
  static constexpr int kRowStride = kInt8 ? kHeadDim + 8 : 64 * divUp(kHeadDim - 32, 64) + 32;
  static constexpr int kStagesBytes = kWarps * kStages * kStageBytes;
  static constexpr int kQueryBytes = kRows * kRowStride * 2;
  static constexpr int kNewRowBytes = kHeadDim * 2;
  static constexpr int kNewScaleBytes = 16;
  static constexpr int kScaleBytes = kInt8 ? kWarps * kStages * 2 * kScalePieces * 16 : 0;
  static constexpr int kSumsBytes = kWarps * kRows * 8;
  static constexpr int kSharedBytes = kStagesBytes + 2 * kQueryBytes + 2 * kNewRowBytes + kNewScaleBytes + kScaleBytes +
                                      kSumsBytes + 4 * turnsFloats(kHeadDim);
  static_assert(kWarps * kRows * kHeadDim * 4 <= kStagesBytes, "the warps' outputs take the place of the stages");
  static_assert(kSharedBytes <= 96 * 1024, "more than a block of compute capability 7.2 can have; 8.6, 8.9, 12.0: 99");

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

// c += a . b, m16n8k16: a row-major 16 x 16, b 16 x 8, both of 16-bit numbers, c float32.
template <DType kDType>
__device__ void multiplyAdd(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                            uint32_t b1) {
#if __CUDA_ARCH__ >= 800 && !defined(SINKEXPORT_NO_TENSOR_CORES)
  if constexpr (kDType == DType::kFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#else
  // Before compute capability 8.0 there is no such instruction: the same by shuffles. Slow, but the same numbers.
  using H = Half<kDType>;
  const int lane = threadIdx.x % 32, g = lane / 4, column = lane % 4 * 2;
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
#pragma unroll 1
  for (int quad = 0; quad < 4; ++quad) {
    for (int upper = 0; upper < 2; ++upper) {  // k = 8 * upper + 2 * quad + 0, 1
      uint32_t left[2], right[2];
      for (int i = 0; i < 2; ++i) {
        left[i] = __shfl_sync(kFullWarp, a[2 * upper + i], 4 * g + quad);
        right[i] = __shfl_sync(kFullWarp, b[upper], 4 * (column + i) + quad);
      }
      for (int row = 0; row < 2; ++row) {
        const auto* l = reinterpret_cast<const typename H::T*>(&left[row]);
        for (int i = 0; i < 2; ++i) {
          const auto* r = reinterpret_cast<const typename H::T*>(&right[i]);
          c[2 * row + i] += H::toFloat(l[0]) * H::toFloat(r[0]) + H::toFloat(l[1]) * H::toFloat(r[1]);
        }
      }
    }
  }
#endif
}

// Of the 8 x 8 16-bit numbers that a warp holds, two of a row in a thread, the same transposed.
__device__ inline uint32_t transposed(uint32_t pair) {
#if __CUDA_ARCH__ >= 750 && !defined(SINKEXPORT_NO_TENSOR_CORES)
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
  return pair;
#else
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t even = __shfl_sync(kFullWarp, pair, 8 * c + g / 2);
  const uint32_t odd = __shfl_sync(kFullWarp, pair, 8 * c + 4 + g / 2);
  return __byte_perm(even, odd, g % 2 ? 0x7632 : 0x5410);
#endif
}

// 16 bytes to shared memory in the background: the first num_bytes of them from `source`, the rest zeros. `source`
// points to memory that may be read even if there are none.
__device__ inline void copyAsync(uint4* target, const void* source, int num_bytes) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(num_bytes)
               : "memory");
#else
  auto* to = reinterpret_cast<uint16_t*>(target);
  const auto* from = static_cast<const uint16_t*>(source);
  for (int i = 0; i < 8; ++i) to[i] = 2 * i < num_bytes ? from[i] : uint16_t{0};
#endif
}

__device__ inline void commitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kPending>
__device__ void waitForCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Output of one row from its sums: weights were 2^(logit - base + kBias) of logits in units of log2(e).
struct RowSums {
  float base = -INFINITY;
  float sum = 0.0f;
};

// Factor on a row's weighted sum of values, with the logit that has no value taken in.
__device__ inline float normaliser(RowSums sums, const float* sink_logit, int head) {
  if (sink_logit == nullptr) return sums.sum > 0.0f ? 1.0f / sums.sum : 0.0f;
  const float extra = sink_logit[head] * kLog2E;
  const float base = fmaxf(sums.base, extra);
  if (base == -INFINITY) return 0.0f;
  const float factor = exp2Fast(sums.base - base);
  return factor / (sums.sum * factor + exp2Fast(extra - base + kBias));
}

// row: of [B, Hq, T]. value: of dimension d, normalised.
template <DType kDType>
__device__ void storeOut(const SinkAttentionParams& p, size_t row, int d, float value) {
  using H = Half<kDType>;
  if (p.gate != nullptr) {
    const auto* gate = static_cast<const typename H::T*>(p.gate) + row * p.gate_dim;
    value *= 1.0f / (1.0f + __expf(-H::toFloat(gate[p.gate_dim == 1 ? 0 : d])));
  }
  static_cast<typename H::T*>(p.out)[row * p.head_dim + d] = H::fromFloat(value);
}

enum Section : int { kSinks, kWindow, kChunk };

// Rows 0 .. limit-1 of a section are there.
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

template <int kHeadDim, DType kDType, bool kInt8, int kRowTiles, bool kPrefill>
struct Attend {
  using C = Config<kHeadDim, kInt8, kRowTiles>;
  using H = Half<kDType>;
  using T = typename H::T;

  // How a tile lies in a stage: rows of keys, then rows of values.
  template <bool kInt8Tile>
  struct Tile {
    static constexpr int kKeys = kInt8Tile ? C::kWindowKeys : C::kOtherKeys;
    static constexpr int kGroups = kKeys / 8;
    static constexpr int kSteps = divUp(kKeys, 16);     // of both products
    static constexpr int kElement = kInt8Tile ? 1 : 2;  // bytes
    static constexpr int kRowBytes = kHeadDim * kElement;
    static constexpr int kRowPieces = kRowBytes / 16;
    static constexpr int kStride = rowStride(kHeadDim, kInt8Tile) / 16;       // in pieces, as all else here
    static constexpr int kTilesOfRead = kInt8Tile && C::kWideValues ? 8 : 4;  // that one read of a value feeds
    static constexpr int kValues = kKeys / 4;                                 // rows of a lane
    static constexpr int kValuesAt = kKeys * kStride;
    static_assert(2 * 16 * kKeys * kStride <= C::kStageBytes);

    // Where the i-th piece of lane c of a quad is in a row.
    static __device__ constexpr int keyPiece(int i, int c) { return kInt8Tile ? 4 * i + c : C::keyPiece(i, c); }
    // Row of lane group g's key of each group of 8, and of the i-th value of lane c of a quad.
    static __device__ constexpr int keyRow(int group, int g) { return 8 * group + spread(g); }
    static __device__ constexpr int valueRow(int i, int c) { return 8 * (i / 2) + c + 4 * (i % 2); }
  };

  // Copies one tile into a stage, whole rows by neighbouring lanes; zeros for rows that are not there: logits of their
  // keys are masked, weights of their values zero. What is read of the row that this step writes counts for nothing:
  // `insert` replaces it.
  template <bool kInt8Tile>
  static __device__ void load(const Source& source, int row0, uint4* stage, int lane) {
    using L = Tile<kInt8Tile>;
    constexpr int kRowsAtOnce = 32 / L::kRowPieces, kLanes = kRowsAtOnce * L::kRowPieces;
    if (kLanes < 32 && lane >= kLanes) return;
    const int key0 = lane / L::kRowPieces, piece = lane % L::kRowPieces;
    uint4* const target = stage + key0 * L::kStride + piece;
    const size_t offset = static_cast<size_t>(row0) * L::kRowBytes + 16 * lane;
    const char *const k = source.k + offset, *const v = source.v + offset;
    auto copy = [&](auto is_checked) {
#pragma unroll
      for (int key = 0; key < L::kKeys; key += kRowsAtOnce) {
        if (L::kKeys % kRowsAtOnce != 0 && key + key0 >= L::kKeys) continue;
        const bool is_there = !decltype(is_checked)::value || row0 + key + key0 < source.limit;
        const int at = key * L::kRowBytes, num_bytes = is_there ? 16 : 0;
        copyAsync(target + key * L::kStride, is_there ? k + at : source.k, num_bytes);
        copyAsync(target + key * L::kStride + L::kValuesAt, is_there ? v + at : source.v, num_bytes);
      }
    };
    if (row0 + L::kKeys <= source.limit)
      copy(std::false_type{});
    else
      copy(std::true_type{});
  }

  // Puts the step's own token into the tile that holds its row. k, v: its row in shared memory.
  template <bool kInt8Tile>
  static __device__ void insert(const uint4* k, const uint4* v, int own_key, uint4* stage, int lane) {
    using L = Tile<kInt8Tile>;
    uint4* const target = stage + own_key * L::kStride;
    for (int piece = lane; piece < L::kRowPieces; piece += 32) {
      target[piece] = k[piece];
      target[L::kValuesAt + piece] = v[piece];
    }
  }

  // first, end: of the tiles' rows, and of all, in the arrays.
  static __device__ ScaleSource scaleSource(const void* k_scale, const void* v_scale, size_t first, size_t end,
                                            int lane) {
    const bool is_value = lane >= C::kScalePieces;
    const size_t begin = first / 8 * 8 + 8 * (lane - (is_value ? C::kScalePieces : 0));
    const auto left = static_cast<int64_t>(end) - static_cast<int64_t>(begin);
    return {static_cast<const char*>(is_value ? v_scale : k_scale) + 2 * begin,
            static_cast<int>(left < INT32_MAX ? left : INT32_MAX), static_cast<int>(first % 8)};
  }

  // The warp's copy of a tile's scales. row0: its first row, a multiple of 8.
  static __device__ void loadScales(const ScaleSource& source, int row0, uint4* target, int lane) {
    if (lane >= 2 * C::kScalePieces) return;
    const int left = source.left - row0;
    copyAsync(target + lane, source.at + (left > 0 ? 2 * row0 : 0), left >= 8 ? 16 : left > 0 ? 2 * left : 0);
  }

  // Adds q . k of a tile, no scales yet: [row tile][16 keys]{key of g: rows 2c, 2c+1; key of 8 + g: likewise}.
  template <bool kInt8Tile>
  static __device__ void multiplyKeys(const T* q, const uint4* stage, int lane,
                                      float (&products)[kRowTiles][Tile<kInt8Tile>::kSteps][4]) {
    using L = Tile<kInt8Tile>;
    const int g = lane / 4, c = lane % 4;
    auto rowOf = [&](int group) { return stage + L::keyRow(group, g) * L::kStride; };
#pragma unroll
    for (int i = 0; i < C::kKeyPieces; ++i) {
      uint4 query[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        query[r] = *reinterpret_cast<const uint4*>(q + (8 * r + g) * C::kRowStride + 8 * C::keyPiece(i, c));
      }
#pragma unroll
      for (int step = 0; step < L::kSteps; ++step) {
        uint4 k[2] = {};
#pragma unroll
        for (int half = 0; half < 2 && 2 * step + half < L::kGroups; ++half) {
          // int8: read once for both values of i
          const uint4 piece = rowOf(2 * step + half)[L::keyPiece(kInt8Tile ? i / 2 : i, c)];
          if constexpr (kInt8Tile) {
            H::fromInt8(i % 2 ? piece.z : piece.x, k[half].x, k[half].y);
            H::fromInt8(i % 2 ? piece.w : piece.y, k[half].z, k[half].w);
          } else {
            k[half] = piece;
          }
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiplyAdd<kDType>(products[r][step], k[0].x, k[1].x, k[0].y, k[1].y, query[r].x, query[r].y);
          multiplyAdd<kDType>(products[r][step], k[0].z, k[1].z, k[0].w, k[1].w, query[r].z, query[r].w);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < C::kKeyTail / 16; ++i) {  // 4 dimensions of each lane
      const int d = C::keyTailDim(c) + 4 * i;
      uint2 query[kRowTiles];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        query[r] = *reinterpret_cast<const uint2*>(q + (8 * r + g) * C::kRowStride + d);
      }
#pragma unroll
      for (int step = 0; step < L::kSteps; ++step) {
        uint2 k[2] = {};
#pragma unroll
        for (int half = 0; half < 2 && 2 * step + half < L::kGroups; ++half) {
          const void* at = reinterpret_cast<const char*>(rowOf(2 * step + half)) + d * L::kElement;
          if constexpr (kInt8Tile)
            H::fromInt8(*static_cast<const uint32_t*>(at), k[half].x, k[half].y);
          else
            k[half] = *static_cast<const uint2*>(at);
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiplyAdd<kDType>(products[r][step], k[0].x, k[1].x, k[0].y, k[1].y, query[r].x, query[r].y);
        }
      }
    }
  }

  // The 16 keys of one step, kDims dimensions of each lane (from `dim` on), to the output tiles from first_tile on.
  // weights: [row tile][group of 8 keys], pairs of 16-bit numbers.
  template <bool kInt8Tile, int kDims>
  static __device__ void addPiece(const uint32_t (&weights)[kRowTiles][Tile<kInt8Tile>::kGroups], const uint4* stage,
                                  int step, int dim, int first_tile, int c, float (&out)[kRowTiles][C::kOutTiles][4]) {
    using L = Tile<kInt8Tile>;
    constexpr int kBytes = kDims * L::kElement, kWords = divUp(kBytes, 4);
    struct alignas(kBytes) Piece {
      std::conditional_t<kBytes == 2, uint16_t, uint32_t> word[kWords];
    };
    Piece v[4];
#pragma unroll
    for (int key = 0; key < 4; ++key) {
      v[key] = {};
      if (4 * step + key >= L::kValues) continue;
      const uint4* const row = stage + L::kValuesAt + L::valueRow(4 * step + key, c) * L::kStride;
      v[key] = *reinterpret_cast<const Piece*>(reinterpret_cast<const char*>(row) + dim * L::kElement);
    }
    auto add = [&](int tile, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint32_t upper = 2 * step + 1 < L::kGroups ? weights[r][(2 * step + 1) % L::kGroups] : 0;
        multiplyAdd<kDType>(out[r][tile], a0, a1, a2, a3, weights[r][2 * step], upper);
      }
    };
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const uint32_t w[4] = {v[0].word[word], v[1].word[word], v[2].word[word], v[3].word[word]};
      if constexpr (kInt8Tile) {
#pragma unroll
        for (int two = 0; two < (kBytes == 2 ? 1 : 2); ++two) {  // dimensions 4 * word + 2 * two + 0, 1
          uint32_t a[4];
          H::fromInt8(__byte_perm(w[0], w[1], two ? 0x7362 : 0x5140), a[0], a[1]);
          H::fromInt8(__byte_perm(w[2], w[3], two ? 0x7362 : 0x5140), a[2], a[3]);
          add(first_tile + 2 * word + two, a[0], a[1], a[2], a[3]);
        }
      } else {
        add(first_tile + word, __byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632),
            __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[2], w[3], 0x7632));
      }
    }
  }

  template <bool kInt8Tile>
  static __device__ void addValues(const uint32_t (&weights)[kRowTiles][Tile<kInt8Tile>::kGroups], const uint4* stage,
                                   int lane, float (&out)[kRowTiles][C::kOutTiles][4]) {
    using L = Tile<kInt8Tile>;
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int step = 0; step < L::kSteps; ++step) {
#pragma unroll
      for (int tile = 0; tile < C::kWholeTiles; tile += L::kTilesOfRead) {
        addPiece<kInt8Tile, 2 * L::kTilesOfRead>(weights, stage, step, C::outDim(tile, g), tile, c, out);
      }
      if constexpr (C::kValueTail > 0) {
        addPiece<kInt8Tile, C::kValueTail / 8>(weights, stage, step, C::valueTailDim(g), C::kWholeTiles, c, out);
      }
    }
  }

  // Turns the block's raw rows of q where they are, and to q_sink as the sinks meet them. Each pair is one thread's.
  static __device__ void turnQueries(T* q, T* q_sink, const Turns& turns, bool interleaved) {
    const int num_pairs = turns.num_pairs > turns.num_sink_pairs ? turns.num_pairs : turns.num_sink_pairs;
#pragma unroll 4
    for (int i = threadIdx.x; i < C::kRows * (kHeadDim / 2); i += C::kThreads) {
      const int r = i / (kHeadDim / 2), pair = i % (kHeadDim / 2);
      const bool is_turned = pair < num_pairs, is_split = is_turned && !interleaved;
      const int first = r * C::kRowStride + (is_split ? pair : 2 * pair), second = first + (is_split ? num_pairs : 1);
      const float x = H::toFloat(q[first]), y = H::toFloat(q[second]);
      if (is_turned && turns.num_pairs > 0) {
        const float cosine = turns.cos[pair], sine = turns.sin[pair];
        q[first] = H::fromFloat(x * cosine - y * sine);
        q[second] = H::fromFloat(x * sine + y * cosine);
      }
      const bool turns_back = is_turned && turns.num_sink_pairs > 0;
      const float cosine = turns_back ? turns.sink_cos[pair] : 1.0f, sine = turns_back ? turns.sink_sin[pair] : 0.0f;
      q_sink[first] = H::fromFloat(x * cosine - y * sine);
      q_sink[second] = H::fromFloat(x * sine + y * cosine);
    }
  }

  // The step's raw k or v in shared memory, by a warp: turned and rounded where it is, and (if is_kept) to its place in
  // the state.
  static __device__ void writeNewRow(void* shared_row, const Turns& turns, int num_pairs, bool interleaved,
                                     bool is_int8, bool is_kept, void* state_row, __half* shared_scale,
                                     __half* state_scale, int lane) {
    const T* row = static_cast<const T*>(shared_row);
    constexpr int kEach = divUp(kHeadDim, 32);
    float x[kEach];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = 32 * i + lane;
      x[i] = d < kHeadDim ? turned<kDType>(row, d, turns.cos, turns.sin, num_pairs, interleaved) : 0.0f;
      largest = fmaxf(largest, fabsf(x[i]));
    }
    const __half scale = int8Scale(warpMax(largest));
    __syncwarp();  // all have read
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = 32 * i + lane;
      if (d >= kHeadDim) continue;
      if (is_int8) {
        const auto entry = static_cast<int8_t>(int8Entry(x[i], __half2float(scale)));
        static_cast<int8_t*>(shared_row)[d] = entry;
        if (is_kept) static_cast<int8_t*>(state_row)[d] = entry;
      } else {
        const T entry = H::fromFloat(x[i]);
        static_cast<T*>(shared_row)[d] = entry;
        if (is_kept) static_cast<T*>(state_row)[d] = entry;
      }
    }
    if (is_int8 && lane == 0) {
      *shared_scale = scale;
      if (is_kept) *state_scale = scale;
    }
  }

  static __device__ void run(const AttendArgs& args) {
    waitForEarlierKernels();
    allowNextKernel();
    extern __shared__ uint4 shared[];
    const SinkAttentionParams& p = args.p;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int stream = blockIdx.z / p.num_kv_heads, kv_head = blockIdx.z % p.num_kv_heads;
    const size_t head_row = blockIdx.z, num_heads = gridDim.z;  // of [B, Hkv]
    const size_t window_row = head_row * p.window_size, sink_row = head_row * p.num_sinks;
    const size_t chunk_row = head_row * p.num_tokens;
    const int group = p.num_q_heads / p.num_kv_heads;
    const int num_rows = group * p.num_tokens, row_begin = blockIdx.x * C::kRows;
    auto tokenOf = [&](int row) { return kPrefill ? row / group : 0; };
    auto headOf = [&](int row) { return kv_head * group + (kPrefill ? row % group : row); };

    uint4* stages = shared + warp * (C::kStages * C::kStageBytes / 16);
    char* bytes = reinterpret_cast<char*>(shared) + C::kStagesBytes;
    T* q_shared = reinterpret_cast<T*>(bytes);
    T* q_sink_shared = reinterpret_cast<T*>(bytes += C::kQueryBytes);
    uint4* new_k = reinterpret_cast<uint4*>(bytes += C::kQueryBytes);
    uint4* new_v = reinterpret_cast<uint4*>(bytes += C::kNewRowBytes);
    auto* new_scales = reinterpret_cast<__half*>(bytes += C::kNewRowBytes);
    auto* scales = reinterpret_cast<uint4*>(bytes += C::kNewScaleBytes);
    constexpr int kScalesStride = 2 * C::kScalePieces;  // of a stage: keys' scales, then values'
    uint4* warp_scales = scales + warp * C::kStages * kScalesStride;
    auto* sums_shared = reinterpret_cast<float2*>(bytes += C::kScaleBytes);
    auto* turns_shared = reinterpret_cast<float*>(bytes + C::kSumsBytes);

    // --- a step's q, k and v, as they are, before anything is known ---
    if constexpr (!kPrefill) {
      constexpr int kRowPieces = kHeadDim / 8;
      const int q_rows = p.stream_rows > 0 ? p.stream_rows : p.num_q_heads;
      const int kv_rows = p.stream_rows > 0 ? p.stream_rows : p.num_kv_heads;
      const size_t q_row = static_cast<size_t>(stream) * q_rows + kv_head * group + row_begin;
      const size_t kv_row = static_cast<size_t>(stream) * kv_rows + kv_head;
      const auto* q = static_cast<const uint4*>(p.q) + q_row * kRowPieces;
      for (int i = threadIdx.x; i < (C::kRows + 2) * kRowPieces; i += C::kThreads) {
        const int r = i / kRowPieces, piece = i % kRowPieces;
        if (r < C::kRows) {
          copyAsync(reinterpret_cast<uint4*>(q_shared + r * C::kRowStride + 8 * piece), q + i,
                    row_begin + r < num_rows ? 16 : 0);
        } else {
          const void* row = r == C::kRows ? p.k : p.v;
          copyAsync((r == C::kRows ? new_k : new_v) + piece,
                    static_cast<const uint4*>(row) + kv_row * kRowPieces + piece, 16);
        }
      }
      commitCopies();
      prefetchTurns(p, stream);
    }

    // --- what is there ---
    const sinkrt::Ring ring{p.num_sinks, p.window_size};
    const int64_t t = streamPosition(p.position, stream);
    const int64_t newest = kPrefill ? t - 1 : t;  // newest token that the states hold, or take in this step
    const int newest_slot = slotOf(p, stream, kPrefill ? -1 : 0);
    const int element = kInt8 ? 1 : 2;
    const bool is_sink = ring.isSink(t);
    const Source sinks = {static_cast<const char*>(p.sink_k) + sink_row * kHeadDim * 2,
                          static_cast<const char*>(p.sink_v) + sink_row * kHeadDim * 2,
                          static_cast<int>(ring.numSinks(newest))};
    const Source window = {static_cast<const char*>(p.window_k) + window_row * kHeadDim * element,
                           static_cast<const char*>(p.window_v) + window_row * kHeadDim * element,
                           static_cast<int>(ring.numWindowTokens(newest))};
    const Source chunk = {static_cast<const char*>(args.k) + chunk_row * kHeadDim * 2,
                          static_cast<const char*>(args.v) + chunk_row * kHeadDim * 2,
                          p.num_valid != nullptr ? p.num_valid[stream] : p.num_tokens};
    const int own_row = is_sink ? static_cast<int>(t) : newest_slot;  // of a step's token, in its section
    ScaleSource window_scales{}, chunk_scales{};
    if constexpr (kInt8) {
      window_scales = scaleSource(p.window_k_scale, p.window_v_scale, window_row, num_heads * p.window_size, lane);
      if (kPrefill) chunk_scales = scaleSource(args.k_scale, args.v_scale, chunk_row, num_heads * p.num_tokens, lane);
    }
    auto sourceOf = [&](Section section) {
      if (section == kSinks) return sinks;
      return !kPrefill || section == kWindow ? window : chunk;
    };

    // --- this block's tiles: of the sinks, then of the window, then of the chunk ---
    constexpr int kTileKeys = C::kOtherKeys, kWindowKeys = C::kWindowKeys;
    const int sink_tiles = divUp(p.num_sinks, kTileKeys), window_tiles = divUp(p.window_size, kWindowKeys);
    const int chunk_tiles = kPrefill ? divUp(p.num_tokens, kTileKeys) : 0;
    const int tile_begin = blockIdx.y * args.tiles_per_split;
    const int tile_end = min(tile_begin + args.tiles_per_split, sink_tiles + window_tiles + chunk_tiles);
    // Chunk tokens after this block's last row's are nobody's business here.
    const int last_token = tokenOf(min(row_begin + C::kRows, num_rows) - 1);
    auto sectionOf = [&](int tile, int& row0) -> Section {
      if (tile < sink_tiles) return row0 = tile * kTileKeys, kSinks;
      tile -= sink_tiles;
      if (!kPrefill || tile < window_tiles) return row0 = tile * kWindowKeys, kWindow;
      return row0 = (tile - window_tiles) * kTileKeys, kChunk;
    };
    auto nextTile = [&](int tile) {  // first one from `tile` on, in this warp's strides, that holds anything
      for (; tile < tile_end; tile += C::kWarps) {
        int row0;
        const Section section = sectionOf(tile, row0);
        if (row0 < sourceOf(section).limit && !(kPrefill && section == kChunk && row0 > last_token)) break;
      }
      return tile;
    };
    auto issue = [&](int tile, int stage) {
      if (tile < tile_end) {
        int row0;
        const Section section = sectionOf(tile, row0);
        const Source source = sourceOf(section);
        uint4* target = stages + stage * (C::kStageBytes / 16);
        if constexpr (kInt8) {
          uint4* scale_target = warp_scales + stage * kScalesStride;
          if (section == kWindow) {
            load<true>(source, row0, target, lane);
            loadScales(window_scales, row0, scale_target, lane);
          } else {
            load<false>(source, row0, target, lane);
            if (kPrefill && section == kChunk) loadScales(chunk_scales, row0, scale_target, lane);
          }
        } else {
          load<false>(source, row0, target, lane);
        }
      }
      commitCopies();
    };

    int ahead = nextTile(tile_begin + warp);  // next tile to load
    int tiles[C::kStages];                    // being loaded, oldest first
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) {
      tiles[i] = ahead;
      issue(ahead, i);
      if (ahead < tile_end) ahead = nextTile(ahead + C::kWarps);
    }

    // --- queries, and the step's own token, while the first tiles come ---
    int own_tile = -1;
    if constexpr (kPrefill) {
      for (int i = threadIdx.x; i < C::kRows * (kHeadDim / 8); i += C::kThreads) {
        const int r = i / (kHeadDim / 8), piece = i % (kHeadDim / 8), row = row_begin + r;
        uint4 plain = make_uint4(0, 0, 0, 0), for_sinks = plain;
        if (row < num_rows) {
          const size_t head = static_cast<size_t>(stream) * p.num_q_heads + headOf(row);
          const size_t at = (head * p.num_tokens + tokenOf(row)) * (kHeadDim / 8) + piece;
          plain = static_cast<const uint4*>(args.q)[at];
          for_sinks = static_cast<const uint4*>(args.q_sink)[at];
        }
        *reinterpret_cast<uint4*>(q_shared + r * C::kRowStride + 8 * piece) = plain;
        *reinterpret_cast<uint4*>(q_sink_shared + r * C::kRowStride + 8 * piece) = for_sinks;
      }
    } else {
      const Turns turns = makeTurns(p, stream, 0, t, turns_shared);
      waitForCopies<C::kStages - 1>();  // q, k and v came first
      __syncthreads();
      turnQueries(q_shared, q_sink_shared, turns, p.interleaved);
      const int tile = is_sink ? own_row / kTileKeys : sink_tiles + own_row / kWindowKeys;
      if (tile_begin <= tile && tile < tile_end) {
        own_tile = tile;
        if (warp < 2) {
          const bool is_value = warp == 1, is_int8 = kInt8 && !is_sink;
          const bool is_kept = blockIdx.x == 0 && (p.num_valid == nullptr || p.num_valid[stream] > 0);
          const size_t state_row = (is_sink ? sink_row : window_row) + own_row;
          void* state = is_value ? (is_sink ? p.sink_v : p.window_v) : (is_sink ? p.sink_k : p.window_k);
          void* state_scales = is_value ? p.window_v_scale : p.window_k_scale;
          writeNewRow(is_value ? new_v : new_k, turns, is_value ? 0 : turns.num_pairs, p.interleaved, is_int8, is_kept,
                      static_cast<char*>(state) + state_row * kHeadDim * (is_int8 ? 1 : 2), new_scales + is_value,
                      is_int8 ? static_cast<__half*>(state_scales) + state_row : nullptr, lane);
        }
      }
    }
    __syncthreads();

    // --- rows of this thread: 2c and 2c+1 of each row tile ---
    int token[kRowTiles][2];
    float slope[kRowTiles][2], sink_scale_log2[kRowTiles][2];
    RowSums sums[kRowTiles][2];
    float out[kRowTiles][C::kOutTiles][4];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = min(row_begin + 8 * r + 2 * c + j, num_rows - 1), head = headOf(row);
        token[r][j] = tokenOf(row);
        slope[r][j] = p.alibi_slopes != nullptr ? p.alibi_slopes[head] * kLog2E : 0.0f;
        sink_scale_log2[r][j] = p.sink_scale != nullptr ? __log2f(p.sink_scale[head]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < C::kOutTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[r][i][j] = 0.0f;
      }
    }
    const float logit_scale = p.softcap != 0.0f ? p.scale / p.softcap : p.scale * kLog2E;

    auto consume = [&](auto is_int8_tile, int tile, int stage) {
      constexpr bool kInt8Tile = decltype(is_int8_tile)::value;
      using L = Tile<kInt8Tile>;
      int row0;
      const Section section = sectionOf(tile, row0);
      const int limit = sourceOf(section).limit;
      uint4* data = stages + stage * (C::kStageBytes / 16);
      const bool has_scales = kInt8Tile || (kInt8 && kPrefill && section == kChunk);
      constexpr int kValueScales = 8 * C::kScalePieces;  // where values' scales begin
      __half* tile_scales = reinterpret_cast<__half*>(warp_scales + stage * kScalesStride) +
                            (kInt8Tile ? window_scales : chunk_scales).shift;
      if (!kPrefill && tile == own_tile) {
        insert<kInt8Tile>(new_k, new_v, own_row - row0, data, lane);
        if (kInt8Tile && lane < 2) tile_scales[lane * kValueScales + own_row - row0] = new_scales[lane];
        __syncwarp();
      }

      float products[kRowTiles][L::kSteps][4] = {};
      multiplyKeys<kInt8Tile>(section == kSinks ? q_sink_shared : q_shared, data, lane, products);

      float factor[L::kGroups], value_scale[L::kGroups];
#pragma unroll
      for (int group = 0; group < L::kGroups; ++group) {
        factor[group] = logit_scale;
        if (!has_scales) continue;
        factor[group] *= __half2float(tile_scales[L::keyRow(group, g)]);
        value_scale[group] = __half2float(tile_scales[kValueScales + L::keyRow(group, g)]);
      }

      uint32_t weights[kRowTiles][L::kGroups];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        float logits[L::kGroups][2], largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
          const int row = row0 + L::keyRow(group, g);
          // Steps since the slot was written, as the newest token in the ring sees it.
          const int age = newest_slot - row + (row > newest_slot ? p.window_size : 0);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float logit = products[r][group / 2][2 * (group % 2) + j] * factor[group];
            if (p.softcap != 0.0f) logit = p.softcap * kLog2E * tanhf(logit);
            if (p.alibi_slopes != nullptr) {
              const int query = static_cast<int>(min(t + token[r][j], ring.capacity() - 1));  // in-cache position
              int distance = age + (kPrefill ? 1 + token[r][j] : 0);
              if (section == kSinks) distance = query - row;
              if (section == kChunk) distance = token[r][j] - row;
              logit -= slope[r][j] * static_cast<float>(distance);
            }
            if (p.sink_scale != nullptr && row == 0 && (section == kSinks || (section == kChunk && t == 0))) {
              logit += sink_scale_log2[r][j];  // token 0
            }
            bool is_seen = row < limit;
            if constexpr (kPrefill) {
              if (section == kWindow) is_seen = is_seen && age + 1 + token[r][j] < p.window_size;
              if (section == kChunk) is_seen = is_seen && row <= token[r][j];
            }
            logits[group][j] = is_seen ? logit : -INFINITY;
            largest[j] = fmaxf(largest[j], logits[group][j]);
          }
        }
        bool rises = false;
        float offset[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int other = 4; other < 32; other *= 2) {
            largest[j] = fmaxf(largest[j], __shfl_xor_sync(kFullWarp, largest[j], other));
          }
          rises = rises || largest[j] > sums[r][j].base + kSlack;
        }
        if (__any_sync(kFullWarp, rises)) {
          float shrink[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float base = fmaxf(sums[r][j].base, largest[j]);
            shrink[j] = base == -INFINITY ? 0.0f : exp2Fast(sums[r][j].base - base);
            sums[r][j].base = base;
            sums[r][j].sum *= shrink[j];
          }
#pragma unroll
          for (int i = 0; i < C::kOutTiles; ++i) {
            out[r][i][0] *= shrink[0], out[r][i][2] *= shrink[0];
            out[r][i][1] *= shrink[1], out[r][i][3] *= shrink[1];
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) offset[j] = kBias - (sums[r][j].base == -INFINITY ? 0.0f : sums[r][j].base);
        // The sum is of weights as they were rounded, so that their errors shift nothing on average; with scales, whose
        // division is slow, in bfloat16 only: float16's errors are of the output's own size.
        constexpr bool kSumsRounded = !kInt8Tile || kDType == DType::kBFloat16;
#pragma unroll
        for (int group = 0; group < L::kGroups; ++group) {
          float weight[2], rounded[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            weight[j] = exp2Fast(logits[group][j] + offset[j]);
            if (!kSumsRounded) sums[r][j].sum += weight[j];
            // A row that is not there may have any scale, NaN too.
            if (has_scales && weight[j] != 0.0f) weight[j] *= value_scale[group];
          }
          const uint32_t pair = H::pack(weight[0], weight[1]);
          weights[r][group] = transposed(pair);
          if (!kSumsRounded) continue;
          H::unpack(pair, rounded[0], rounded[1]);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (has_scales && rounded[j] != 0.0f) rounded[j] = __fdividef(rounded[j], value_scale[group]);
            sums[r][j].sum += rounded[j];
          }
        }
      }
      addValues<kInt8Tile>(weights, data, lane, out);
    };

    for (int stage = 0; tiles[0] < tile_end; stage = stage + 1 == C::kStages ? 0 : stage + 1) {
      __syncwarp();  // nobody reads what the next copy replaces
      tiles[C::kStages - 1] = ahead;
      issue(ahead, stage == 0 ? C::kStages - 1 : stage - 1);
      if (ahead < tile_end) ahead = nextTile(ahead + C::kWarps);
      waitForCopies<C::kStages - 1>();
      __syncwarp();
      if constexpr (kInt8) {
        int row0;
        if (sectionOf(tiles[0], row0) == kWindow)
          consume(std::true_type{}, tiles[0], stage);
        else
          consume(std::false_type{}, tiles[0], stage);
      } else {
        consume(std::false_type{}, tiles[0], stage);
      }
#pragma unroll
      for (int i = 0; i < C::kStages - 1; ++i) tiles[i] = tiles[i + 1];
    }

    // --- the warps meet ---
    waitForCopies<0>();
    __syncthreads();
    auto* outs = reinterpret_cast<float*>(shared);  // [warp][row][D]
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = sums[r][j].sum;
#pragma unroll
        for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(kFullWarp, sum, other);
        if (g == 0) sums_shared[warp * C::kRows + 8 * r + 2 * c + j] = make_float2(sums[r][j].base, sum);
      }
      float* target = outs + (warp * C::kRows + 8 * r + 2 * c) * kHeadDim;
#pragma unroll
      for (int i = 0; i < C::kOutTiles; ++i) {
        const int d = C::outDim(i, g);
        *reinterpret_cast<float2*>(target + d) = make_float2(out[r][i][0], out[r][i][2]);
        *reinterpret_cast<float2*>(target + kHeadDim + d) = make_float2(out[r][i][1], out[r][i][3]);
      }
    }
    __syncthreads();
    for (int r = warp; r < C::kRows && row_begin + r < num_rows; r += C::kWarps) {
      RowSums all;
      float factor[C::kWarps];
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) all.base = fmaxf(all.base, sums_shared[w * C::kRows + r].x);
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) {
        const float2 sum = sums_shared[w * C::kRows + r];
        factor[w] = sum.x == -INFINITY ? 0.0f : exp2Fast(sum.x - all.base);
        all.sum += factor[w] * sum.y;
      }
      const int row = row_begin + r, head = headOf(row);
      const size_t out_row = (static_cast<size_t>(stream) * p.num_q_heads + head) * p.num_tokens + tokenOf(row);
      const float normal = args.num_splits == 1 ? normaliser(all, p.sink_logit, head) : 1.0f;
      const size_t partial = out_row * args.num_splits + blockIdx.y;
      if (args.num_splits > 1 && lane == 0) args.partial_sums[partial] = make_float2(all.base, all.sum);
      for (int d = lane; d < kHeadDim; d += 32) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) x += factor[w] * outs[(w * C::kRows + r) * kHeadDim + d];
        if (args.num_splits == 1)
          storeOut<kDType>(p, out_row, d, x * normal);
        else
          args.partial_out[partial * kHeadDim + d] = x;
      }
    }
  }
};

template <int kHeadDim, DType kDType, bool kInt8, int kRowTiles, bool kPrefill>
__global__ void __launch_bounds__(Config<kHeadDim, kInt8, kRowTiles>::kThreads,
                                  Config<kHeadDim, kInt8, kRowTiles>::kBlocksOfSm)
    attend(const __grid_constant__ AttendArgs args) {
  Attend<kHeadDim, kDType, kInt8, kRowTiles, kPrefill>::run(args);
}

// How a kernel of one head dimension is launched.
struct AttendKernel {
  const void* function;
  int num_rows;  // of a block
  int num_threads;
  int num_warps;
  int shared_bytes;
  int blocks_of_sm;  // at most
};

template <int kHeadDim, DType kDType, bool kInt8, int kRowTiles, bool kPrefill>
AttendKernel attendKernel() {
  using C = Config<kHeadDim, kInt8, kRowTiles>;
  return {reinterpret_cast<const void*>(&attend<kHeadDim, kDType, kInt8, kRowTiles, kPrefill>),
          C::kRows,
          C::kThreads,
          C::kWarps,
          C::kSharedBytes,
          C::kBlocksOfSm};
}

// A step's groups of up to 8 query heads make 8 rows, larger ones 16, as a chunk's do.
template <int kHeadDim, DType kDType, bool kInt8>
AttendKernel attendKernel(int group, bool is_prefill) {
  if (is_prefill) return attendKernel<kHeadDim, kDType, kInt8, 2, true>();
  return group > 8 ? attendKernel<kHeadDim, kDType, kInt8, 2, false>()
                   : attendKernel<kHeadDim, kDType, kInt8, 1, false>();
}

// Instantiated for each head dimension in sink_attention_d*.cu.
template <int kHeadDim>
AttendKernel attendKernelOf(DType dtype, bool is_int8, int group, bool is_prefill) {
  if (dtype == DType::kFloat16) {
    return is_int8 ? attendKernel<kHeadDim, DType::kFloat16, true>(group, is_prefill)
                   : attendKernel<kHeadDim, DType::kFloat16, false>(group, is_prefill);
  }
  return is_int8 ? attendKernel<kHeadDim, DType::kBFloat16, true>(group, is_prefill)
                 : attendKernel<kHeadDim, DType::kBFloat16, false>(group, is_prefill);
}

}  // namespace detail
}  // namespace sinkexport
