// A step's own token: its q, k and v come to shared memory and are rotated there, and its row goes into the cache.
#pragma once

#include "sink_attention_sections.cuh"
#include "warp.cuh"

namespace sinkexport {
namespace sink_attention {

template <typename C>
struct Step {
  using Half = typename C::Half;

  const SinkAttentionParams& p;
  const Place<C>& at;
  const Shared<C>& memory;

  // Brings this step's q, k and v to the L2 cache, if they are not there yet.
  __device__ void prefetch() const {
    constexpr int kLine = 64, kLines = divideUp(C::kHeadDim, kLine);  // halves
    const int r = threadIdx.x / kLines, at_half = threadIdx.x % kLines * kLine;
    if (r < C::kWarpRows && at.row_begin + r < at.num_rows) prefetchLine(queries() + r * C::kHeadDim + at_half);
    if (r == C::kWarpRows) prefetchLine(newRow(p.k) + at_half);
    if (r == C::kWarpRows + 1) prefetchLine(newRow(p.v) + at_half);
    prefetchTurns(p, at.stream);
    prefetchLine(p.position + 2 * at.stream);
  }

  // Turns a step's queries and writes its own token, while the first tiles come. turns are there after a barrier.
  // Returns the tile that holds the token, or -1 if it is another block's. A barrier must follow.
  __device__ int take(const Position<C>& position, const Sections<C>& sections, const Turns& turns) const {
    const int tile = sections.tileOf(position);
    const bool is_mine = sections.begin <= tile && tile < sections.end, writes = is_mine && at.warp < 2;
    const auto [x, y] = readQueries(turns);
    NewRow row;
    if (writes) row = readNewRow(turns);
    __syncthreads();
    turnQueries(turns, x, y);
    if (writes) writeNewRow(position, sections.own_row, turns, row);
    return is_mine ? tile : -1;
  }

 private:
  static constexpr int kEach = divideUp(C::kHeadDim, kWarpSize);  // of a row, a lane's
  static constexpr int kPairs = C::kWarpRows * (C::kHeadDim / 2), kPairsOfThread = divideUp(kPairs, C::kThreads);

  struct NewRow {
    float x[kEach], y[kEach];  // and what each is turned with
  };
  struct QueryPairs {
    Half x[kPairsOfThread], y[kPairsOfThread];
  };

  __device__ const Half* queries() const {
    const int rows = p.stream_rows > 0 ? p.stream_rows : p.num_q_heads;
    const size_t row = static_cast<size_t>(at.stream) * rows + at.kv_head * at.group + at.row_begin;
    return static_cast<const Half*>(p.q) + row * C::kHeadDim;
  }
  __device__ const Half* newRow(const void* rows_of_all) const {
    const int rows = p.stream_rows > 0 ? p.stream_rows : p.num_kv_heads;
    return static_cast<const Half*>(rows_of_all) + (static_cast<size_t>(at.stream) * rows + at.kv_head) * C::kHeadDim;
  }

  // Where a pair's numbers are in a row: pairs that turn, then neighbours.
  __device__ void placesOf(int pair, int num_turned, int& first, int& second) const {
    const bool is_split = pair < num_turned && !p.interleaved;
    first = is_split ? pair : 2 * pair, second = first + (is_split ? num_turned : 1);
  }
  static __device__ int numTurned(const Turns& turns) {
    return turns.num_pairs > turns.num_sink_pairs ? turns.num_pairs : turns.num_sink_pairs;
  }

  __device__ QueryPairs readQueries(const Turns& turns) const {
    const Half* q = queries();
    QueryPairs pairs;
#pragma unroll
    for (int e = 0; e < kPairsOfThread; ++e) {
      const int i = e * C::kThreads + threadIdx.x, r = i / (C::kHeadDim / 2), pair = i % (C::kHeadDim / 2);
      int first, second;
      placesOf(pair, numTurned(turns), first, second);
      const bool is_there = r < C::kWarpRows && at.row_begin + r < at.num_rows;
      pairs.x[e] = is_there ? q[r * C::kHeadDim + first] : fromFloat<Half>(0.0f);
      pairs.y[e] = is_there ? q[r * C::kHeadDim + second] : fromFloat<Half>(0.0f);
    }
    return pairs;
  }

