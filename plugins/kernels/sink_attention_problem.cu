// What is wrong with the parameters of sink attention, on the host.
#include <cmath>

#include "problem.h"
#include "sink_attention.h"

namespace sinkexport {
namespace sink_attention {

const char* shapeProblem(const SinkAttentionParams& p) {
  if (p.batch < 1 || p.batch > 64) return explain("batch: received %d, expected 1 .. 64", p.batch);
  if (p.num_kv_heads < 1 || p.num_kv_heads > 1023) {
    return explain("num_kv_heads: received %d, expected 1 .. 1023", p.num_kv_heads);
  }
  if (p.num_q_heads < 1 || p.num_q_heads % p.num_kv_heads != 0) {
    return explain("num_q_heads: received %d, expected a multiple of num_kv_heads (%d)", p.num_q_heads, p.num_kv_heads);
  }
  if (p.head_dim != 64 && p.head_dim != 80 && p.head_dim != 96 && p.head_dim != 128 && p.head_dim != 256) {
    return explain("head_dim: received %d, expected 64, 80, 96, 128 or 256", p.head_dim);
  }
  if (p.num_sinks < 0) return explain("num_sinks: received %d, expected >= 0", p.num_sinks);
  if (p.window_size < 1) return explain("window_size: received %d, expected >= 1", p.window_size);
  if (int64_t{p.num_sinks} + p.window_size > 65536) {
    return explain("num_sinks + window_size: received %lld, expected at most 65536",
                   static_cast<long long>(int64_t{p.num_sinks} + p.window_size));
  }
  if (p.num_tokens < 1 || p.num_tokens > p.window_size) {
    return explain("num_tokens: received %d, expected 1 .. window_size (%d)", p.num_tokens, p.window_size);
  }
  if (int64_t{p.batch} * p.num_q_heads * p.num_tokens > INT32_MAX) {
    return explain("batch * num_q_heads * num_tokens: expected below 2^31; run shorter chunks");
  }
  return dtypeProblem(p.dtype);
}

namespace {

// Numbers beside the shapes.
const char* valueProblem(const SinkAttentionParams& p) {
  if (!(p.scale > 0.0f) || !std::isfinite(p.scale)) {
    return explain("scale: received %g, expected a finite number > 0", static_cast<double>(p.scale));
  }
  if (!(p.softcap >= 0.0f) || !std::isfinite(p.softcap)) {
    return explain("softcap: received %g, expected a finite number >= 0", static_cast<double>(p.softcap));
  }
  if ((p.shift_cos == nullptr) != (p.shift_sin == nullptr)) {
    return explain("shift_cos, shift_sin: received one of them, expected both or neither");
  }
  const bool has_rotation = p.frequency != nullptr || p.shift_cos != nullptr;
  if (p.frequency != nullptr && p.shift_cos != nullptr) {
    return explain("frequency, shift_cos: received both, expected frequency alone (q, k unrotated) or shift alone");
  }
  if (has_rotation && (p.rotary_dim < 2 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0)) {
    return explain("rotary_dim: received %d, expected an even number in 2 .. head_dim (%d)", p.rotary_dim, p.head_dim);
  }
  if (p.frequency != nullptr && !std::isfinite(p.rope_scaling)) {
    return explain("rope_scaling: received %g, expected a finite number", static_cast<double>(p.rope_scaling));
  }
  if (p.sink_scale != nullptr && p.num_sinks < 1) {
    return explain("sink_scale: received with num_sinks = 0, expected num_sinks >= 1");
  }
  if (p.stream_rows != 0 && (p.num_tokens > 1 || p.stream_rows < p.num_q_heads)) {
    return explain("stream_rows: received %d, expected 0, or num_q_heads (%d) or more in a step", p.stream_rows,
                   p.num_q_heads);
  }
  if (p.gate != nullptr && p.gate_dim != 1 && p.gate_dim != p.head_dim) {
    return explain("gate_dim: received %d, expected 1 or head_dim (%d)", p.gate_dim, p.head_dim);
  }
  return nullptr;
}

struct Named {
  const char* name;
  const void* pointer;
  bool is_needed;
};

const char* pointersProblem(const SinkAttentionParams& p) {
  const bool has_sinks = p.num_sinks > 0;
  const Named all[] = {{"q", p.q, true},
                       {"k", p.k, true},
                       {"v", p.v, true},
                       {"out", p.out, true},
                       {"position", p.position, true},
                       {"window_k", p.window_k, true},
                       {"window_v", p.window_v, true},
                       {"sink_k", p.sink_k, has_sinks},
                       {"sink_v", p.sink_v, has_sinks},
                       {"window_k_scale", p.window_k_scale, p.int8_window},
                       {"window_v_scale", p.window_v_scale, p.int8_window},
                       {"num_valid", p.num_valid, false},
                       {"shift_cos", p.shift_cos, false},
                       {"shift_sin", p.shift_sin, false},
                       {"frequency", p.frequency, false},
                       {"alibi_slopes", p.alibi_slopes, false},
                       {"sink_logit", p.sink_logit, false},
                       {"sink_scale", p.sink_scale, false},
                       {"gate", p.gate, false}};
  for (const Named& one : all) {
    if (one.is_needed && one.pointer == nullptr) return explain("%s: received null, expected a pointer", one.name);
    if (reinterpret_cast<uintptr_t>(one.pointer) % 16 != 0) {
      return explain("%s: received %p, expected an address that 16 divides", one.name, one.pointer);
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace sink_attention

const char* sinkAttentionProblem(const SinkAttentionParams& p) {
  if (const char* problem = sink_attention::shapeProblem(p)) return problem;
  if (const char* problem = sink_attention::valueProblem(p)) return problem;
  return sink_attention::pointersProblem(p);
}

}  // namespace sinkexport
