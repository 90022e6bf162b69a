// What becomes of a matmul's sums: bias, activation, multiplier, norm, residual, and where they go.
#pragma once

#include "linear_activation.h"
#include "linear_norm.h"
#include "linear_segments.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {
namespace {

constexpr int64_t kPackedByEach = 1 << 13;  // values; fewer are packed by every thread for itself, with nobody waiting

int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Sums of 16 outputs of a few rows.
struct FinishedTile {
  int64_t first_row;  // packed
  int rows;
  int64_t column, width;
  int64_t bias_at;
  const float* out;  // gated: of the gate, then of up
};

struct Outputs {
  const LinearParams& params;
  const Segments& segments;
  float* rows = nullptr;  // [M, N] before they are summed up; with pick_weights

  // Null where the residual comes later.
  const float* residualOfTiles() const {
    return params.output_norm_weight == nullptr && rows == nullptr ? params.residual : nullptr;
  }

  // What stands after the matmul. out [tiles][rows][16]; `column` is the first output of y.
  SINKEXPORT_INLINE void finish(const Segment& segment, int64_t first_row, int rows, int64_t column, int num_tiles,
                                const float* out) const {
    for (int n = 0; n < (params.is_gated ? 1 : num_tiles); ++n, column += 16, out += rows * 16) {
      const FinishedTile tile{segment.first + first_row,
                              rows,
                              column,
                              smaller(16, params.num_outputs - column),
                              segment.expert * params.num_outputs * (params.is_gated ? 2 : 1),
                              out};
      switch (params.activation) {
        case Activation::kNone:
          finishTile<Activation::kNone>(tile);
          break;
        case Activation::kSilu:
          finishTile<Activation::kSilu>(tile);
          break;
        case Activation::kGelu:
          finishTile<Activation::kGelu>(tile);
          break;
        case Activation::kGeluTanh:
          finishTile<Activation::kGeluTanh>(tile);
          break;
        case Activation::kRelu2:
          finishTile<Activation::kRelu2>(tile);
          break;
        case Activation::kClampedSwiglu:
          finishTile<Activation::kClampedSwiglu>(tile);
          break;
      }
    }
  }

  template <Activation activation>
  void finishTile(const FinishedTile& tile) const {
    const int64_t outputs = params.num_outputs;
    const bool is_whole = tile.width == 16;
    const Floats multiplier = broadcast(params.multiplier), limit = broadcast(params.activation_limit);
    const float* residual = residualOfTiles();
    float* y = rows == nullptr ? params.y : rows;
    Floats bias = broadcast(0.0f), up_bias = bias;
    if (params.bias != nullptr) {
      const float* from = params.bias + tile.bias_at + tile.column;
      bias = loadUpTo(from, tile.width);
      if (params.is_gated) up_bias = loadUpTo(from + outputs, tile.width);
    }
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t at = segments.rowOfY(tile.first_row + r) * outputs + tile.column;
      const Floats sums = load(tile.out + r * 16) + bias;
      Floats value = params.is_gated
                         ? activateGated<activation>(sums, load(tile.out + (tile.rows + r) * 16) + up_bias, limit)
                         : activate<activation>(sums);
      value = value * multiplier;
      if (residual != nullptr) value = value + loadUpTo(residual + at, tile.width);
      if (is_whole) {
        store(y + at, value);
      } else {
        storePart(y + at, value, tile.width);
      }
    }
  }

  // Asks for what finish() reads and writes: rows lie too far apart for the processor to see what comes next.
  SINKEXPORT_INLINE void ask(const Segment& segment, int64_t first_row, int rows, int64_t column) const {
    const float* residual = residualOfTiles();
    const float* y = this->rows == nullptr ? params.y : this->rows;
    for (int r = 0; r < rows; ++r) {
      const int64_t at = segments.rowOfY(segment.first + first_row + r) * params.num_outputs + column;
      for (int64_t i = 0; i < (params.is_gated ? 16 : kTiles * 16); i += 16) {
        prefetch(y + at + i);
        if (residual != nullptr) prefetch(residual + at + i);
      }
    }
  }

  // The norm after the matmul, and the residual: a row needs all of its tiles.
  void normalise(const Parallel& parallel) const {
    const int64_t rows = params.num_rows;
    const int64_t parts = rows * params.num_outputs <= kPackedByEach ? 1 : smaller(rows, parallel.threads);
    parallelFor(parallel, parts, [&](int64_t part) {
      for (int64_t m = part * rows / parts; m < (part + 1) * rows / parts; ++m) finishRow(params, m);
    });
  }

  // Weighted sums of the rows that the experts gave.
  void sumRows(const Parallel& parallel) const {
    const int64_t outputs = params.num_outputs, each = params.num_rows / params.num_sums;
    const int64_t parts = params.num_rows * outputs <= kPackedByEach ? 1 : smaller(params.num_sums, parallel.threads);
    parallelFor(parallel, parts, [&](int64_t part) {
      for (int64_t m = part * params.num_sums / parts; m < (part + 1) * params.num_sums / parts; ++m) {
        for (int64_t n = 0; n < outputs; n += 16) {
          const int64_t left = outputs - n, at = m * outputs + n;
          Floats total = broadcast(0.0f);
          for (int64_t i = m * each; i < (m + 1) * each; ++i) {
            total = fma(broadcast(params.pick_weights[i]), loadUpTo(rows + i * outputs + n, left), total);
          }
          if (params.residual != nullptr) total = total + loadUpTo(params.residual + at, left);
          storePart(params.y + at, total, left);
        }
      }
    });
  }
};

}  // namespace
}  // namespace sinkexport::cpu::SINKEXPORT_ISA
