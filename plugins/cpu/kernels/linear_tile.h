// Sums of a few rows of x with one or a few tiles of 16 outputs, held in registers.
//
// Rows of x come in blocks of 1 .. kRows (kFloatRows), interleaved so that what one step of the loop wants lies
// together.
#pragma once

#include "linear.h"
#include "simd.h"
#ifdef SINKEXPORT_ISA_neon_i8mm
#include "simd_neon_i8mm.h"
#endif

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int64_t kScalesAhead = 512;  // bytes
// Inputs that share a scale where all weights of an output do.
constexpr int64_t kActivationGroup = 32;

// What a tile's function reads; of weights the first tile, others follow at the strides.
struct TileOperands {
  int64_t num_steps = 0;           // float32: K; bfloat16: K / 2; int8, int4: quads, K / 4
  int64_t group_steps = 0;         // quads that share a scale of x
  const void* x = nullptr;         // [steps][rows][1, 2 or 4]
  const float* x_scale = nullptr;  // [groups][rows]
  const int32_t* x_sum = nullptr;  // [groups][rows]: where the integer sums begin; with zero points the sum of x
  const char* weight = nullptr;
  int64_t weight_stride = 0;   // bytes from tile to tile
  int64_t prefetch_ahead = 0;  // bytes from what is read to what is asked for
  const char* scale = nullptr;
  int64_t scale_stride = 0, scale_step = 0;  // bytes from tile to tile, from group to group (0: one for all)
  bool has_half_scales = false;
  const uint8_t* zero_point = nullptr;
  int64_t zero_stride = 0;
};

// out [tiles][rows][16]
using TileFunction = void (*)(const TileOperands& operands, float* out);

template <int tiles, int rows>
SINKEXPORT_INLINE void storeTile(const Floats (&total)[tiles][rows], float* out) {
  for (int n = 0; n < tiles; ++n) {
    for (int r = 0; r < rows; ++r) store(out + (n * rows + r) * 16, total[n][r]);
  }
}

// A tile is read once by few rows, which take one at a time; more rows go over it again and again.
template <int rows, int tiles>
SINKEXPORT_INLINE void prefetchWeights(const void* address) {
  if constexpr (tiles == 1 && (kTiles > 1 || rows == 1)) {
    prefetchOnce(address);
  } else {
    prefetch(address);
  }
}

template <int rows, int tiles>
void floatTile(const TileOperands& operands, float* out) {
  Floats total[tiles][rows];
  for (int n = 0; n < tiles; ++n) {
    for (int r = 0; r < rows; ++r) total[n][r] = broadcast(0.0f);
  }
  const float* x = static_cast<const float*>(operands.x);
  const char* weight = operands.weight;
  const int64_t stride = operands.weight_stride, ahead = operands.prefetch_ahead;
  for (int64_t k = 0; k < operands.num_steps; ++k, x += rows, weight += 64) {
    Floats w[tiles];
    for (int n = 0; n < tiles; ++n) {
      prefetchWeights<rows, tiles>(weight + n * stride + ahead);
      w[n] = load(reinterpret_cast<const float*>(weight + n * stride));
    }
    for (int r = 0; r < rows; ++r) {
      const Floats one = broadcast(x[r]);
      for (int n = 0; n < tiles; ++n) total[n][r] = fma(one, w[n], total[n][r]);
    }
  }
  storeTile<tiles, rows>(total, out);
}

template <int rows, int tiles>
void bf16Tile(const TileOperands& operands, float* out) {
  Floats total[tiles][rows];
  for (int n = 0; n < tiles; ++n) {
    for (int r = 0; r < rows; ++r) total[n][r] = broadcast(0.0f);
  }
  const float* x = static_cast<const float*>(operands.x);
  const char* weight = operands.weight;
  const int64_t stride = operands.weight_stride, ahead = operands.prefetch_ahead;
  for (int64_t k = 0; k < operands.num_steps; ++k, x += 2 * rows, weight += 64) {
    Floats even[tiles], odd[tiles];
    for (int n = 0; n < tiles; ++n) {
      prefetchWeights<rows, tiles>(weight + n * stride + ahead);
      const Bytes pairs = loadBytes(weight + n * stride);
      even[n] = evenBf16(pairs);
      odd[n] = oddBf16(pairs);
    }
    for (int r = 0; r < rows; ++r) {
      const Floats first = broadcast(x[2 * r]), second = broadcast(x[2 * r + 1]);
      for (int n = 0; n < tiles; ++n) total[n][r] = fma(second, odd[n], fma(first, even[n], total[n][r]));
    }
  }
  storeTile<tiles, rows>(total, out);
}

// Exact sums of `steps` quads, added to `sum`.
template <bool is_int4, int rows, int tiles>
SINKEXPORT_INLINE void addQuads(int64_t steps, const int8_t* x, const char* weight, int64_t stride, int64_t ahead,
                                Ints (&sum)[tiles][rows]) {
#ifdef SINKEXPORT_ISA_neon_i8mm
  if constexpr (rows % 2 == 0 && tiles == 1) {
    addRowPairs<is_int4, rows>(steps, x, weight, ahead, sum[0]);
    return;
  }
#endif
  if constexpr (is_int4) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; k += 2, x += 8 * rows, weight += 64) {
      Bytes low[tiles], high[tiles];
      for (int n = 0; n < tiles; ++n) {
        prefetchWeights<rows, tiles>(weight + n * stride + ahead);
        const Bytes both = loadBytes(weight + n * stride);
        low[n] = lowNibbles(both);
        high[n] = highNibbles(both);
      }
      for (int r = 0; r < rows; ++r) {
        const Quad first = loadQuad(x + 4 * r), second = loadQuad(x + 4 * (rows + r));
        for (int n = 0; n < tiles; ++n) sum[n][r] = dotSmall(dotSmall(sum[n][r], low[n], first), high[n], second);
      }
    }
  } else {
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; ++k, x += 4 * rows, weight += 64) {
      Bytes w[tiles];
      for (int n = 0; n < tiles; ++n) {
        prefetchWeights<rows, tiles>(weight + n * stride + ahead);
        w[n] = prepareInt8(loadBytes(weight + n * stride));
      }
      for (int r = 0; r < rows; ++r) {
        const Quad one = loadQuad(x + 4 * r);
        for (int n = 0; n < tiles; ++n) sum[n][r] = dotInt8(sum[n][r], w[n], one);
      }
    }
  }
}

