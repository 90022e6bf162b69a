// Matmuls by packed weights: rows are packed, then each thread takes a contiguous range of tiles.
#include "linear_pack.h"
#include "linear_tile.h"
#include "vector_math.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {
namespace {

constexpr int64_t kRowsAtATime = 240;            // of x, so that they stay in the second-level cache: a multiple of kRows
constexpr int64_t kPackedInOneThread = 1 << 15;  // values; fewer are packed sooner than a thread can help
constexpr int64_t kRowsOfFewTasks = 64;          // from here on ranges are cut finer, for threads that are held up

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows that one matrix multiplies: all of them, or those that picked an expert.
struct Segment {
  int64_t expert;
  int64_t first;  // packed row
  int64_t rows;
};

struct Run {
  const LinearParams& params;
  const Format format;
  int64_t tiles;  // of a matrix; gated: of both
  PackedBytes bytes;
  PackedRows packed{};
  Segment* segments = nullptr;
  int64_t num_segments = 0;
  int64_t* order = nullptr;  // row of y of a packed row; null: the same

  explicit Run(const LinearParams& p)
      : params(p), format(p), tiles((p.num_outputs + 15) / 16 * (p.is_gated ? 2 : 1)),
        bytes(packedBytes(p.weight_type, p.num_inputs, tiles * 16, p.block_size, p.scale_type)) {}

  void reserve(Scratch& scratch) {
    Slices count(nullptr);
    slice(count);
    Slices slices(scratch.reserve(count.bytes()));
    slice(slices);
  }

  void slice(Slices& slices) {
    const size_t rows = static_cast<size_t>(params.num_rows);
    packed.values = slices.take<char>(rows * static_cast<size_t>(format.padded_inputs * format.x_bytes));
    packed.scales = slices.take<float>(rows * static_cast<size_t>(format.groups));
    packed.sums = slices.take<int32_t>(rows * static_cast<size_t>(format.groups));
    const size_t experts = static_cast<size_t>(params.num_experts);
    segments = slices.take<Segment>(experts > 0 ? experts : 1);
    if (experts > 0) order = slices.take<int64_t>(rows);
  }

  int64_t expertOf(int64_t row) const {
    const int64_t pick = params.picks[row];
    return pick < 0 ? 0 : pick >= params.num_experts ? params.num_experts - 1 : pick;
  }

  // Groups rows by expert, each expert's in their order, so that a matrix is read once.
  void sortRows() {
    if (params.num_experts == 0) {
      segments[0] = {0, 0, params.num_rows};
      num_segments = 1;
      return;
    }
    for (int64_t e = 0; e < params.num_experts; ++e) segments[e] = {e, 0, 0};
    for (int64_t m = 0; m < params.num_rows; ++m) ++segments[expertOf(m)].rows;
    int64_t first = 0;
    for (int64_t e = 0; e < params.num_experts; ++e) {
      segments[e].first = first;
      first += segments[e].rows;
      segments[e].rows = 0;
    }
    for (int64_t m = 0; m < params.num_rows; ++m) {
      Segment& segment = segments[expertOf(m)];
      order[segment.first + segment.rows++] = m;
    }
    num_segments = 0;
    for (int64_t e = 0; e < params.num_experts; ++e) {
      if (segments[e].rows > 0) segments[num_segments++] = segments[e];
    }
  }

  int64_t rowOfY(int64_t packed_row) const { return order == nullptr ? packed_row : order[packed_row]; }

  const float* rowOfX(int64_t packed_row) const {
    int64_t row = rowOfY(packed_row);
    if (params.num_experts > 0) row /= params.num_rows / params.num_x_rows;
    return params.x + row * params.num_inputs;
  }

  char* valuesOf(int64_t packed_row) const {
    return packed.values + packed_row * format.padded_inputs * format.x_bytes;
  }

  // Packed rows first .. last - 1 of a segment; blocks are counted from the segment's beginning.
  void packRows(const Segment& segment, int64_t first, int64_t last) const {
    for (int64_t m = first; m < last; ++m) {
      const int64_t block = m / format.largest_rows * format.largest_rows, at = segment.first + block;
      const int rows = static_cast<int>(smaller(format.largest_rows, segment.rows - block));
      packRow(params, format, rowOfX(segment.first + m),
              {valuesOf(at), packed.scales + at * format.groups, packed.sums + at * format.groups,
               static_cast<int>(m - block), rows});
    }
  }

  void pack(const Parallel& parallel) const {
    if (params.num_rows * params.num_inputs < kPackedInOneThread) {
      for (int64_t s = 0; s < num_segments; ++s) packRows(segments[s], 0, segments[s].rows);
      return;
    }
    const int64_t tasks = num_segments > 1 ? num_segments : smaller(params.num_rows, 2 * parallel.threads);
    parallelFor(parallel, tasks, [&](int64_t task) {
      if (num_segments > 1) {
        packRows(segments[task], 0, segments[task].rows);
      } else {
        packRows(segments[0], task * params.num_rows / tasks, (task + 1) * params.num_rows / tasks);
      }
    });
  }

  TileOperands operands(const Segment& segment, int64_t tile) const {
    TileOperands result;
    result.num_steps = format.padded_inputs / format.step;
    result.weight_stride = static_cast<int64_t>(bytes.weight) / tiles;
    result.weight = static_cast<const char*>(params.weight) + (segment.expert * tiles + tile) * result.weight_stride;
    if (!format.is_integer) return result;
    result.group_steps = format.group / 4;
    result.has_half_scales = params.scale_type == ScaleType::kFloat16;
    result.scale_step = params.block_size == 0 ? 0 : result.has_half_scales ? 32 : 64;
    result.scale_stride = static_cast<int64_t>(bytes.scale) / tiles;
    result.scale = static_cast<const char*>(params.scale) + (segment.expert * tiles + tile) * result.scale_stride;
    if (params.zero_point == nullptr) return result;
    result.zero_stride = static_cast<int64_t>(bytes.zero_point) / tiles;
    result.zero_point = params.zero_point + (segment.expert * tiles + tile) * result.zero_stride;
    return result;
  }

