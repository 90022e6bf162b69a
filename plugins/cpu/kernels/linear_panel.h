// Tiles of integer weights for many rows of x: what one row after another would do again is done once, a panel of
// inputs at a time. INT4 weights become bytes less their zero points, scales become float32.
//
// The processor multiplies unsigned by signed bytes: here x is the unsigned operand, 128 more than itself, so that an
// integer sum begins with -128 times the sum of its weights, whatever the row. Integer sums, and the order in which
// they are scaled and added, are those of linear_tile.h: the same bits.
#pragma once

#include "linear_tile.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

#ifdef SINKEXPORT_UNSIGNED_DOT
constexpr bool kHasPanels = true;
#else
constexpr bool kHasPanels = false;
#endif
constexpr int64_t kPanelRows = 4 * kRows;  // fewer are not worth it
constexpr int64_t kPanelInputs = 768;      // weights of two tiles stay in the first-level cache
constexpr int64_t kMostPanelRows = 264;    // at a time: a multiple of all rows of a tile

inline bool usesPanels(bool is_integer, int64_t rows) {
  return kHasPanels && is_integer && rows >= kPanelRows;
}

// Memory of one thread for kTiles tiles.
struct Panel {
  alignas(64) int8_t values[kTiles * 16 * kPanelInputs];                      // [quads][tiles][16][4]
  alignas(64) float scales[kTiles * 16 * kPanelInputs / 32];                  // [groups][tiles][16]
  alignas(64) int32_t starts[kTiles * 16 * kPanelInputs / 32];                // [groups][tiles][16]
  alignas(64) float totals[kMostPanelRows * (kTiles > 2 ? kTiles : 2) * 16];  // [blocks][tiles][rows][16]
};

#ifdef SINKEXPORT_UNSIGNED_DOT

// Groups first .. first + count - 1 of `tiles` tiles.
template <bool is_int4, bool has_zeros, int tiles>
void fillPanel(const TileOperands& operands, int64_t first, int64_t count, Panel& panel) {
  const Quad offset = repeatQuad(kInt8Offset);
  const int64_t steps = operands.group_steps;
  const Bytes eight = repeatByte(broadcastInt(8));
  for (int n = 0; n < tiles; ++n) {
    const char* weight = operands.weight + n * operands.weight_stride + first * steps * (is_int4 ? 32 : 64);
    const char* scale = operands.scale + n * operands.scale_stride + first * operands.scale_step;
    int8_t* to = panel.values + n * 64;
    int64_t left = operands.num_steps - first * steps;
    for (int64_t g = 0; g < count; ++g, left -= steps) {
      Ints start = broadcastInt(0);
      if constexpr (is_int4) {
        Bytes zero = eight;
        if constexpr (has_zeros) {
          zero = repeatByte(loadUint8(operands.zero_point + n * operands.zero_stride + (first + g) * 16));
        }
        for (int64_t k = 0; k < steps; k += 2, weight += 64, to += 2 * tiles * 64) {
          const Bytes both = loadBytes(weight);
          const Bytes low = lowNibbles(both) - zero, high = highNibbles(both) - zero;
          start = dotUnsigned(dotUnsigned(start, offset, low), offset, high);
          storeBytes(to, low);
          storeBytes(to + tiles * 64, high);
        }
      } else {
        for (int64_t k = 0; k < steps; ++k, weight += 64, to += tiles * 64) {
          // The last group of all may end early: zeros follow.
          const Bytes values = k < left ? loadBytes(weight) : repeatByte(broadcastInt(0));
          start = dotUnsigned(start, offset, values);
          storeBytes(to, values);
        }
      }
      const int64_t at = (g * tiles + n) * 16;
      storeInts(panel.starts + at, broadcastInt(0) - start);
      store(panel.scales + at, operands.has_half_scales ? loadHalf(reinterpret_cast<const uint16_t*>(scale))
                                                        : load(reinterpret_cast<const float*>(scale)));
      scale += operands.scale_step;
    }
  }
}

// Rows of x, `stride` bytes apart, times a panel, added to totals [tiles][rows][16], which begin with the first panel.
template <int rows, int tiles>
void panelTile(const Panel& panel, int64_t groups, int64_t group_steps, const int8_t* x, int64_t stride,
               const float* x_scale, bool is_first, float* totals) {
  Floats total[tiles][rows];
  for (int n = 0; n < tiles; ++n) {
    for (int r = 0; r < rows; ++r) total[n][r] = is_first ? broadcast(0.0f) : load(totals + (n * rows + r) * 16);
  }
  const int8_t* w = panel.values;
  const float* scale = panel.scales;
  const int32_t* start = panel.starts;
  for (int64_t g = 0; g < groups; ++g) {
    Ints sum[tiles][rows];
    for (int n = 0; n < tiles; ++n) {
      const Ints begin = loadInts(start + n * 16);
      for (int r = 0; r < rows; ++r) sum[n][r] = begin;
    }
    for (int64_t k = 0; k < group_steps; k += 8) {
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q, x += 4, w += tiles * 64) {
        Bytes weights[tiles];
        for (int n = 0; n < tiles; ++n) weights[n] = loadBytes(w + n * 64);
        for (int r = 0; r < rows; ++r) {
          const Quad one = loadQuad(x + r * stride);
          for (int n = 0; n < tiles; ++n) sum[n][r] = dotUnsigned(sum[n][r], one, weights[n]);
        }
      }
    }
    for (int n = 0; n < tiles; ++n) {
      const Floats factor = load(scale + n * 16);
      for (int r = 0; r < rows; ++r) {
        total[n][r] = fma(toFloats(sum[n][r]) * broadcast(x_scale[r]), factor, total[n][r]);
      }
    }
    start += tiles * 16;
    scale += tiles * 16;
    x_scale += rows;
  }
  storeTile<tiles, rows>(total, totals);
}

using PanelFunction = void (*)(const Panel&, int64_t, int64_t, const int8_t*, int64_t, const float*, bool, float*);

template <int tiles, int row = 0>
constexpr void fillPanelTable(PanelFunction (&functions)[kRows][kTiles]) {
  functions[row][tiles - 1] = panelTile<row + 1, tiles>;
  if constexpr (row + 1 < kRows) fillPanelTable<tiles, row + 1>(functions);
}
struct PanelTable {
  PanelFunction functions[kRows][kTiles];
  constexpr PanelTable() : functions{} {
    fillPanelTable<1>(functions);
    if constexpr (kTiles > 1) fillPanelTable<kTiles>(functions);
  }
};
inline PanelFunction findPanelTile(int rows, int tiles) {
  static constexpr PanelTable table;
  return table.functions[rows - 1][tiles - 1];
}

template <int tiles>
void fillPanel(bool is_int4, bool has_zeros, const TileOperands& operands, int64_t first, int64_t count, Panel& panel) {
  if (!is_int4) return fillPanel<false, false, tiles>(operands, first, count, panel);
  if (has_zeros) return fillPanel<true, true, tiles>(operands, first, count, panel);
  return fillPanel<true, false, tiles>(operands, first, count, panel);
}
#endif

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
