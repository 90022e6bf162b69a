// Rows of x made ready for linear_tile.h: normalised, rounded to int8 where the weights are integers, interleaved.
#pragma once

#include "linear.h"
#include "linear_norm.h"
#include "linear_tile.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

// Sizes that follow from the weight's type.
struct Format {
  bool is_integer;
  int64_t padded_inputs;  // K with its padding, of the weights
  int64_t x_inputs;       // of a packed row: integers up to the end of the last group
  int64_t group;          // inputs that share a scale of x; 0: none
  int64_t groups;
  int step;          // inputs of one step of a tile's loop
  int x_bytes;       // of one input
  int largest_rows;  // of a block
  int largest_tiles;

  explicit Format(const LinearParams& params) {
    const bool is_int4 = params.weight_type == WeightType::kInt4;
    is_integer = is_int4 || params.weight_type == WeightType::kInt8;
    step = is_integer ? 4 : params.weight_type == WeightType::kBFloat16 ? 2 : 1;
    const int64_t multiple = params.block_size > 0 ? params.block_size : step;
    padded_inputs = (params.num_inputs + multiple - 1) / multiple * multiple;
    group = !is_integer ? 0 : params.block_size > 0 ? params.block_size : kActivationGroup;
    groups = is_integer ? (padded_inputs + group - 1) / group : 0;
    x_inputs = is_integer ? groups * group : padded_inputs;
    x_bytes = is_integer ? 1 : 4;
    largest_rows = is_integer ? kRows : kFloatRows;
    largest_tiles = is_integer ? kTiles : kFloatTiles;
  }
};

// All packed rows. A block that begins with row r begins at r * x_inputs values and r * groups scales and sums.
struct PackedRows {
  char* values;
  float* scales;
  int32_t* sums;
};

// Where row `row` of a block of `rows` goes.
struct RowTarget {
  char* values;
  float* scales;
  int32_t* sums;
  int row;
  int rows;
};

// Rounds a group, to nearest even: its scale is the largest size / 127. `count` values go to the target.
template <int most>
SINKEXPORT_INLINE void roundGroup(const Floats (&values)[most], int vectors, int64_t start, int64_t count,
                                  int factor_of_sum, const RowTarget& target, int64_t group) {
  Floats size = abs(values[0]);
  for (int i = 1; i < vectors; ++i) size = max(size, abs(values[i]));
  const float scale = largest(size) * (1.0f / 127.0f);
  const Floats inverse = broadcast(scale > 0.0f ? 1.0f / scale : 0.0f);
  const Floats limit = broadcast(127.0f), lowest = broadcast(-127.0f);
  // One row alone takes its values as they come; others from here, since each 4 of them go to places of their own.
  alignas(64) int8_t apart[16 * most];
  char* to = target.values + (start * target.rows + 4 * target.row);
  const bool is_alone = target.rows == 1 && count % 16 == 0;
  int8_t* rounded = is_alone ? reinterpret_cast<int8_t*>(to) : apart;
  Floats total = broadcast(0.0f);
  for (int i = 0; i < vectors; ++i) {
    const Ints whole = toInts(max(lowest, min(limit, values[i] * inverse)));
    total = total + toFloats(whole) + (values[i] - values[i]);
    storeInt8(rounded + 16 * i, whole);
  }
  // What is not a number stays none: it, and infinity, less itself is not 0.
  const float whole_sum = sum(total);
  const bool is_finite = whole_sum == whole_sum;
  const int64_t at = group * target.rows + target.row;
  target.scales[at] = is_finite ? scale : __builtin_nanf("");
  target.sums[at] = is_finite ? static_cast<int32_t>(whole_sum) * factor_of_sum : 0;
  if (is_alone) return;
  for (int64_t k = 0; k < count; k += 4, to += 4 * target.rows) std::memcpy(to, rounded + k, 4);
}

// All groups of a row that lie within it; the rest is left. Returns how many.
template <int vectors, Norm kind>
SINKEXPORT_INLINE int64_t packWholeGroups(const RowSource& source, int factor_of_sum, const RowTarget& target) {
  const int64_t groups = source.count / (16 * vectors);
  for (int64_t g = 0; g < groups; ++g) {
    Floats values[vectors];
    for (int i = 0; i < vectors; ++i) values[i] = source.whole<kind>((g * vectors + i) * 16);
    roundGroup(values, vectors, g * vectors * 16, vectors * 16, factor_of_sum, target, g);
  }
  return groups;
}

template <Norm kind>
int64_t packWholeGroups(const RowSource& source, int64_t group, int factor_of_sum, const RowTarget& target) {
  if (group == 32) return packWholeGroups<2, kind>(source, factor_of_sum, target);
  if (group == 64) return packWholeGroups<4, kind>(source, factor_of_sum, target);
  return packWholeGroups<8, kind>(source, factor_of_sum, target);
}

