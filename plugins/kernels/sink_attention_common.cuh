// What the kernels of sink attention share: types of 16 bits, positions and angles, rows turned and rounded to int8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "overlap.cuh"
#include "sink_attention.h"
#include "sinkrt/ring.h"

namespace sinkexport {
namespace detail {

constexpr unsigned kFullWarp = 0xffffffffu;

// T: the type of 16 bits. pack: two floats, rounded to nearest even, the first in the low half.
template <DType kDType>
struct Half;

template <>
struct Half<DType::kFloat16> {
  using T = __half;
  static __device__ float toFloat(T x) { return __half2float(x); }
  static __device__ T fromFloat(float x) { return __float2half_rn(x); }
  static __device__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ void unpack(uint32_t pair, float& low, float& high) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    low = both.x, high = both.y;
  }
  // Bytes of 4 int8 -> {b0, b1} and {b2, b3}, exactly: 0x6400 | u is 1024 + u, u = b + 128.
  static __device__ void fromInt8(uint32_t bytes, uint32_t& low, uint32_t& high) {
    const uint32_t u = bytes ^ 0x80808080u;
    low = minus1152(__byte_perm(u, 0x64646464u, 0x4140));
    high = minus1152(__byte_perm(u, 0x64646464u, 0x4342));
  }

 private:
  static __device__ uint32_t minus1152(uint32_t x) {
    const uint32_t offset = 0x64806480u;
    const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&x), *reinterpret_cast<const __half2*>(&offset));
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Half<DType::kBFloat16> {
  using T = __nv_bfloat16;
  static __device__ float toFloat(T x) { return __bfloat162float(x); }
  static __device__ T fromFloat(float x) { return __float2bfloat16_rn(x); }
  static __device__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  static __device__ void unpack(uint32_t pair, float& low, float& high) {
    low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
  }
  // Exactly: 0x4300 | (7 low bits) is 128 + those, and 0x4300 | sign bit is 128 or 256.
  static __device__ void fromInt8(uint32_t bytes, uint32_t& low, uint32_t& high) {
    low = minusSign(__byte_perm(bytes, 0, 0x4140));
    high = minusSign(__byte_perm(bytes, 0, 0x4342));
  }

 private:
  static __device__ uint32_t minusSign(uint32_t x) {
    const uint32_t magnitude = (x & 0x007f007fu) | 0x43004300u, sign = (x & 0x00800080u) | 0x43004300u;
    const __nv_bfloat162 pair =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&magnitude), *reinterpret_cast<const __nv_bfloat162*>(&sign));
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// Stream position of a run's first token. position: int32 [B, 2], t >> 16 and t & 0xffff.
__device__ inline int64_t streamPosition(const int32_t* position, int stream) {
  return int64_t{position[2 * stream]} * 65536 + position[2 * stream + 1];
}

// Ring::slot of the token `offset` (-1 or 0) after a run's first one, in 32 bits: W <= 65536, and 64-bit division is
// slow.
__device__ inline int slotOf(const SinkAttentionParams& p, int stream, int offset) {
  const uint32_t window = p.window_size;
  const uint32_t high = p.position[2 * stream], low = p.position[2 * stream + 1];
  const uint32_t t = (high % window * 65536u + low) % window;  // below 2^32 all the way
  const uint32_t behind = (p.num_sinks - offset) % window;     // -1 - S is t - (S + 1)
  return static_cast<int>(t >= behind ? t - behind : t + window - behind);
}

// cos and sin of t * frequency turns: only the final phase, in [-pi, pi), is rounded.
__device__ inline void cosSin(int64_t t, uint32_t frequency, float& cosine, float& sine) {
  const float half_turns = static_cast<float>(static_cast<int32_t>(sinkrt::phase(t, frequency))) * 0x1p-31f;
  sincospif(half_turns, &sine, &cosine);
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

// Floats of shared memory that Turns needs.
__host__ __device__ constexpr int turnsFloats(int head_dim) {
  return 4 * (head_dim / 2);
}

// Brings what makeTurns will read nearer, while the position is still on its way.
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

// All threads of the block; a barrier must follow. t: position of the token, `token` of T.
__device__ inline Turns makeTurns(const SinkAttentionParams& p, int stream, int token, int64_t t, float* shared) {
  Turns turns{shared, shared + p.head_dim / 2, shared + p.head_dim, shared + 3 * (p.head_dim / 2), 0, 0};
  const int num_pairs = p.rotary_dim / 2;
  if (p.frequency != nullptr) {
    turns.num_pairs = turns.num_sink_pairs = num_pairs;
    const int64_t as_sinks_see_it = t - sinkrt::Ring{p.num_sinks, p.window_size}.shift(t);
    for (int i = threadIdx.x; i < num_pairs; i += blockDim.x) {
      float cosine, sine;
      cosSin(t, p.frequency[i], cosine, sine);
      turns.cos[i] = cosine * p.rope_scaling, turns.sin[i] = sine * p.rope_scaling;
      cosSin(as_sinks_see_it, p.frequency[i], cosine, sine);
      turns.sink_cos[i] = cosine * p.rope_scaling, turns.sink_sin[i] = sine * p.rope_scaling;
    }
  } else if (p.shift_cos != nullptr) {
    turns.num_sink_pairs = num_pairs;
    const size_t row = (static_cast<size_t>(stream) * p.num_tokens + token) * num_pairs;
    for (int i = threadIdx.x; i < num_pairs; i += blockDim.x) {
      turns.sink_cos[i] = p.shift_cos[row + i], turns.sink_sin[i] = -p.shift_sin[row + i];  // back
    }
  }
  return turns;
}

// Element d of a row after its first 2 * num_pairs dimensions were turned.
template <DType kDType>
__device__ float turned(const typename Half<kDType>::T* row, int d, const float* cos, const float* sin, int num_pairs,
                        bool interleaved) {
  const float x = Half<kDType>::toFloat(row[d]);
  if (d >= 2 * num_pairs) return x;
  const bool is_first = interleaved ? d % 2 == 0 : d < num_pairs;
  const int pair = interleaved ? d / 2 : (is_first ? d : d - num_pairs);
  const float y = Half<kDType>::toFloat(row[interleaved ? d ^ 1 : (is_first ? d + num_pairs : d - num_pairs)]);
  return is_first ? x * cos[pair] - y * sin[pair] : x * cos[pair] + y * sin[pair];
}

// Scale of an int8 row from the largest magnitude in it: float16(clamp(max|x| / 127, 2^-17, 65504)).
__device__ inline __half int8Scale(float largest) {
  return __float2half_rn(fminf(fmaxf(__fdiv_rn(largest, 127.0f), 0x1p-17f), 65504.0f));
}

// Halves to even; exact division, as the definition of a row has it.
__device__ inline float int8Entry(float x, float scale) {
  return fminf(fmaxf(rintf(__fdiv_rn(x, scale)), -127.0f), 127.0f);
}

__device__ inline float warpMax(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

__device__ inline float warpSum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

constexpr float kLog2E = 1.4426950408889634f;

// 2^x; 0 for -inf. Relative error 2^-22.
__device__ inline float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace detail
}  // namespace sinkexport