  // The block's rows of q turned, and to q_sink as the sinks meet them.
  __device__ void turnQueries(const Turns& turns, const Half (&xs)[kPairsOfThread],
                              const Half (&ys)[kPairsOfThread]) const {
    const int num_turned = numTurned(turns);
#pragma unroll
    for (int e = 0; e < kPairsOfThread; ++e) {
      const int i = e * C::kThreads + threadIdx.x, r = i / (C::kHeadDim / 2), pair = i % (C::kHeadDim / 2);
      if (r >= C::kWarpRows) continue;
      int first, second;
      placesOf(pair, num_turned, first, second);
      first += r * C::kRowStride, second += r * C::kRowStride;
      const float x = toFloat(xs[e]), y = toFloat(ys[e]);
      const auto store = [&](Half* rows, bool turns_it, const float* cos, const float* sin) {
        const float cosine = turns_it ? cos[pair] : 1.0f, sine = turns_it ? sin[pair] : 0.0f;
        rows[first] = turns_it ? fromFloat<Half>(turnedBy(x, y, cosine, -sine)) : xs[e];
        rows[second] = turns_it ? fromFloat<Half>(turnedBy(y, x, cosine, sine)) : ys[e];
      };
      store(memory.q, pair < turns.num_pairs, turns.cos, turns.sin);
      store(memory.q_sink, pair < turns.num_sink_pairs, turns.sink_cos, turns.sink_sin);
    }
  }

  // The step's own k (by warp 0) or v (by warp 1).
  __device__ NewRow readNewRow(const Turns& turns) const {
    const Half* const from = newRow(at.warp == 1 ? p.v : p.k);
    const int num_pairs = at.warp == 1 ? 0 : turns.num_pairs;
    NewRow row;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = 32 * i + at.lane;
      row.x[i] = d < C::kHeadDim ? toFloat(from[d]) : 0.0f;
      row.y[i] = d < 2 * num_pairs ? toFloat(from[partnerOf(d, num_pairs, p.interleaved)]) : 0.0f;
    }
    return row;
  }

  // Turned and rounded, to its place in shared memory and in the state.
  __device__ void writeNewRow(const Position<C>& own, int own_row, const Turns& turns, NewRow& row) const {
    const bool is_value = at.warp == 1, is_int8 = C::kInt8 && !own.is_sink;
    const bool is_kept = at.row_begin == 0 && (p.num_valid == nullptr || p.num_valid[at.stream] > 0);
    const size_t state_row = (own.is_sink ? at.sink_row : at.window_row) + own_row;
    void* state = is_value ? (own.is_sink ? p.sink_v : p.window_v) : (own.is_sink ? p.sink_k : p.window_k);
    void* state_row_at = static_cast<char*>(state) + state_row * C::kHeadDim * (is_int8 ? 1 : 2);
    void* state_scales = is_value ? p.window_v_scale : p.window_k_scale;
    __half* state_scale = is_int8 ? static_cast<__half*>(state_scales) + state_row : nullptr;
    void* shared_row = is_value ? memory.new_v : memory.new_k;
    const int num_pairs = is_value ? 0 : turns.num_pairs;

    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = 32 * i + at.lane;
      row.x[i] = turnedFrom(row.x[i], row.y[i], d, turns.cos, turns.sin, num_pairs, p.interleaved);
      largest = fmaxf(largest, fabsf(row.x[i]));
    }
    const __half scale = int8Scale(warpMax(largest));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = 32 * i + at.lane;
      if (d >= C::kHeadDim) continue;
      if (is_int8) {
        const auto entry = static_cast<int8_t>(int8Entry(row.x[i], __half2float(scale)));
        static_cast<int8_t*>(shared_row)[d] = entry;
        if (is_kept) static_cast<int8_t*>(state_row_at)[d] = entry;
      } else {
        const Half entry = fromFloat<Half>(row.x[i]);
        static_cast<Half*>(shared_row)[d] = entry;
        if (is_kept) static_cast<Half*>(state_row_at)[d] = entry;
      }
    }
    if (is_int8 && at.lane == 0) {
      memory.new_scales[is_value] = scale;
      if (is_kept) *state_scale = scale;
    }
  }
};

}  // namespace sink_attention
}  // namespace sinkexport
