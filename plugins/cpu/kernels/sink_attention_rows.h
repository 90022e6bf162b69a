// New rows: where they lie, their rotation by exact phase, their rounding, and how stored rows are read.
#pragma once

#include "sink_attention_plan.h"
#include "sink_attention_simd.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

// The processor's own prefetching ends with a page: lines this far ahead are asked for.
constexpr int64_t kAhead = 4096;

// Readers of stored rows: 16 numbers, or the first n of them.
struct FloatRow {
  using Element = float;
  static constexpr bool kHasScale = false, kIsFloat = true, kIsPairs = false;
  static SINKEXPORT_INLINE Floats read(const float* from) { return load(from); }
  static SINKEXPORT_INLINE Floats readPart(const float* from, int64_t n) { return loadPart(from, n); }
};
struct HalfRow {
  using Element = uint16_t;
  static constexpr bool kHasScale = false, kIsFloat = false, kIsPairs = false;
  static SINKEXPORT_INLINE Floats read(const uint16_t* from) { return loadHalf(from); }
  static SINKEXPORT_INLINE Floats readPart(const uint16_t* from, int64_t n) { return loadHalfPart(from, n); }
};
// Rows that are pairs of bfloat16 already, as matmuls take them.
struct PairRow {
  using Element = uint16_t;
  static constexpr bool kHasScale = false, kIsFloat = false, kIsPairs = true;
  static SINKEXPORT_INLINE Floats read(const uint16_t* from) { return loadBf16(from); }
  static SINKEXPORT_INLINE Floats readPart(const uint16_t* from, int64_t) { return loadBf16(from); }
};
struct Int8Row {
  using Element = int8_t;
  static constexpr bool kHasScale = true, kIsFloat = false, kIsPairs = false;
  static SINKEXPORT_INLINE Floats read(const int8_t* from) { return toFloats(loadInt8(from)); }
  static SINKEXPORT_INLINE Floats readPart(const int8_t* from, int64_t n) { return toFloats(loadInt8Part(from, n)); }
};

// One half of a row of q, k, v, gate: from b, head, token to its address.
template <typename T>
SINKEXPORT_INLINE T* tokenRow(T* data, bool tokens_first, int64_t width, int64_t heads, int64_t tokens, int64_t size,
                              int64_t b, int64_t head, int64_t t) {
  return tokens_first ? data + (b * tokens + t) * width + head * size : data + ((b * heads + head) * tokens + t) * size;
}
SINKEXPORT_INLINE const float* queryRow(const SinkAttentionParams& p, int64_t b, int64_t head, int64_t t) {
  const int64_t width = p.row_width > 0 ? p.row_width : int64_t{p.num_q_heads} * p.head_dim;
  return tokenRow(p.q, p.tokens_first, width, p.num_q_heads, p.num_tokens, p.head_dim, b, head, t);
}
SINKEXPORT_INLINE const float* newRow(const SinkAttentionParams& p, bool is_key, int64_t b, int64_t head, int64_t t) {
  const int64_t size = is_key ? p.head_dim : p.value_dim;
  const int64_t width = p.row_width > 0 ? p.row_width : p.num_kv_heads * size;
  return tokenRow(is_key ? p.k : p.v, p.tokens_first, width, p.num_kv_heads, p.num_tokens, size, b, head, t);
}

// cos and sin of t * frequency turns, times `factor`: [n]. Only what is left of the phase after whole quarters of a
// turn is rounded; the polynomials' error is below 1e-7.
inline void anglesOf(int64_t t, const int64_t* frequency, int n, float factor, float* __restrict cosine,
                     float* __restrict sine) {
  constexpr float kRadians = 1.5707963267948966f * 0x1p-30f;  // of one of the 2^32 parts of a turn
  const uint32_t position = static_cast<uint32_t>(static_cast<uint64_t>(t));
  for (int i = 0; i < n; ++i) {
    const uint32_t phase = position * static_cast<uint32_t>(frequency[i]);
    const uint32_t quarter = (phase + (1u << 29)) >> 30;
    const float x = static_cast<float>(static_cast<int32_t>(phase - (quarter << 30))) * kRadians;
    const float square = x * x;
    const float s = x + x * square * (-1.6666654611e-1f + square * (8.3321608736e-3f - square * 1.9515295891e-4f));
    const float c =
        1.0f - 0.5f * square +
        square * square * (4.166664568298827e-2f - square * (1.388731625493765e-3f - square * 2.443315711809948e-5f));
    const float a = quarter & 1u ? s : c, b = quarter & 1u ? c : s;
    cosine[i] = ((quarter + 1u) & 2u ? -a : a) * factor;
    sine[i] = (quarter & 2u ? -b : b) * factor;
  }
}

