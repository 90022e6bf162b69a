// What the host plans of a launch: which kernel, how many splits of the cache, where everything lies in the workspace.
#pragma once

#include <cmath>

#include "sink_attention_kernel.cuh"
#include "sink_attention_prefill.cuh"

namespace sinkexport {
namespace sink_attention {

extern template AttendKernel attendKernelOf<64>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<80>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<96>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<128>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<256>(DType, bool, int, bool);

// nullptr if the shapes can be planned for, else one line: sink_attention_problem.cu.
const char* shapeProblem(const SinkAttentionParams& p);

inline bool isPrefill(const SinkAttentionParams& p) {
  return p.num_tokens > 1;
}

inline AttendKernel kernelOf(const SinkAttentionParams& p) {
  const int group = p.num_q_heads / p.num_kv_heads;
  switch (p.head_dim) {
    case 64:
      return attendKernelOf<64>(p.dtype, p.int8_window, group, isPrefill(p));
    case 80:
      return attendKernelOf<80>(p.dtype, p.int8_window, group, isPrefill(p));
    case 96:
      return attendKernelOf<96>(p.dtype, p.int8_window, group, isPrefill(p));
    case 128:
      return attendKernelOf<128>(p.dtype, p.int8_window, group, isPrefill(p));
    default:
      return attendKernelOf<256>(p.dtype, p.int8_window, group, isPrefill(p));
  }
}

// Workspaces are sized for this many multiprocessors, so that a size computed on one machine (or with no GPU at all) is
// enough on another.
constexpr int kMostSms = 192;

// How a launch is cut into blocks.
struct Cut {
  int num_splits = 1;
  bool is_cluster = false;
};

struct Shape {
  AttendKernel kernel;
  int row_warps;    // warps of a block that have rows of their own
  int row_chunks;   // blocks for the rows of one (stream, kv head)
  int window_keys;  // of a tile
  int tiles;
  int row_blocks;  // blocks of one split

  explicit Shape(const SinkAttentionParams& p) : kernel(kernelOf(p)) {
    const int rows = p.num_q_heads / p.num_kv_heads * p.num_tokens;
    row_warps = 1;
    while (isPrefill(p) && row_warps < kernel.num_warps && row_warps * kernel.warp_rows < rows) row_warps *= 2;
    row_chunks = divideUp(rows, row_warps * kernel.warp_rows);
    const int other_keys = tileKeys(p.head_dim, p.int8_window, false);
    window_keys = tileKeys(p.head_dim, p.int8_window, p.int8_window);
    tiles = divideUp(p.num_sinks, other_keys) + divideUp(p.window_size, window_keys) +
            (isPrefill(p) ? divideUp(p.num_tokens, other_keys) : 0);
    row_blocks = row_chunks * p.batch * p.num_kv_heads;
  }

  // More splits than four rounds of resident blocks gain nothing; of a chunk, whose partial results are large, more
  // than one round.
  int mostSplits(const SinkAttentionParams& p, int resident_blocks) const {
    int by_blocks = divideUp(4 * resident_blocks, row_blocks);
    if (isPrefill(p)) by_blocks = resident_blocks < row_blocks ? 1 : resident_blocks / row_blocks;
    const int by_tiles = divideUp(tiles, kernel.num_warps);
    return by_blocks < by_tiles ? by_blocks : by_tiles;
  }

