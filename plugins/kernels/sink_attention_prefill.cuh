// The kernels around a chunk's attention: what it needs of the chunk beforehand, and the chunk's way into the states.
#pragma once

#include "sink_attention_config.cuh"
#include "sink_attention_rows.cuh"
#include "warp.cuh"

namespace sinkexport {
namespace sink_attention {

constexpr int kChunkThreads = 128, kChunkWarps = kChunkThreads / kWarpSize;

// What attention and write need of the chunk; null: as the caller gave it.
struct ChunkArgs {
  SinkAttentionParams p;
  void* q;
  void* q_sink;
  void* k;
  void* v;
  void* k_scale;
  void* v_scale;
};

// A row of k or v that attention meets as it will be stored: int8 entries as 16-bit numbers and their scale; sinks, and
// everything where the window is not int8, as they are, with a scale of 1. By one warp.
template <typename Half>
__device__ void prepareRow(const Half* row, const Turns& turns, int num_pairs, const SinkAttentionParams& p,
                           bool is_rounded, Half* target, __half* scale, int lane) {
  float largest = 0.0f;
  for (int d = lane; d < p.head_dim; d += 32) {
    largest = fmaxf(largest, fabsf(turned(row, d, turns.cos, turns.sin, num_pairs, p.interleaved)));
  }
  const __half step = is_rounded ? int8Scale(warpMax(largest)) : __float2half_rn(1.0f);
  for (int d = lane; d < p.head_dim; d += 32) {
    const float x = turned(row, d, turns.cos, turns.sin, num_pairs, p.interleaved);
    target[d] = fromFloat<Half>(is_rounded ? int8Entry(x, __half2float(step)) : x);
  }
  if (scale != nullptr && lane == 0) *scale = step;
}

// Grid: T x B.
template <typename Half>
__global__ void __launch_bounds__(kChunkThreads) prepareChunk(const __grid_constant__ ChunkArgs args) {
  extern __shared__ float turns_shared[];
  const SinkAttentionParams& p = args.p;
  const int token = blockIdx.x, stream = blockIdx.y, lane = threadIdx.x % 32;
  const int64_t t = streamPosition(p.position, stream) + token;
  const Turns turns = makeTurns(p, stream, token, t, turns_shared);
  __syncthreads();
  const bool is_rounded = p.int8_window && t >= p.num_sinks;
  for (int head = threadIdx.x / 32; head < p.num_q_heads + 2 * p.num_kv_heads; head += kChunkWarps) {
    if (head < p.num_q_heads) {
      const size_t at = ((static_cast<size_t>(stream) * p.num_q_heads + head) * p.num_tokens + token) * p.head_dim;
      const Half* row = static_cast<const Half*>(p.q) + at;
      for (int d = lane; d < p.head_dim; d += 32) {
        if (args.q != nullptr) {
          static_cast<Half*>(args.q)[at + d] =
              fromFloat<Half>(turned(row, d, turns.cos, turns.sin, turns.num_pairs, p.interleaved));
        }
        if (args.q_sink != nullptr) {
          static_cast<Half*>(args.q_sink)[at + d] =
              fromFloat<Half>(turned(row, d, turns.sink_cos, turns.sink_sin, turns.num_sink_pairs, p.interleaved));
        }
      }
      continue;
    }
    const bool is_value = head >= p.num_q_heads + p.num_kv_heads;
    const int kv_head = head - p.num_q_heads - (is_value ? p.num_kv_heads : 0);
    const size_t row = (static_cast<size_t>(stream) * p.num_kv_heads + kv_head) * p.num_tokens + token;
    void* target = is_value ? args.v : args.k;
    void* scales = is_value ? args.v_scale : args.k_scale;
    if (target == nullptr) continue;
    prepareRow(static_cast<const Half*>(is_value ? p.v : p.k) + row * p.head_dim, turns, is_value ? 0 : turns.num_pairs,
               p, is_rounded, static_cast<Half*>(target) + row * p.head_dim,
               scales != nullptr ? static_cast<__half*>(scales) + row : nullptr, lane);
  }
}

// Grid: T x B. Stores the chunk's valid tokens: at most W of them, so no two want one slot.
template <typename Half>
__global__ void __launch_bounds__(kChunkThreads) writeChunk(const __grid_constant__ AttendArgs args) {
  const SinkAttentionParams& p = args.p;
  const int token = blockIdx.x, stream = blockIdx.y, lane = threadIdx.x % 32;
  if (p.num_valid != nullptr && token >= p.num_valid[stream]) return;
  const sinkrt::Ring ring{p.num_sinks, p.window_size};
  const int64_t t = streamPosition(p.position, stream) + token;
  const bool is_sink = ring.isSink(t);
  for (int head = threadIdx.x / 32; head < 2 * p.num_kv_heads; head += kChunkWarps) {
    const bool is_value = head >= p.num_kv_heads;
    const size_t head_row = static_cast<size_t>(stream) * p.num_kv_heads + head % p.num_kv_heads;
    const size_t from = head_row * p.num_tokens + token;
    const size_t to = is_sink ? head_row * p.num_sinks + t : head_row * p.window_size + ring.slot(t);
    const Half* row = static_cast<const Half*>(is_value ? args.v : args.k) + from * p.head_dim;
    void* state = is_value ? (is_sink ? p.sink_v : p.window_v) : (is_sink ? p.sink_k : p.window_k);
    if (p.int8_window && !is_sink) {
      auto* target = static_cast<int8_t*>(state) + to * p.head_dim;
      for (int d = lane; d < p.head_dim; d += 32) target[d] = static_cast<int8_t>(toFloat(row[d]));
      if (lane == 0) {
        static_cast<__half*>(is_value ? p.window_v_scale : p.window_k_scale)[to] =
            static_cast<const __half*>(is_value ? args.v_scale : args.k_scale)[from];
      }
    } else {
      const auto* source = reinterpret_cast<const uint4*>(row);
      auto* target = reinterpret_cast<uint4*>(static_cast<Half*>(state) + to * p.head_dim);
      for (int i = lane; i < p.head_dim / 8; i += 32) target[i] = source[i];
    }
  }
}

}  // namespace sink_attention
}  // namespace sinkexport
