// Rows of q, k and v on their way into attention: where they belong, how they are rotated and rounded to int8.
#pragma once

#include "angles.cuh"
#include "halves.cuh"
#include "overlap.cuh"
#include "sink_attention.h"

namespace sinkexport {
namespace sink_attention {

// Ring::slot of the token `offset` (-1 or 0) after a run's first one, in 32 bits: W <= 65536, and 64-bit division is
// slow.
__device__ inline int slotOf(const SinkAttentionParams& p, int stream, int offset) {
  const uint32_t window = p.window_size;
  const uint32_t high = p.position[2 * stream], low = p.position[2 * stream + 1];
  const uint32_t t = (high % window * 65536u + low) % window;  // below 2^32 all the way
  const uint32_t behind = (p.num_sinks - offset) % window;     // -1 - S is t - (S + 1)
  return static_cast<int>(t >= behind ? t - behind : t + window - behind);
}

// Rotations of one token, in shared memory: [R/2] each. A count of 0 leaves rows as they are.
struct Turns {
  float* cos;
  float* sin;
  float* sink_cos;  // the query's, as it meets the sinks
  float* sink_sin;
  int num_pairs;       // of q and k
  int num_sink_pairs;  // of q for the sinks
};

// Brings what the two below will read nearer.
__device__ inline void prefetchTurns(const SinkAttentionParams& p, int stream) {
  constexpr int kLineFloats = 32;
  const int num_pairs = p.rotary_dim / 2, at = threadIdx.x * kLineFloats;
  if (at >= num_pairs) return;
  if (p.frequency != nullptr) {
    prefetchLine(p.frequency + at);
  } else if (p.shift_cos != nullptr) {
    prefetchLine(p.shift_cos + static_cast<size_t>(stream) * num_pairs + at);
    prefetchLine(p.shift_sin + static_cast<size_t>(stream) * num_pairs + at);
  }
}

// Rotations from exact phases, if there are frequencies. By all threads of the block; a barrier must follow. t:
// position of the token. shared: turnsFloats of them.
__device__ inline Turns makeTurns(const SinkAttentionParams& p, int64_t t, float* shared) {
  const int half = p.head_dim / 2, num_pairs = p.rotary_dim / 2;
  Turns turns{shared, shared + half, shared + 2 * half, shared + 3 * half, 0, 0};
  if (p.frequency == nullptr) return turns;
  turns.num_pairs = turns.num_sink_pairs = num_pairs;
  const int64_t as_sinks_see_it = t - sinkrt::Ring{p.num_sinks, p.window_size}.shift(t);
  for (int i = threadIdx.x; i < 2 * num_pairs; i += blockDim.x) {
    const bool for_sinks = i >= num_pairs;
    const int pair = for_sinks ? i - num_pairs : i;
    float cosine, sine;
    cosSin(for_sinks ? as_sinks_see_it : t, p.frequency[pair], cosine, sine);
    (for_sinks ? turns.sink_cos : turns.cos)[pair] = cosine * p.rope_scaling;
    (for_sinks ? turns.sink_sin : turns.sin)[pair] = sine * p.rope_scaling;
  }
  return turns;
}

// Takes in the caller's rotation back for the sinks, of `token` of T, if there is one. As above.
__device__ inline void takeShift(const SinkAttentionParams& p, int stream, int token, Turns& turns) {
  if (p.shift_cos == nullptr) return;
  turns.num_sink_pairs = p.rotary_dim / 2;
  const size_t row = (static_cast<size_t>(stream) * p.num_tokens + token) * turns.num_sink_pairs;
  for (int i = threadIdx.x; i < turns.num_sink_pairs; i += blockDim.x) {
    turns.sink_cos[i] = p.shift_cos[row + i], turns.sink_sin[i] = -p.shift_sin[row + i];  // back
  }
}

// x cos + y sin, rounded alike everywhere: the states of steps and of chunks are the same to the bit.
__device__ inline float turnedBy(float x, float y, float cosine, float sine) {
  return __fmaf_rn(x, cosine, __fmul_rn(y, sine));
}

// Which element is turned with element d < 2 * num_pairs.
__device__ inline int partnerOf(int d, int num_pairs, bool interleaved) {
  return interleaved ? d ^ 1 : (d < num_pairs ? d + num_pairs : d - num_pairs);
}

// Element d of a row, x, after the first 2 * num_pairs were turned; y: its partner's, if it has one.
__device__ inline float turnedFrom(float x, float y, int d, const float* cos, const float* sin, int num_pairs,
                                   bool interleaved) {
  if (d >= 2 * num_pairs) return x;
  const bool is_first = interleaved ? d % 2 == 0 : d < num_pairs;
  const int pair = interleaved ? d / 2 : (is_first ? d : d - num_pairs);
  return turnedBy(x, y, cos[pair], is_first ? -sin[pair] : sin[pair]);
}

// Scale of an int8 row from the largest magnitude in it: float16(clamp(max|x| / 127, 2^-17, 65504)).
__device__ inline __half int8Scale(float largest) {
  return __float2half_rn(fminf(fmaxf(__fdiv_rn(largest, 127.0f), 0x1p-17f), 65504.0f));
}

// Halves to even; exact division, as the definition of a row has it.
__device__ inline float int8Entry(float x, float scale) {
  return fminf(fmaxf(rintf(__fdiv_rn(x, scale)), -127.0f), 127.0f);
}

}  // namespace sink_attention
}  // namespace sinkexport