inline int64_t packWholeGroups(const RowSource& source, int64_t group, int factor_of_sum, const RowTarget& target) {
  if (source.norm == Norm::kRms) return packWholeGroups<Norm::kRms>(source, group, factor_of_sum, target);
  if (source.norm == Norm::kLayer) return packWholeGroups<Norm::kLayer>(source, group, factor_of_sum, target);
  return packWholeGroups<Norm::kNone>(source, group, factor_of_sum, target);
}

SINKEXPORT_INLINE void packFloats(const RowSource& source, const Format& format, const RowTarget& target) {
  const int step = format.step;
  float* to = reinterpret_cast<float*>(target.values) + step * target.row;
  for (int64_t k = 0; k < format.padded_inputs; k += 16) {
    float part[16];
    store(part, source.at(k));
    const int64_t count = format.padded_inputs - k < 16 ? format.padded_inputs - k : 16;
    for (int64_t i = 0; i < count; i += step, to += step * target.rows) {
      to[0] = part[i];
      if (step == 2) to[1] = part[i + 1];
    }
  }
}

// The factor on the sum of x where an integer sum begins.
inline int sumFactor(const LinearParams& params) {
  if (params.weight_type == WeightType::kInt8) return -kInt8Offset;
  return params.zero_point != nullptr ? 1 : -8;
}

inline void packRow(const LinearParams& params, const Format& format, const float* x, const RowTarget& target) {
  const RowSource source(params, x);
  if (!format.is_integer) {
    packFloats(source, format, target);
    return;
  }
  const int factor = sumFactor(params);
  int64_t g = packWholeGroups(source, format.group, factor, target);
  for (; g < format.groups; ++g) {
    const int64_t start = g * format.group;
    const int vectors = static_cast<int>(format.group / 16);
    Floats values[8];
    for (int i = 0; i < vectors; ++i) values[i] = source.at(start + 16 * i);
    roundGroup(values, vectors, start, format.group, factor, target, g);
  }
}

#ifdef SINKEXPORT_UNSIGNED_DOT
// The same for linear_panel.h: rows of x lie one after another, 128 is added to each number, and there are no sums.
template <int vectors, Norm kind>
void packPanelRow(const LinearParams& params, const Format& format, const RowSource& source, uint8_t* to, float* scales,
                  int stride) {
  const Floats limit = broadcast(127.0f), lowest = broadcast(-127.0f);
  const Ints offset = broadcastInt(kInt8Offset);
  Floats odd = broadcast(0.0f);
  for (int64_t g = 0; g < format.groups; ++g, to += 16 * vectors) {
    const int64_t start = g * 16 * vectors;
    Floats values[vectors];
    if (start + 16 * vectors <= params.num_inputs) {
      for (int i = 0; i < vectors; ++i) values[i] = source.whole<kind>(start + 16 * i);
    } else {
      for (int i = 0; i < vectors; ++i) values[i] = source.at(start + 16 * i);
    }
    Floats size = abs(values[0]);
    for (int i = 1; i < vectors; ++i) size = max(size, abs(values[i]));
    const float scale = largest(size) * (1.0f / 127.0f);
    const Floats inverse = broadcast(scale > 0.0f ? 1.0f / scale : 0.0f);
    for (int i = 0; i < vectors; ++i) {
      odd = odd + (values[i] - values[i]);
      storeUint8(to + 16 * i, toInts(max(lowest, min(limit, values[i] * inverse))) + offset);
    }
    scales[g * stride] = scale;
  }
  const float is_odd = sum(odd);  // what is not a number, and infinity, less itself is not 0
  if (is_odd != is_odd) scales[0] = __builtin_nanf("");
}

template <Norm kind>
void packPanelRow(const LinearParams& params, const Format& format, const RowSource& source, uint8_t* to, float* scales,
                  int stride) {
  if (format.group == 32) return packPanelRow<2, kind>(params, format, source, to, scales, stride);
  if (format.group == 64) return packPanelRow<4, kind>(params, format, source, to, scales, stride);
  return packPanelRow<8, kind>(params, format, source, to, scales, stride);
}

// scales: of the row's first group; the next one's is `stride` floats further.
inline void packPanelRow(const LinearParams& params, const Format& format, const float* x, uint8_t* to, float* scales,
                         int stride) {
  const RowSource source(params, x);
  if (source.norm == Norm::kRms) return packPanelRow<Norm::kRms>(params, format, source, to, scales, stride);
  if (source.norm == Norm::kLayer) return packPanelRow<Norm::kLayer>(params, format, source, to, scales, stride);
  return packPanelRow<Norm::kNone>(params, format, source, to, scales, stride);
}
#endif

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
