// Matmuls by packed weights: rows are packed, then each thread takes a contiguous range of tiles.
#include "linear_activation.h"
#include "linear_pack.h"
#include "linear_segments.h"
#include "linear_tile.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {
namespace {

constexpr int64_t kRowsAtATime = 240;       // of x, so that they stay in the second-level cache: a multiple of kRows
constexpr int64_t kPackedByEach = 1 << 13;  // values; fewer are packed by every thread for itself, with nobody waiting
constexpr int64_t kAskedForFirst = 4096;    // bytes of weights that are on their way while a thread packs
constexpr int64_t kAhead = 6144;            // bytes from what is read to what is asked for

int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

struct Run {
  const LinearParams& params;
  const Format format;
  int64_t tiles;  // of a matrix; gated: of both
  PackedBytes bytes;
  int64_t tasks = 1;   // of multiplyAll
  int64_t copies = 1;  // of the packed rows: each task's own, or 1
  PackedRows packed{};
  Segments segments;
  float* rows = nullptr;  // [M, N] before they are summed up; with pick_weights

  explicit Run(const LinearParams& p)
      : params(p),
        format(p),
        tiles((p.num_outputs + 15) / 16 * (p.is_gated ? 2 : 1)),
        bytes(packedBytes(p.weight_type, p.num_inputs, tiles * 16, p.block_size, p.scale_type)),
        segments{p} {}

  // Tiles are shared out in units of as many as are multiplied at once: an odd one would take more than half the time.
  int64_t unit() const {
    if (params.is_gated) return 2;
    return params.num_rows > format.largest_rows ? format.largest_tiles : 1;
  }
  int64_t units() const { return (tiles + unit() - 1) / unit(); }

  // Readings of a unit that a segment needs: what a unit of it costs.
  int64_t cost(const Segment& segment) const { return (segment.rows + format.largest_rows - 1) / format.largest_rows; }

  void plan(const Parallel& parallel) {
    const int64_t finer = params.num_rows >= kRowsOfFewTasks ? 4 : 1;
    const int64_t matrices = params.num_experts > 0 ? smaller(params.num_experts, params.num_rows) : 1;
    tasks = smaller(units() * matrices, parallel.threads > 1 ? finer * parallel.threads : 1);
    copies = params.num_rows * params.num_inputs <= kPackedByEach ? tasks : 1;
  }

  void reserve(Scratch& scratch) {
    Slices count(nullptr);
    slice(count);
    Slices slices(scratch.reserve(count.bytes()));
    slice(slices);
  }

  void slice(Slices& slices) {
    const size_t count = static_cast<size_t>(params.num_rows), number = static_cast<size_t>(copies);
    packed.values = slices.take<char>(number * static_cast<size_t>(valueBytes()));
    packed.scales = slices.take<float>(number * static_cast<size_t>(scaleCount()));
    packed.sums = slices.take<int32_t>(number * static_cast<size_t>(scaleCount()));
    const size_t experts = static_cast<size_t>(params.num_experts);
    segments.all = slices.take<Segment>(experts > 0 ? experts : 1);
    if (experts > 0) segments.order = slices.take<int64_t>(count);
    if (params.pick_weights != nullptr) rows = slices.take<float>(count * static_cast<size_t>(params.num_outputs));
  }

  // Of one copy, rounded up to cache lines.
  int64_t valueBytes() const { return (params.num_rows * format.padded_inputs * format.x_bytes + 63) / 64 * 64; }
  int64_t scaleCount() const { return (params.num_rows * format.groups + 15) / 16 * 16; }

  PackedRows copy(int64_t number) const {
    return {packed.values + number * valueBytes(), packed.scales + number * scaleCount(),
            packed.sums + number * scaleCount()};
  }

  // The block that begins with a packed row.
  PackedRows blockOf(const PackedRows& all, int64_t packed_row) const {
    return {all.values + packed_row * format.padded_inputs * format.x_bytes, all.scales + packed_row * format.groups,
            all.sums + packed_row * format.groups};
  }

  // Packed rows first .. last - 1 of a segment; blocks are counted from the segment's beginning.
  void packRows(const PackedRows& to, const Segment& segment, int64_t first, int64_t last) const {
    for (int64_t m = first; m < last; ++m) {
      const int64_t block = m / format.largest_rows * format.largest_rows;
      const int rows = static_cast<int>(smaller(format.largest_rows, segment.rows - block));
      const PackedRows at = blockOf(to, segment.first + block);
      packRow(params, format, segments.rowOfX(segment.first + m),
              {at.values, at.scales, at.sums, static_cast<int>(m - block), rows});
    }
  }

  void packAll(const PackedRows& to) const {
    for (int64_t s = 0; s < segments.count; ++s) packRows(to, segments[s], 0, segments[s].rows);
  }