  SINKEXPORT_INLINE Floats activate(Floats x) const {
    switch (params.activation) {
      case Activation::kSilu:
        return x * sigmoid(x);
      case Activation::kGelu:
        return broadcast(0.5f) * x * (broadcast(1.0f) + erf(x * broadcast(0.707106781f)));
      case Activation::kGeluTanh: {
        const Floats inner = fma(x * x, x * broadcast(0.044715f), x) * broadcast(0.797884561f);
        return broadcast(0.5f) * x * (broadcast(1.0f) + tanh(inner));
      }
      case Activation::kRelu2: {
        const Floats positive = max(x, broadcast(0.0f));
        return positive * positive;
      }
      default:
        return x;
    }
  }

  // What stands after the matmul. out [tiles][rows][16]; `column` is the first output of y.
  void finish(const Segment& segment, int64_t first_row, int rows, int64_t column, int num_tiles,
              const float* out) const {
    const int64_t outputs = params.num_outputs;
    const float* bias = params.bias;
    if (bias != nullptr) bias += segment.expert * outputs * (params.is_gated ? 2 : 1);
    for (int n = 0; n < (params.is_gated ? 1 : num_tiles); ++n, column += 16, out += rows * 16) {
      const int64_t width = smaller(16, outputs - column);
      for (int r = 0; r < rows; ++r) {
        const int64_t at = rowOfY(segment.first + first_row + r) * outputs + column;
        Floats value = load(out + r * 16);
        if (bias != nullptr) value = value + loadUpTo(bias + column, width);
        value = activate(value);
        if (params.is_gated) {
          Floats up = load(out + (rows + r) * 16);
          if (bias != nullptr) up = up + loadUpTo(bias + outputs + column, width);
          value = value * up;
        }
        if (params.residual != nullptr) value = value + loadUpTo(params.residual + at, width);
        if (width == 16) {
          store(params.y + at, value);
        } else {
          storePart(params.y + at, value, width);
        }
      }
    }
  }

  // Tiles first_tile .. last_tile - 1 of one matrix with rows first .. last - 1 of its segment.
  void multiply(const Segment& segment, int64_t first_tile, int64_t last_tile, int64_t first, int64_t last) const {
    alignas(64) float out[2 * kMostRows * 16];
    const int tiles_at_once = params.is_gated || format.largest_tiles > 1 ? 2 : 1;
    for (int64_t tile = first_tile; tile < last_tile; tile += tiles_at_once) {
      const int num_tiles = static_cast<int>(smaller(tiles_at_once, last_tile - tile));
      TileOperands of = operands(segment, tile);
      for (int64_t m = first; m < last; m += format.largest_rows) {
        const int rows = static_cast<int>(smaller(format.largest_rows, last - m));
        const int64_t at = segment.first + m;
        of.x = valuesOf(at);
        of.x_scale = packed.scales + at * format.groups;
        of.x_sum = packed.sums + at * format.groups;
        multiplyBlock(of, rows, num_tiles, out);
        finish(segment, m, rows, params.is_gated ? tile / 2 * 16 : tile * 16, num_tiles, out);
      }
    }
  }

  void multiplyBlock(const TileOperands& of, int rows, int num_tiles, float* out) const {
    const bool has_zeros = params.zero_point != nullptr;
    if (num_tiles <= format.largest_tiles) {
      findTile(params.weight_type, has_zeros, rows, num_tiles)(of, out);
      return;
    }
    TileOperands one = of;
    for (int n = 0; n < num_tiles; ++n) {
      findTile(params.weight_type, has_zeros, rows, 1)(one, out + n * rows * 16);
      one.weight += one.weight_stride;
      one.scale += one.scale_stride;
      one.zero_point += one.zero_stride;
    }
  }

  void multiplyAll(const Parallel& parallel) const {
    const int64_t unit = params.is_gated ? 2 : 1, units = tiles / unit, all = units * num_segments;
    const int64_t finer = params.num_rows >= kRowsOfFewTasks ? 4 : 1;
    const int64_t tasks = smaller(all, parallel.threads > 1 ? finer * parallel.threads : 1);
    parallelFor(parallel, tasks, [&](int64_t task) {
      int64_t from = task * all / tasks;
      const int64_t to = (task + 1) * all / tasks;
      while (from < to) {
        const Segment& segment = segments[from / units];
        const int64_t first = from % units, last = smaller(units, first + to - from);
        for (int64_t m = 0; m < segment.rows; m += kRowsAtATime) {
          multiply(segment, first * unit, last * unit, m, smaller(segment.rows, m + kRowsAtATime));
        }
        from += last - first;
      }
    });
  }

  static constexpr int kMostRows = kRows > kFloatRows ? kRows : kFloatRows;
  static_assert(kRowsAtATime % kRows == 0 && kRowsAtATime % kFloatRows == 0);
  static_assert(kTiles <= 2 && kFloatTiles <= 2);
};

}  // namespace

void runLinear(const LinearParams& params, const Parallel& parallel, Scratch& scratch) {
  Run run(params);
  run.reserve(scratch);
  run.sortRows();
  run.pack(parallel);
  run.multiplyAll(parallel);
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