  // The cut that takes the least time by a rough model, fitted to an H200, in microseconds: all tiles at memory's
  // speed, as far as multiprocessors have equal shares of them, or, if it is longer, a warp's tiles one after another.
  Cut cut(const SinkAttentionParams& p, int num_sms, double memory_bytes_of_us, int blocks_of_sm,
          int most_in_cluster) const {
    const double bytes = (p.int8_window ? 0.5 : 1.0) * p.head_dim / 128 * window_keys / 16;  // of a tile, 8 KiB
    const double tile = bytes * 8192 * num_sms / memory_bytes_of_us;
    const double tile_in_a_row = isPrefill(p) ? 0.4 * p.head_dim / 128 : (0.56 + 0.44 * bytes) * kernel.warp_rows / 8;
    const int parts = kernel.num_warps / row_warps;
    constexpr double kRound = 0.5, kMerge = 2.5, kMergeOfSplit = 0.1, kCluster = 0.6, kClusterOfSplit = 0.02;
    const double partial_bytes = 8.0 * p.batch * p.num_q_heads * p.num_tokens * p.head_dim;  // written and read
    const double merge_of_split = isPrefill(p) ? partial_bytes / memory_bytes_of_us : kMergeOfSplit;
    Cut best;
    double best_cost = INFINITY;
    for (int n = 1; n <= mostSplits(p, num_sms * blocks_of_sm); ++n) {
      const int blocks = row_blocks * n, rounds = divideUp(blocks, num_sms * blocks_of_sm);
      // One round needs no more than blocks on every multiprocessor; of several, the last should be full.
      const int places = rounds == 1 ? num_sms * divideUp(blocks, num_sms) : num_sms * blocks_of_sm * rounds;
      const double at_once = tile * tiles * row_blocks / num_sms * places / blocks;
      const double in_a_row = tile_in_a_row * rounds * divideUp(divideUp(tiles, n), parts);
      const double longer = at_once > in_a_row ? at_once : in_a_row;
      // A step's clusters leave some multiprocessors free, so that they find room; a chunk's take all places.
      const int cluster_places = isPrefill(p) ? num_sms * blocks_of_sm : num_sms * 3 / 4;
      const bool is_cluster = n > 1 && n <= most_in_cluster && blocks <= cluster_places;
      const double merge = is_cluster ? kCluster + kClusterOfSplit * n : n > 1 ? kMerge + merge_of_split * n : 0.0;
      const double cost = longer + 0.01 * in_a_row + kRound * rounds + merge;
      if (cost < best_cost) best = {n, is_cluster}, best_cost = cost;
    }
    return best;
  }
};

// Where everything lies in the workspace, 256-byte aligned. With base = nullptr only its size counts, and it holds what
// any choice of pointers may need: their number is often not known yet when memory is planned.
struct Workspace {
  AttendArgs args;
  ChunkArgs chunk;
  bool is_prepared;  // whether prepareChunk has anything to do
  size_t num_bytes = 0;

  Workspace(const SinkAttentionParams& p, Cut cut, void* base) : args{}, chunk{} {
    const size_t rows = static_cast<size_t>(p.batch) * p.num_q_heads * p.num_tokens;
    const size_t kv_rows = static_cast<size_t>(p.batch) * p.num_kv_heads * p.num_tokens;
    auto take = [&](size_t bytes) {
      void* address = base != nullptr ? static_cast<char*>(base) + num_bytes : nullptr;
      num_bytes += (bytes + 255) / 256 * 256;
      return address;
    };
    args.p = chunk.p = p;
    args.num_splits = cut.num_splits;
    args.is_cluster = cut.is_cluster;
    if (cut.num_splits > 1 && !cut.is_cluster) {
      args.partial_out = static_cast<float*>(take(rows * cut.num_splits * p.head_dim * sizeof(float)));
      args.partial_sums = static_cast<float2*>(take(rows * cut.num_splits * sizeof(float2)));
    }
    const bool is_turned = p.frequency != nullptr || base == nullptr;
    const bool is_turned_back = p.num_sinks > 0 && (is_turned || p.shift_cos != nullptr);
    is_prepared = isPrefill(p) && (is_turned || is_turned_back || p.int8_window);
    if (isPrefill(p)) {
      if (is_turned) chunk.q = take(rows * p.head_dim * 2);
      if (is_turned_back) chunk.q_sink = take(rows * p.head_dim * 2);
      if (is_turned || p.int8_window) chunk.k = take(kv_rows * p.head_dim * 2);
      if (p.int8_window) {
        chunk.v = take(kv_rows * p.head_dim * 2);
        chunk.k_scale = take(kv_rows * 2);
        chunk.v_scale = take(kv_rows * 2);
      }
    }
    args.q = chunk.q != nullptr ? chunk.q : p.q;
    args.q_sink = chunk.q_sink != nullptr ? chunk.q_sink : args.q;
    args.k = chunk.k != nullptr ? chunk.k : p.k;
    args.v = chunk.v != nullptr ? chunk.v : p.v;
    args.k_scale = chunk.k_scale;
    args.v_scale = chunk.v_scale;
  }
};

}  // namespace sink_attention
}  // namespace sinkexport
