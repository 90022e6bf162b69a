// Rows of x and y in the order of their matrices: each matrix multiplies one segment of packed rows.
#pragma once

#include "linear.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {
namespace {

// Rows that one matrix multiplies: all of them, or those that picked an expert.
struct Segment {
  int64_t expert;
  int64_t first;  // packed row
  int64_t rows;
};

// The segments of all matrices that have rows, and which row of x and y a packed row is.
struct Segments {
  const LinearParams& params;
  Segment* all = nullptr;    // as many as there are experts, or 1
  int64_t* order = nullptr;  // row of y of a packed row; null: the same
  int64_t count = 0;         // of those that have rows

  const Segment& operator[](int64_t index) const { return all[index]; }

  int64_t expertOf(int64_t row) const {
    const int64_t pick = params.picks[row];
    return pick < 0 ? 0 : pick >= params.num_experts ? params.num_experts - 1 : pick;
  }

  // Groups rows by expert, each expert's in their order, so that a matrix is read once.
  void sort() {
    if (params.num_experts == 0) {
      all[0] = {0, 0, params.num_rows};
      count = 1;
      return;
    }
    for (int64_t e = 0; e < params.num_experts; ++e) all[e] = {e, 0, 0};
    for (int64_t m = 0; m < params.num_rows; ++m) ++all[expertOf(m)].rows;
    int64_t first = 0;
    for (int64_t e = 0; e < params.num_experts; ++e) {
      all[e].first = first;
      first += all[e].rows;
      all[e].rows = 0;
    }
    for (int64_t m = 0; m < params.num_rows; ++m) {
      Segment& segment = all[expertOf(m)];
      order[segment.first + segment.rows++] = m;
    }
    count = 0;
    for (int64_t e = 0; e < params.num_experts; ++e) {
      if (all[e].rows > 0) all[count++] = all[e];
    }
  }

  int64_t rowOfY(int64_t packed_row) const { return order == nullptr ? packed_row : order[packed_row]; }

  const float* rowOfX(int64_t packed_row) const {
    int64_t row = rowOfY(packed_row);
    if (params.num_experts > 0) row /= params.num_rows / params.num_x_rows;
    return params.x + row * params.num_inputs;
  }
};

}  // namespace
}  // namespace sinkexport::cpu::SINKEXPORT_ISA
