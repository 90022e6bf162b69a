// Rows of a packed table. Each comes from as many cache lines as it has steps; no instruction set makes that faster.
#include <cstring>

#include "half.h"
#include "linear.h"

namespace sinkexport::cpu {
namespace {

// Where one row's values, scales and zero points lie in its tile.
struct RowView {
  const uint8_t* values;  // of lane 0
  const uint8_t* scales;
  const uint8_t* zeros;
  int64_t lane;
  int64_t block;  // inputs that share a scale
};

float scaleAt(const RowView& row, int64_t block, ScaleType type) {
  if (type == ScaleType::kFloat16) {
    uint16_t half;
    std::memcpy(&half, row.scales + (block * 16 + row.lane) * 2, 2);
    return floatOfHalf(half);
  }
  float value;
  std::memcpy(&value, row.scales + (block * 16 + row.lane) * 4, 4);
  return value;
}

void unpackFloats(const RowView& row, int64_t count, float* y) {
  for (int64_t k = 0; k < count; ++k) std::memcpy(y + k, row.values + (k * 16 + row.lane) * 4, 4);
}

void unpackBf16(const RowView& row, int64_t count, float* y) {
  for (int64_t k = 0; k < count; ++k) {
    uint16_t upper;
    std::memcpy(&upper, row.values + (k / 2 * 16 + row.lane) * 4 + k % 2 * 2, 2);
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    std::memcpy(y + k, &bits, 4);
  }
}

void unpackInt8(const RowView& row, int64_t count, ScaleType type, float* y) {
  for (int64_t start = 0; start < count; start += row.block) {
    const float scale = scaleAt(row, start / row.block, type);
    for (int64_t k = start; k < count && k < start + row.block; ++k) {
      y[k] = scale * static_cast<float>(static_cast<int8_t>(row.values[(k / 4 * 16 + row.lane) * 4 + k % 4]));
    }
  }
}

void unpackInt4(const RowView& row, int64_t count, ScaleType type, float* y) {
  for (int64_t start = 0; start < count; start += row.block) {
    const int64_t block = start / row.block;
    const float scale = scaleAt(row, block, type);
    const int zero = row.zeros == nullptr ? 8 : row.zeros[block * 16 + row.lane];
    for (int64_t k = start; k < count && k < start + row.block; ++k) {
      const uint8_t both = row.values[(k / 8 * 16 + row.lane) * 4 + k % 4];
      y[k] = scale * static_cast<float>((k % 8 < 4 ? both & 15 : both >> 4) - zero);
    }
  }
}

}  // namespace

void runRows(const RowsParams& params, const Parallel& parallel) {
  const PackedBytes tile = packedBytes(params.weight_type, params.row_length, 16, params.block_size, params.scale_type);
  const int64_t tasks = params.num_ids < 16 ? 1 : parallel.threads;
  parallelFor(parallel, tasks, [&](int64_t task) {
    for (int64_t i = task * params.num_ids / tasks; i < (task + 1) * params.num_ids / tasks; ++i) {
      int64_t id = params.ids[i];
      id = id < 0 ? 0 : id >= params.num_rows ? params.num_rows - 1 : id;
      const auto at = [&](const void* base, size_t bytes) {
        return base == nullptr ? nullptr : static_cast<const uint8_t*>(base) + static_cast<size_t>(id / 16) * bytes;
      };
      const RowView row{at(params.weight, tile.weight), at(params.scale, tile.scale),
                        at(params.zero_point, tile.zero_point), id % 16,
                        params.block_size > 0 ? params.block_size : params.row_length};
      float* y = params.y + i * params.row_length;
      switch (params.weight_type) {
        case WeightType::kFloat32:
          unpackFloats(row, params.row_length, y);
          break;
        case WeightType::kBFloat16:
          unpackBf16(row, params.row_length, y);
          break;
        case WeightType::kInt8:
          unpackInt8(row, params.row_length, params.scale_type, y);
          break;
        case WeightType::kInt4:
          unpackInt4(row, params.row_length, params.scale_type, y);
          break;
      }
    }
  });
}

}  // namespace sinkexport::cpu
