// Norms before a matmul, while rows of x are read, and after it.
#pragma once

#include "linear.h"
#include "simd.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

SINKEXPORT_INLINE Floats loadUpTo(const float* from, int64_t n) {
  return n >= 16 ? load(from) : loadPart(from, n);
}

// 1 / sqrt(mean(x^2) + epsilon)
SINKEXPORT_INLINE float rmsFactor(const float* x, int64_t count, float epsilon) {
  Floats squares = broadcast(0.0f), more = broadcast(0.0f);
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const Floats first = load(x + k), second = load(x + k + 16);
    squares = fma(first, first, squares);
    more = fma(second, second, more);
  }
  for (; k < count; k += 16) {
    const Floats rest = loadUpTo(x + k, count - k);
    squares = fma(rest, rest, squares);
  }
  return 1.0f / sqrt(sum(squares + more) / static_cast<float>(count) + epsilon);
}

enum class Norm { kNone, kRms, kLayer };

// x as the matmul wants it.
struct RowSource {
  const float* x;
  const float* norm_weight;
  const float* norm_bias;  // of a layer norm; null: none
  int64_t count;
  Norm norm;
  Floats mean, factor;

  RowSource(const LinearParams& params, const float* row)
      : x(row),
        norm_weight(params.norm_weight),
        norm_bias(params.norm_bias),
        count(params.num_inputs),
        norm(params.norm_weight == nullptr ? Norm::kNone
             : params.is_layer_norm        ? Norm::kLayer
                                           : Norm::kRms),
        mean(broadcast(0.0f)),
        factor(broadcast(1.0f)) {
    if (norm == Norm::kRms) factor = broadcast(rmsFactor(x, count, params.norm_epsilon));
    if (norm == Norm::kLayer) findMoments(params.norm_epsilon);
  }

  void findMoments(float epsilon) {
    Floats all = broadcast(0.0f), squares = all;
    for (int64_t k = 0; k < count; k += 16) all = all + loadUpTo(x + k, count - k);
    mean = broadcast(sum(all) / static_cast<float>(count));
    for (int64_t k = 0; k < count; k += 16) {
      float part[16] = {};  // lanes beyond the last stay 0
      storePart(part, loadUpTo(x + k, count - k) - mean, count - k);
      const Floats off = load(part);
      squares = fma(off, off, squares);
    }
    factor = broadcast(1.0f / sqrt(sum(squares) / static_cast<float>(count) + epsilon));
  }

  // 16 inputs from k on, zeros beyond the last.
  SINKEXPORT_INLINE Floats at(int64_t k) const {
    if (k >= count) return broadcast(0.0f);
    const Floats values = loadUpTo(x + k, count - k);
    if (norm == Norm::kNone) return values;
    const Floats scaled = (values - mean) * factor * loadUpTo(norm_weight + k, count - k);
    return norm_bias == nullptr ? scaled : scaled + loadUpTo(norm_bias + k, count - k);
  }

  // The same where all 16 are there.
  template <Norm kind>
  SINKEXPORT_INLINE Floats whole(int64_t k) const {
    if constexpr (kind == Norm::kNone) return load(x + k);
    if constexpr (kind == Norm::kRms) return load(x + k) * factor * load(norm_weight + k);
    const Floats scaled = (load(x + k) - mean) * factor * load(norm_weight + k);
    return norm_bias == nullptr ? scaled : scaled + load(norm_bias + k);
  }
};

// Row m of y, where all its sums are: the norm, then the residual.
inline void finishRow(const LinearParams& params, int64_t m) {
  const int64_t count = params.num_outputs;
  float* y = params.y + m * count;
  const Floats factor = broadcast(rmsFactor(y, count, params.output_norm_epsilon));
  for (int64_t n = 0; n < count; n += 16) {
    const int64_t left = count - n;
    Floats value = loadUpTo(y + n, left) * factor * loadUpTo(params.output_norm_weight + n, left);
    if (params.residual != nullptr) value = value + loadUpTo(params.residual + m * count + n, left);
    storePart(y + n, value, left);
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
