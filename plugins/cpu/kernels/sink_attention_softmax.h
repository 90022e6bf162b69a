// Weights of the softmax, and what makes the output of sums of weighted values.
//
// Logits are in units of ln 2. exp2Of has a relative error below 8e-8 (1.6e-7 where fma rounds twice): a Chebyshev
// polynomial of degree 6 on -1/2 .. 1/2, itself right to 3e-9.
#pragma once

#include "sink_attention_rows.h"
#include "vector_math.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNoLogit = -1e30f;  // before any: finite, so that differences are numbers

// 2^x; 2^-120, which is next to nothing, for all that is below. What is not a number stays none.
SINKEXPORT_INLINE Floats exp2Of(Floats x) {
  x = max(broadcast(-120.0f), x);
  const Floats whole = roundEven(x), f = x - whole;
  Floats y = fma(broadcast(1.5469732e-4f), f, broadcast(1.34004322e-3f));
  y = fma(y, f, broadcast(9.6180256e-3f));
  y = fma(y, f, broadcast(5.55032721e-2f));
  y = fma(y, f, broadcast(2.40226512e-1f));
  y = fma(y, f, broadcast(6.93147207e-1f));
  y = fma(y, f, broadcast(1.0f));
  return timesPowerOf2(y, whole);
}
SINKEXPORT_INLINE float exp2Of(float x) {
  float lanes[16];
  store(lanes, exp2Of(broadcast(x)));
  return lanes[0];
}

// Factor that takes q . k to logits in units of ln 2, or to what the softcap's tanh is of.
SINKEXPORT_INLINE float logitFactor(const SinkAttentionParams& p) {
  return p.softcap > 0.0f ? p.scale / p.softcap : p.scale * kLog2E;
}

// Factor on a row's weighted sum of values, with the logit that has no value taken in.
SINKEXPORT_INLINE float normaliser(float largest, float sum, const float* sink_logit, int64_t head) {
  if (sink_logit == nullptr) return sum > 0.0f ? 1.0f / sum : 0.0f;
  const float extra = sink_logit[head] * kLog2E, base = extra > largest ? extra : largest;
  const float factor = exp2Of(largest - base);
  return factor / (sum * factor + exp2Of(extra - base));
}

// Writes a row of the output, values times `factor` and the gate. values: stride floats apart.
SINKEXPORT_INLINE void writeOut(const SinkAttentionParams& p, int64_t b, int64_t head, int64_t t, const float* values,
                                int64_t stride, float factor) {
  const int64_t n = p.value_dim;
  float* out = tokenRow(p.out, p.out_tokens_first, p.num_q_heads * n, p.num_q_heads, p.num_tokens, n, b, head, t);
  if (p.gate != nullptr && p.gate_dim == 1) {
    const float* gate = tokenRow(p.gate, p.tokens_first, p.num_q_heads, p.num_q_heads, p.num_tokens, 1, b, head, t);
    float lanes[16];
    store(lanes, sigmoid(broadcast(*gate)));
    factor *= lanes[0];
  }
  if (stride == 1) {
    for (int64_t i = 0; i < n; i += 16) storePart(out + i, loadPart(values + i, n - i) * broadcast(factor), n - i);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = values[i * stride] * factor;
  }
  if (p.gate != nullptr && p.gate_dim > 1) {
    const float* gate = tokenRow(p.gate, p.tokens_first, p.num_q_heads * n, p.num_q_heads, p.num_tokens, n, b, head, t);
    for (int64_t i = 0; i < n; i += 16) {
      storePart(out + i, loadPart(out + i, n - i) * sigmoid(loadPart(gate + i, n - i)), n - i);
    }
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