template <bool is_int4, bool has_zeros, int rows, int tiles>
void intTile(const TileOperands& operands, float* out) {
  Floats total[tiles][rows];
  for (int n = 0; n < tiles; ++n) {
    for (int r = 0; r < rows; ++r) total[n][r] = broadcast(0.0f);
  }
  const int8_t* x = static_cast<const int8_t*>(operands.x);
  const char *weight = operands.weight, *scale = operands.scale;
  const float* x_scale = operands.x_scale;
  const int32_t* x_sum = operands.x_sum;
  const uint8_t* zero = operands.zero_point;
  for (int64_t left = operands.num_steps; left > 0; left -= operands.group_steps) {
    const int64_t steps = left < operands.group_steps ? left : operands.group_steps;
    Ints sum[tiles][rows];
    for (int n = 0; n < tiles; ++n) {
      for (int r = 0; r < rows; ++r) sum[n][r] = broadcastInt(has_zeros ? 0 : x_sum[r]);
    }
    addQuads<is_int4, rows, tiles>(steps, x, weight, operands.weight_stride, operands.prefetch_ahead, sum);
    for (int n = 0; n < tiles; ++n) {
      if constexpr (has_zeros) {
        const Ints zeros = loadUint8(zero + n * operands.zero_stride);
        for (int r = 0; r < rows; ++r) sum[n][r] = minusProduct(sum[n][r], zeros, x_sum[r]);
      }
      const char* from = scale + n * operands.scale_stride;
      prefetch(from + kScalesAhead);
      const Floats factor = operands.has_half_scales ? loadHalf(reinterpret_cast<const uint16_t*>(from))
                                                     : load(reinterpret_cast<const float*>(from));
      for (int r = 0; r < rows; ++r) {
        total[n][r] = fma(toFloats(sum[n][r]) * broadcast(x_scale[r]), factor, total[n][r]);
      }
    }
    x += 4 * rows * steps;
    weight += (is_int4 ? 32 : 64) * steps;
    scale += operands.scale_step;
    x_scale += rows;
    x_sum += rows;
    if constexpr (has_zeros) zero += 16;
  }
  storeTile<tiles, rows>(total, out);
}

template <WeightType type, bool has_zeros, int rows, int tiles>
constexpr TileFunction tileFunction() {
  if constexpr (type == WeightType::kFloat32) {
    return floatTile<rows, tiles>;
  } else if constexpr (type == WeightType::kBFloat16) {
    return bf16Tile<rows, tiles>;
  } else {
    return intTile<type == WeightType::kInt4, has_zeros, rows, tiles>;
  }
}

// The functions for 1 .. largest_rows rows and 1 .. largest_tiles tiles.
template <int largest_rows, int largest_tiles>
struct TileTable {
  TileFunction function[largest_rows][largest_tiles];
};

template <WeightType type, bool has_zeros, int largest_rows, int largest_tiles, int row = 0, int tile = 0>
constexpr void fillTable(TileTable<largest_rows, largest_tiles>& table) {
  table.function[row][tile] = tileFunction<type, has_zeros, row + 1, tile + 1>();
  if constexpr (tile + 1 < largest_tiles) {
    fillTable<type, has_zeros, largest_rows, largest_tiles, row, tile + 1>(table);
  } else if constexpr (row + 1 < largest_rows) {
    fillTable<type, has_zeros, largest_rows, largest_tiles, row + 1, 0>(table);
  }
}

template <WeightType type, bool has_zeros, int largest_rows, int largest_tiles>
constexpr TileTable<largest_rows, largest_tiles> tileTable() {
  TileTable<largest_rows, largest_tiles> table{};
  fillTable<type, has_zeros>(table);
  return table;
}

inline TileFunction findTile(WeightType type, bool has_zeros, int rows, int tiles) {
  static constexpr auto float32 = tileTable<WeightType::kFloat32, false, kFloatRows, kFloatTiles>();
  static constexpr auto bfloat16 = tileTable<WeightType::kBFloat16, false, kFloatRows, kFloatTiles>();
  static constexpr auto int8 = tileTable<WeightType::kInt8, false, kRows, kTiles>();
  static constexpr auto int4 = tileTable<WeightType::kInt4, false, kRows, kTiles>();
  static constexpr auto int4_zeros = tileTable<WeightType::kInt4, true, kRows, kTiles>();
  switch (type) {
    case WeightType::kFloat32:
      return float32.function[rows - 1][tiles - 1];
    case WeightType::kBFloat16:
      return bfloat16.function[rows - 1][tiles - 1];
    case WeightType::kInt8:
      return int8.function[rows - 1][tiles - 1];
    default:
      return (has_zeros ? int4_zeros : int4).function[rows - 1][tiles - 1];
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
