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

  // A step's q, k and v to shared memory, as they are; a barrier must follow.
  __device__ void copy() const {
    constexpr int kRowPieces = C::kHeadDim / 8, kPieces = (C::kWarpRows + 2) * kRowPieces;
    constexpr int kEach = divideUp(kPieces, C::kThreads);
    const int q_rows = p.stream_rows > 0 ? p.stream_rows : p.num_q_heads;
    const int kv_rows = p.stream_rows > 0 ? p.stream_rows : p.num_kv_heads;
    const size_t q_row = static_cast<size_t>(at.stream) * q_rows + at.kv_head * at.group + at.row_begin;
    const size_t kv_row = static_cast<size_t>(at.stream) * kv_rows + at.kv_head;
    const auto* q = static_cast<const uint4*>(p.q) + q_row * kRowPieces;
    uint4 pieces[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at_piece = i * C::kThreads + threadIdx.x, r = at_piece / kRowPieces, piece = at_piece % kRowPieces;
      pieces[i] = make_uint4(0, 0, 0, 0);
      if (r < C::kWarpRows) {
        if (at.row_begin + r < at.num_rows) pieces[i] = q[at_piece];
      } else if (at_piece < kPieces) {
        const void* rows = r == C::kWarpRows ? p.k : p.v;
        pieces[i] = static_cast<const uint4*>(rows)[kv_row * kRowPieces + piece];
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at_piece = i * C::kThreads + threadIdx.x, r = at_piece / kRowPieces, piece = at_piece % kRowPieces;
      if (at_piece >= kPieces) continue;
      uint4* const row = r < C::kWarpRows ? reinterpret_cast<uint4*>(memory.q + r * C::kRowStride)
                                          : (r == C::kWarpRows ? memory.new_k : memory.new_v);
      row[piece] = pieces[i];
    }
  }

  // Turns a step's queries and writes its own token, while the first tiles come. Returns the tile that holds the token,
  // or -1 if it is another block's. A barrier must follow.
  __device__ int take(const Position<C>& position, const Sections<C>& sections) const {
    const Turns turns = makeTurns(p, at.stream, 0, position.t, memory.turns);
    __syncthreads();
    turnQueries(turns);
    const int tile = sections.tileOf(position);
    if (sections.begin <= tile && tile < sections.end) {
      if (at.warp < 2) writeNewRow(position, sections.own_row, turns);
      return tile;
    }
    return -1;
  }

 private:
  // Turns the block's raw rows of q where they are, and to q_sink as the sinks meet them. Each pair is one thread's.
  __device__ void turnQueries(const Turns& turns) const {
    const int num_pairs = turns.num_pairs > turns.num_sink_pairs ? turns.num_pairs : turns.num_sink_pairs;
    Half *const q = memory.q, *const q_sink = memory.q_sink;
#pragma unroll 4
    for (int i = threadIdx.x; i < C::kWarpRows * (C::kHeadDim / 2); i += C::kThreads) {
      const int r = i / (C::kHeadDim / 2), pair = i % (C::kHeadDim / 2);
      const bool is_turned = pair < num_pairs, is_split = is_turned && !p.interleaved;
      const int first = r * C::kRowStride + (is_split ? pair : 2 * pair), second = first + (is_split ? num_pairs : 1);
      const float x = toFloat(q[first]), y = toFloat(q[second]);
      if (is_turned && turns.num_pairs > 0) {
        const float cosine = turns.cos[pair], sine = turns.sin[pair];
        q[first] = fromFloat<Half>(turnedBy(x, y, cosine, -sine));
        q[second] = fromFloat<Half>(turnedBy(y, x, cosine, sine));
      }
      const bool turns_back = is_turned && turns.num_sink_pairs > 0;
      const float cosine = turns_back ? turns.sink_cos[pair] : 1.0f, sine = turns_back ? turns.sink_sin[pair] : 0.0f;
      q_sink[first] = fromFloat<Half>(turnedBy(x, y, cosine, -sine));
      q_sink[second] = fromFloat<Half>(turnedBy(y, x, cosine, sine));
    }
  }

  // The step's own k (by warp 0) or v (by warp 1): turned and rounded where it is, and to its place in the state.
  __device__ void writeNewRow(const Position<C>& own, int own_row, const Turns& turns) const {
    const bool is_value = at.warp == 1, is_int8 = C::kInt8 && !own.is_sink;
    const bool is_kept = at.row_begin == 0 && (p.num_valid == nullptr || p.num_valid[at.stream] > 0);
    const size_t state_row = (own.is_sink ? at.sink_row : at.window_row) + own_row;
    void* state = is_value ? (own.is_sink ? p.sink_v : p.window_v) : (own.is_sink ? p.sink_k : p.window_k);
    void* state_row_at = static_cast<char*>(state) + state_row * C::kHeadDim * (is_int8 ? 1 : 2);
    void* state_scales = is_value ? p.window_v_scale : p.window_k_scale;
    __half* state_scale = is_int8 ? static_cast<__half*>(state_scales) + state_row : nullptr;
    void* shared_row = is_value ? memory.new_v : memory.new_k;
    const int num_pairs = is_value ? 0 : turns.num_pairs;

    const Half* row = static_cast<const Half*>(shared_row);
    constexpr int kEach = divideUp(C::kHeadDim, 32);
    float x[kEach];
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = 32 * i + at.lane;
      x[i] = d < C::kHeadDim ? turned(row, d, turns.cos, turns.sin, num_pairs, p.interleaved) : 0.0f;
      largest = fmaxf(largest, fabsf(x[i]));
    }
    const __half scale = int8Scale(warpMax(largest));
    __syncwarp();  // all have read
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = 32 * i + at.lane;
      if (d >= C::kHeadDim) continue;
      if (is_int8) {
        const auto entry = static_cast<int8_t>(int8Entry(x[i], __half2float(scale)));
        static_cast<int8_t*>(shared_row)[d] = entry;
        if (is_kept) static_cast<int8_t*>(state_row_at)[d] = entry;
      } else {
        const Half entry = fromFloat<Half>(x[i]);
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
