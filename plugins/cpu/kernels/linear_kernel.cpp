// Matmuls by packed weights: rows are packed, then each thread takes a contiguous range of tiles.
#include "linear_outputs.h"
#include "linear_pack.h"
#include "linear_panel.h"
#include "linear_segments.h"
#include "linear_tile.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {
namespace {

constexpr int64_t kBytesAtATime = 768 * 1024;  // of packed rows of x: they stay in the second-level cache
constexpr int64_t kTasksAThread = 16;          // of many rows: threads end at about the same time
constexpr int64_t kAhead = 6144;               // bytes from what is read to what is asked for

struct Run {
  const LinearParams& params;
  const Format format;
  int64_t tiles;  // of a matrix; gated: of both
  PackedBytes bytes;
  int64_t tasks = 1;   // of multiplyAll
  int64_t copies = 1;  // of the packed rows: each task's own, or 1
  PackedRows packed{};
  Segments segments;
  Outputs outputs;

  explicit Run(const LinearParams& p)
      : params(p),
        format(p),
        tiles((p.num_outputs + 15) / 16 * (p.is_gated ? 2 : 1)),
        bytes(packedBytes(p.weight_type, p.num_inputs, tiles * 16, p.block_size, p.scale_type)),
        segments{p},
        outputs{p, segments} {}

  // Tiles are shared out in units of as many as are multiplied at once: an odd one would take more than half the time.
  int64_t unit() const {
    if (params.is_gated) return 2;
    return params.num_rows > format.largest_rows ? format.largest_tiles : 1;
  }
  int64_t units() const { return (tiles + unit() - 1) / unit(); }

  // Readings of a unit that a segment needs: what a unit of it costs.
  int64_t cost(const Segment& segment) const { return (segment.rows + format.largest_rows - 1) / format.largest_rows; }

  void plan(const Parallel& parallel) {
    const int64_t finer = params.num_rows >= kRowsOfFewTasks ? kTasksAThread : 1;
    const int64_t matrices = params.num_experts > 0 ? smaller(params.num_experts, params.num_rows) : 1;
    tasks = smaller(units() * matrices, parallel.threads > 1 ? finer * parallel.threads : 1);
    copies = finer == 1 && params.num_rows * params.num_inputs <= kPackedByEach ? tasks : 1;
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
    if (params.pick_weights != nullptr)
      outputs.rows = slices.take<float>(count * static_cast<size_t>(params.num_outputs));
  }

  // Of one copy, rounded up to cache lines.
  int64_t valueBytes() const { return (params.num_rows * format.x_inputs * format.x_bytes + 63) / 64 * 64; }
  int64_t scaleCount() const { return (params.num_rows * format.groups + 15) / 16 * 16; }

  PackedRows copy(int64_t number) const {
    return {packed.values + number * valueBytes(), packed.scales + number * scaleCount(),
            packed.sums + number * scaleCount()};
  }

  // The block that begins with a packed row.
  PackedRows blockOf(const PackedRows& all, int64_t packed_row) const {
    return {all.values + packed_row * format.x_inputs * format.x_bytes, all.scales + packed_row * format.groups,
            all.sums + packed_row * format.groups};
  }