  void pack(const Parallel& parallel) const {
    // Rows of a block lie side by side, four bytes of each: two threads that share one would wait for its lines.
    const int64_t blocks = cost(segments[0]);
    const int64_t parts = segments.count > 1 ? segments.count : smaller(blocks, 2 * parallel.threads);
    parallelFor(parallel, parts, [&](int64_t part) {
      if (segments.count > 1) {
        packRows(packed, segments[part], 0, segments[part].rows);
      } else {
        const int64_t last = (part + 1) * blocks / parts * format.largest_rows;
        packRows(packed, segments[0], part * blocks / parts * format.largest_rows, smaller(last, params.num_rows));
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

  // What stands after the matmul. out [tiles][rows][16]; `column` is the first output of y.
  void finish(const Segment& segment, int64_t first_row, int rows, int64_t column, int num_tiles,
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
    const bool is_last = params.output_norm_weight == nullptr && rows == nullptr;  // else the residual comes later
    const float* residual = is_last ? params.residual : nullptr;
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

  // Tiles first_tile .. last_tile - 1 of one matrix with rows first .. last - 1 of its segment.
  void multiply(const PackedRows& from, const Segment& segment, int64_t first_tile, int64_t last_tile, int64_t first,
                int64_t last) const {
    alignas(64) float out[2 * kMostRows * 16];
    // Few rows are done when their weights are there: these come fastest as one stream.
    const int at_once = last - first <= format.largest_rows ? 1 : format.largest_tiles;
    const int64_t group = params.is_gated ? 2 : at_once;
    for (int64_t tile = first_tile; tile < last_tile; tile += group) {
      const int num_tiles = static_cast<int>(smaller(group, last_tile - tile));
      TileOperands of = operands(segment, tile);
      for (int64_t m = first; m < last; m += format.largest_rows) {
        const int rows = static_cast<int>(smaller(format.largest_rows, last - m));
        const PackedRows block = blockOf(from, segment.first + m);
        of.x = block.values;
        of.x_scale = block.scales;
        of.x_sum = block.sums;
        // Several rows go over the same tiles again and again: the last ones ask for what comes next.
        const int64_t next = of.weight_stride > 2 * kAhead ? kAhead : num_tiles * of.weight_stride;
        of.prefetch_ahead = at_once == 1 ? kAhead : m + rows == last ? next : 0;
        multiplyBlock(of, rows, num_tiles, at_once, out);
        finish(segment, m, rows, params.is_gated ? tile / 2 * 16 : tile * 16, num_tiles, out);
      }
    }
  }

  void multiplyBlock(const TileOperands& of, int rows, int num_tiles, int at_once, float* out) const {
    const bool has_zeros = params.zero_point != nullptr;
    if (num_tiles <= at_once) {
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

  // A unit of a segment's matrix.
  struct Place {
    int64_t segment, unit;
  };

  // Where a task begins. Tasks cost about the same: an expert that many rows picked has more of them.
  Place placeOf(int64_t task) const {
    int64_t all = 0;
    for (int64_t s = 0; s < segments.count; ++s) all += units() * cost(segments[s]);
    int64_t at = task * all / tasks, s = 0;
    for (; s < segments.count && at >= units() * cost(segments[s]); ++s) at -= units() * cost(segments[s]);
    return {s, s < segments.count ? at / cost(segments[s]) : 0};
  }

  void multiplyAll(const Parallel& parallel) const {
    parallelFor(parallel, tasks, [&](int64_t task) {
      Place at = placeOf(task);
      const Place end = placeOf(task + 1);
      if (at.segment == end.segment && at.unit == end.unit) return;
      PackedRows rows = packed;
      if (copies > 1) {
        rows = copy(task);
        askForWeights(segments[at.segment], at.unit * unit());
        packAll(rows);
      }
      for (; at.segment < end.segment || at.unit < end.unit; at = {at.segment + 1, 0}) {
        const Segment& segment = segments[at.segment];
        const int64_t last = at.segment < end.segment ? units() : end.unit;
        for (int64_t m = 0; m < segment.rows; m += kRowsAtATime) {
          multiply(rows, segment, at.unit * unit(), smaller(last * unit(), tiles), m,
                   smaller(segment.rows, m + kRowsAtATime));
        }
        if (at.segment == end.segment) return;
      }
    });
  }

  // The norm after the matmul, and the residual: a row needs all of its tiles.
  void normaliseOutputs(const Parallel& parallel) const {
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

  void askForWeights(const Segment& segment, int64_t tile) const {
    const TileOperands first = operands(segment, tile);
    for (int64_t at = 0; at < kAskedForFirst; at += 64) prefetchOnce(first.weight + at);
    if (first.scale != nullptr) prefetchOnce(first.scale);
  }

  static constexpr int kMostRows = kRows > kFloatRows ? kRows : kFloatRows;
  static_assert(kRowsAtATime % kRows == 0 && kRowsAtATime % kFloatRows == 0);
  static_assert(kTiles <= 2 && kFloatTiles <= 2);
};

}  // namespace

void runLinear(const LinearParams& params, const Parallel& parallel, Scratch& scratch) {
  Run run(params);
  run.plan(parallel);
  run.reserve(scratch);
  run.segments.sort();
  if (run.copies == 1) {
    if (parallel.threads > 1 && params.num_rows > 1) {
      run.pack(parallel);
    } else {
      run.packAll(run.packed);
    }
  }
  run.multiplyAll(parallel);
  if (params.output_norm_weight != nullptr) run.normaliseOutputs(parallel);
  if (params.pick_weights != nullptr) run.sumRows(parallel);
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