// 1 / sqrt(mean(x^2) + epsilon) of `count` rows, `stride` numbers apart. Steps and chunks share this function and the
// next one, and so get the same bits.
__attribute__((noinline)) inline float normFactor(const float* x, int64_t count, int64_t stride, int dim,
                                                  float epsilon) {
  Floats squares = broadcast(0.0f);
  for (int64_t row = 0; row < count; ++row, x += stride) {
    for (int i = 0; i < dim; i += 16) {
      const Floats part = loadPart(x + i, dim - i);
      squares = fma(part, part, squares);
    }
  }
  return 1.0f / sqrt(sum(squares) / static_cast<float>(count * dim) + epsilon);
}

// normed = x * factor * weight, in whole vectors.
__attribute__((noinline)) inline const float* weighted(const float* x, int dim, float factor, const float* weight,
                                                       float* normed) {
  for (int i = 0; i < dim; i += 16) {
    store(normed + i, loadPart(x + i, dim - i) * broadcast(factor) * loadPart(weight + i, dim - i));
  }
  return normed;
}

// Factor of the norm of all queries, or keys, of a token; where each head has one of its own, any number.
SINKEXPORT_INLINE float rowFactor(const SinkAttentionParams& p, bool is_key, int64_t b, int64_t t) {
  if (!p.qk_norm_of_rows || p.q_norm_weight == nullptr) return 1.0f;
  const float* x = is_key ? newRow(p, true, b, 0, t) : queryRow(p, b, 0, t);
  const int64_t stride = int64_t{p.head_dim} * (p.tokens_first ? 1 : p.num_tokens);
  return normFactor(x, is_key ? p.num_kv_heads : p.num_q_heads, stride, p.head_dim, p.qk_norm_epsilon);
}

// A row of queries or keys after its norm: the row itself, or `normed`. of_row: `rowFactor` of the token.
SINKEXPORT_INLINE const float* normalised(const SinkAttentionParams& p, const float* x, const float* weight,
                                          int64_t head, float of_row, float* normed) {
  if (weight == nullptr) return x;
  if (p.qk_norm_of_rows) return weighted(x, p.head_dim, of_row, weight + head * p.head_dim, normed);
  return weighted(x, p.head_dim, normFactor(x, 1, 0, p.head_dim, p.qk_norm_epsilon), weight, normed);
}
SINKEXPORT_INLINE const float* normalisedQuery(const SinkAttentionParams& p, int64_t b, int64_t head, int64_t t,
                                               float of_row, float* normed) {
  return normalised(p, queryRow(p, b, head, t), p.q_norm_weight, head, of_row, normed);
}
SINKEXPORT_INLINE const float* normalisedKey(const SinkAttentionParams& p, int64_t b, int64_t head, int64_t t,
                                             float* normed) {
  return normalised(p, newRow(p, true, b, head, t), p.k_norm_weight, head, rowFactor(p, true, b, t), normed);
}
SINKEXPORT_INLINE const float* normalisedValue(const SinkAttentionParams& p, int64_t b, int64_t head, int64_t t,
                                               float* normed) {
  const float* x = newRow(p, false, b, head, t);
  if (p.v_norm_weight == nullptr) return x;
  return weighted(x, p.value_dim, normFactor(x, 1, 0, p.value_dim, p.v_norm_epsilon), p.v_norm_weight, normed);
}

// y = x turned, times `factor`. half: R/2, 0 for none. Steps and chunks share this function and so get the same bits.
__attribute__((noinline)) inline void turn(const float* __restrict x, float* __restrict y, int dim, int half,
                                           bool interleaved, const float* __restrict cosine,
                                           const float* __restrict sine, float factor) {
  if (interleaved) {
    for (int i = 0; i < half; ++i) {
      const float first = x[2 * i], second = x[2 * i + 1];
      y[2 * i] = (first * cosine[i] - second * sine[i]) * factor;
      y[2 * i + 1] = (second * cosine[i] + first * sine[i]) * factor;
    }
  } else {
    for (int i = 0; i < half; ++i) {
      const float first = x[i], second = x[i + half];
      y[i] = (first * cosine[i] - second * sine[i]) * factor;
      y[i + half] = (second * cosine[i] + first * sine[i]) * factor;
    }
  }
  for (int i = 2 * half; i < dim; ++i) y[i] = x[i] * factor;
}