  // Packed rows first .. last - 1 of a segment; blocks are counted from the segment's beginning.
  void packRows(const PackedRows& to, const Segment& segment, int64_t first, int64_t last) const {
    for (int64_t m = first; m < last; ++m) {
      const int64_t block = m / format.largest_rows * format.largest_rows;
      const int rows = static_cast<int>(smaller(format.largest_rows, segment.rows - block));
      const PackedRows at = blockOf(to, segment.first + block);
#ifdef SINKEXPORT_UNSIGNED_DOT
      if (usesPanels(format.is_integer, segment.rows)) {
        packPanelRow(params, format, segments.rowOfX(segment.first + m),
                     reinterpret_cast<uint8_t*>(at.values) + (m - block) * format.x_inputs, at.scales + (m - block),
                     rows);
        continue;
      }
#endif
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
    const int64_t parts = segments.count > 1 ? segments.count : smaller(blocks, 4 * parallel.threads);
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

  // Rows of a segment that are multiplied at a time, about the same each time.
  int64_t rowsAtATime(const Segment& segment) const {
    const int64_t fitting = kBytesAtATime / (format.x_inputs * format.x_bytes) / format.largest_rows;
    const int64_t most = smaller(kMostPanelRows / format.largest_rows, fitting < 1 ? 1 : fitting);
    const int64_t blocks = cost(segment), times = (blocks + most - 1) / most;
    return (blocks + times - 1) / times * format.largest_rows;
  }

#ifdef SINKEXPORT_UNSIGNED_DOT
  // Weights of the panel behind group `group` of `count` tiles, or of the tiles behind them: what comes next.
  struct NextWeights {
    const char* start;  // of the first tile
    int64_t stride, bytes;
    int count;

    // Asks for one of `parts` parts of them.
    SINKEXPORT_INLINE void ask(int64_t part, int64_t parts) const {
      const int64_t last = (part + 1) * bytes / parts;
      for (int64_t at = part * bytes / parts / 64 * 64; at < last; at += 64) {
        for (int n = 0; n < count; ++n) prefetch(start + n * stride + at);
      }
    }
  };
  NextWeights nextWeights(const TileOperands& of, int count, int64_t group, int64_t groups) const {
    const int64_t group_bytes = of.weight_stride / format.groups;
    if (group + groups > format.groups) groups = format.groups - group;
    if (groups > 0) return {of.weight + group * group_bytes, of.weight_stride, groups * group_bytes, count};
    groups = smaller(kPanelInputs / format.group, format.groups);
    return {of.weight + count * of.weight_stride, of.weight_stride, groups * group_bytes, count};
  }

  // The same for many rows of integers.
  void multiplyPanels(const PackedRows& from, const Segment& segment, int64_t first_tile, int64_t last_tile,
                      int64_t first, int64_t last) const {
    Panel panel;
    const bool is_int4 = params.weight_type == WeightType::kInt4, has_zeros = params.zero_point != nullptr;
    const int64_t group = params.is_gated ? 2 : kTiles, at_once = kPanelInputs / format.group;
    const int64_t blocks = (last - first + kRows - 1) / kRows;
    for (int64_t tile = first_tile; tile < last_tile; tile += group) {
      const int num_tiles = static_cast<int>(smaller(group, last_tile - tile));
      const int64_t column = params.is_gated ? tile / 2 * 16 : tile * 16;
      for (int n = 0; n < num_tiles; n += kTiles) {
        const TileOperands of = operands(segment, tile + n);
        const int side_by_side = num_tiles - n < kTiles ? num_tiles - n : kTiles;
        for (int64_t g = 0; g < format.groups; g += at_once) {
          const int64_t groups = smaller(at_once, format.groups - g);
          if (side_by_side == kTiles) {
            fillPanel<kTiles>(is_int4, has_zeros, of, g, groups, panel);
          } else {
            fillPanel<1>(is_int4, has_zeros, of, g, groups, panel);
          }
          const NextWeights next = nextWeights(of, side_by_side, g + groups, at_once);
          for (int64_t m = first; m < last; m += kRows) {
            const int rows = static_cast<int>(smaller(kRows, last - m));
            const PackedRows block = blockOf(from, segment.first + m);
            const auto* x = reinterpret_cast<const int8_t*>(block.values) + g * format.group;
            next.ask((m - first) / kRows, blocks);
            if (g + groups == format.groups) outputs.ask(segment, m, rows, column);
            float* totals = panel.totals + ((m - first) * num_tiles + n * rows) * 16;
            findPanelTile(rows, side_by_side)(panel, groups, of.group_steps, x, format.x_inputs,
                                              block.scales + g * rows, g == 0, totals);
            if (n + side_by_side < num_tiles || g + groups < format.groups) continue;
            outputs.finish(segment, m, rows, column, num_tiles, totals - n * rows * 16);
          }
        }
      }
    }
  }
#endif

  // Tiles first_tile .. last_tile - 1 of one matrix with rows first .. last - 1 of its segment.
  void multiply(const PackedRows& from, const Segment& segment, int64_t first_tile, int64_t last_tile, int64_t first,
                int64_t last) const {
#ifdef SINKEXPORT_UNSIGNED_DOT
    if (usesPanels(format.is_integer, segment.rows)) {
      return multiplyPanels(from, segment, first_tile, last_tile, first, last);
    }
#endif
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
        outputs.finish(segment, m, rows, params.is_gated ? tile / 2 * 16 : tile * 16, num_tiles, out);
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
        packAll(rows);
      }
      for (; at.segment < end.segment || at.unit < end.unit; at = {at.segment + 1, 0}) {
        const Segment& segment = segments[at.segment];
        const int64_t last = at.segment < end.segment ? units() : end.unit;
        const int64_t at_a_time = rowsAtATime(segment);
        for (int64_t m = 0; m < segment.rows; m += at_a_time) {
          multiply(rows, segment, at.unit * unit(), smaller(last * unit(), tiles), m,
                   smaller(segment.rows, m + at_a_time));
        }
        if (at.segment == end.segment) return;
      }
    });
  }

  static constexpr int kMostRows = kRows > kFloatRows ? kRows : kFloatRows;
  static_assert(kMostPanelRows % kRows == 0 && kMostPanelRows % kFloatRows == 0);
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
  if (params.output_norm_weight != nullptr) run.outputs.normalise(parallel);
  if (params.pick_weights != nullptr) run.outputs.sumRows(parallel);
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