// Both angles of a stream's token t: the stream's for keys and the window, that of its place in the cache for sinks.
// With angles of the shift alone keys and queries are not turned here, and sine is of a turn back.
struct Angles {
  float *cosine, *sine;              // [R/2]
  float *sink_cosine, *sink_sine;    // [R/2]
  float *shift_cosine, *shift_sine;  // [R/2], of the tokens between both, without rope_scaling: for turned weights
  int half = 0;                      // that turn keys and queries
  int sink_half = 0;                 // that turn queries for the sinks
};
SINKEXPORT_INLINE void findAngles(const SinkAttentionParams& p, int64_t b, int64_t token, int64_t t, bool has_sinks,
                                  Angles& angles) {
  const int half = p.rotary_dim / 2;
  const int64_t past = t - (int64_t{p.num_sinks} + p.window_size - 1);
  angles.half = angles.sink_half = 0;
  if (p.frequency != nullptr && half > 0) {
    angles.half = angles.sink_half = half;
    anglesOf(t, p.frequency, half, p.rope_scaling, angles.cosine, angles.sine);
    if (has_sinks || p.q_turned_weight != nullptr) {
      anglesOf(past > 0 ? t - past : t, p.frequency, half, p.rope_scaling, angles.sink_cosine, angles.sink_sine);
    }
    if (p.q_turned_weight != nullptr) {
      anglesOf(past > 0 ? past : 0, p.frequency, half, 1.0f, angles.shift_cosine, angles.shift_sine);
    }
  } else if (p.shift_cos != nullptr && half > 0) {
    angles.sink_half = half;
    const float* cosine = p.shift_cos + (b * p.num_tokens + token) * half;
    const float* sine = p.shift_sin + (b * p.num_tokens + token) * half;
    for (int i = 0; i < half; ++i) angles.sink_cosine[i] = cosine[i], angles.sink_sine[i] = -sine[i];
  }
}

// A query as the window's keys meet it, and as those of the sinks do, times `factor`. Both have room for whole vectors.
// `to_sink` is left out where no sinks want it.
inline void turnQuery(const SinkAttentionParams& p, const float* q, const Angles& angles, float factor, float* to,
                      float* to_sink, bool has_sinks) {
  const int dim = p.head_dim;
  if (has_sinks || p.q_turned_weight != nullptr) {
    turn(q, to_sink, dim, angles.sink_half, p.interleaved, angles.sink_cosine, angles.sink_sine, factor);
  }
  if (p.q_turned_weight == nullptr) {
    turn(q, to, dim, angles.half, p.interleaved, angles.cosine, angles.sine, factor);
    return;
  }
  weighted(to_sink, dim, 1.0f, p.q_turned_weight, to_sink);
  if (p.k_turned_weight != nullptr) weighted(to_sink, dim, 1.0f, p.k_turned_weight, to_sink);
  turn(to_sink, to, dim, angles.half, p.interleaved, angles.shift_cosine, angles.shift_sine, 1.0f);
}

// A row as float16. to: [n].
inline void roundToHalf(const float* row, int n, uint16_t* to) {
  int i = 0;
  for (; i + 16 <= n; i += 16) storeHalf(to + i, load(row + i));
  if (i < n) {
    uint16_t last[16];
    storeHalf(last, loadPart(row + i, n - i));
    std::memcpy(to + i, last, (n - i) * sizeof *to);
  }
}

// A row as int8 and its scale in float16: exporter/sinkexport/model/int8_rows.py. to: [n].
inline void roundToInt8(const float* row, int n, int8_t* to, uint16_t* to_scale) {
  Floats peaks = broadcast(0.0f);
  for (int i = 0; i < n; i += 16) peaks = max(peaks, abs(loadPart(row + i, n - i)));
  float scale = largest(peaks) / 127.0f;
  scale = scale > 0x1p-17f ? (scale < 65504.0f ? scale : 65504.0f) : 0x1p-17f;
  uint16_t scales[16];
  storeHalf(scales, broadcast(scale));
  *to_scale = scales[0];
  const Floats divisor = loadHalf(scales), limit = broadcast(127.0f);
  for (int i = 0; i < n; i += 16) {
    const Floats scaled = loadPart(row + i, n - i) / divisor;
    const Ints entries = toInts(max(min(scaled, limit), broadcast(0.0f) - limit));
    if (i + 16 <= n) {
      storeInt8(to + i, entries);
    } else {
      int8_t last[16];
      storeInt8(last, entries);
      std::memcpy(to + i, last, n - i);
    }
  }
}

// Stores a row of n numbers as the window has it, as row `index` of `rows` and `scales`.
SINKEXPORT_INLINE void storeRow(WindowType type, const float* row, int n, void* rows, uint16_t* scales, int64_t index) {
  if (type == WindowType::kFloat32) {
    std::memcpy(static_cast<float*>(rows) + index * n, row, n * sizeof(float));
  } else if (type == WindowType::kFloat16) {
    roundToHalf(row, n, static_cast<uint16_t*>(rows) + index * n);
  } else {
    roundToInt8(row, n, static_cast<int8_t*>(rows) + index * n, scales + index);
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
