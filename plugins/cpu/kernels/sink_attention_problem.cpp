// What is wrong with the parameters of sink attention.
#include <cmath>
#include <initializer_list>

#include "problem.h"
#include "sink_attention.h"

namespace sinkexport::cpu {
namespace {

constexpr int kLargestHead = 1024;

const char* sizeProblem(const char* name, int received, int least, int most) {
  if (received >= least && received <= most) return nullptr;
  return explain("%s: received %d, expected %d .. %d", name, received, least, most);
}

const char* headProblem(const char* name, int size) {
  if (size >= 8 && size <= kLargestHead && size % 8 == 0) return nullptr;
  return explain("%s: received %d, expected a multiple of 8 up to %d", name, size, kLargestHead);
}

const char* shapeProblem(const SinkAttentionParams& p) {
  constexpr int kMany = 1 << 20;
  if (const char* problem = sizeProblem("batch", p.batch, 1, 65535)) return problem;
  if (const char* problem = sizeProblem("num_kv_heads", p.num_kv_heads, 1, 65535)) return problem;
  if (p.num_q_heads < 1 || p.num_q_heads > 65535 || p.num_q_heads % p.num_kv_heads != 0) {
    return explain("num_q_heads: received %d, expected a multiple of num_kv_heads (%d)", p.num_q_heads, p.num_kv_heads);
  }
  if (const char* problem = headProblem("head_dim", p.head_dim)) return problem;
  if (const char* problem = headProblem("value_dim", p.value_dim)) return problem;
  if (const char* problem = sizeProblem("num_sinks", p.num_sinks, 0, kMany)) return problem;
  if (const char* problem = sizeProblem("window_size", p.window_size, 1, kMany)) return problem;
  if (p.num_tokens < 1 || p.num_tokens > p.window_size) {
    return explain("num_tokens: received %d, expected 1 .. window_size (%d)", p.num_tokens, p.window_size);
  }
  if (int64_t{p.num_tokens} * p.num_q_heads > int64_t{1} << 24) {
    return explain("num_tokens * num_q_heads: expected at most 2^24; run shorter chunks");
  }
  const int type = static_cast<int>(p.window_type);
  if (type < 0 || type > 2) {
    return explain("window_type: received %d, expected 0 (float32), 1 (float16) or 2 (int8)", type);
  }
  if (p.row_width != 0 && (!p.tokens_first || p.row_width < p.num_q_heads * p.head_dim)) {
    return explain("row_width: received %d, expected 0, or with tokens_first num_q_heads * head_dim (%d) or more",
                   p.row_width, p.num_q_heads * p.head_dim);
  }
  return nullptr;
}

const char* valueProblem(const SinkAttentionParams& p) {
  if (!(p.scale > 0.0f) || !std::isfinite(p.scale)) {
    return explain("scale: received %g, expected a finite number > 0", static_cast<double>(p.scale));
  }
  if (!(p.softcap >= 0.0f) || !std::isfinite(p.softcap)) {
    return explain("softcap: received %g, expected a finite number >= 0", static_cast<double>(p.softcap));
  }
  if (p.rotary_dim < 0 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0) {
    return explain("rotary_dim: received %d, expected an even number in 0 .. head_dim (%d)", p.rotary_dim, p.head_dim);
  }
  if (!std::isfinite(p.rope_scaling)) {
    return explain("rope_scaling: received %g, expected a finite number", static_cast<double>(p.rope_scaling));
  }
  if (!(p.qk_norm_epsilon >= 0.0f) || !std::isfinite(p.qk_norm_epsilon)) {
    return explain("qk_norm_epsilon: received %g, expected a finite number >= 0",
                   static_cast<double>(p.qk_norm_epsilon));
  }
  if (!(p.v_norm_epsilon >= 0.0f) || !std::isfinite(p.v_norm_epsilon)) {
    return explain("v_norm_epsilon: received %g, expected a finite number >= 0", static_cast<double>(p.v_norm_epsilon));
  }
  return nullptr;
}

const char* optionProblem(const SinkAttentionParams& p) {
  const bool reads_keys = !p.reads_only || p.num_tokens > 1;
  if (reads_keys && (p.q_norm_weight == nullptr) != (p.k_norm_weight == nullptr)) {
    return explain("q_norm_weight, k_norm_weight: received one of them, expected both or neither");
  }
  if (p.k_turned_weight != nullptr && p.q_turned_weight == nullptr) {
    return explain("k_turned_weight: received without q_turned_weight, expected both or neither");
  }
  if (p.q_turned_weight != nullptr && p.frequency == nullptr) {
    return explain("q_turned_weight: received without frequency, expected queries that turn here");
  }
  if (p.q_norm_weight != nullptr && p.shift_cos != nullptr) {
    return explain("q_norm_weight, shift_cos: received both, expected norms before the rotation");
  }
  if (p.new_k != nullptr && (!p.reads_only || p.num_tokens < 2)) {
    return explain("new_k: received without reads_only or with one token, expected a run that only reads several");
  }
  if ((p.shift_cos == nullptr) != (p.shift_sin == nullptr)) {
    return explain("shift_cos, shift_sin: received one of them, expected both or neither");
  }
  if (p.frequency != nullptr && p.shift_cos != nullptr) {
    return explain("frequency, shift_cos: received both, expected frequency alone (q, k unrotated) or shift alone");
  }
  if ((p.frequency != nullptr || p.shift_cos != nullptr) && p.rotary_dim == 0) {
    return explain("rotary_dim: received 0 with %s, expected the dimensions that turn",
                   p.frequency != nullptr ? "frequency" : "shift_cos");
  }
  if (p.sink_scale != nullptr && p.num_sinks < 1) {
    return explain("sink_scale: received with num_sinks = 0, expected num_sinks >= 1");
  }
  if (p.gate != nullptr && p.gate_dim != 1 && p.gate_dim != p.value_dim) {
    return explain("gate_dim: received %d, expected 1 or value_dim (%d)", p.gate_dim, p.value_dim);
  }
  return nullptr;
}

struct Named {
  const char* name;
  const void* pointer;
  bool is_needed;
  size_t alignment;
};

const char* pointersProblem(const SinkAttentionParams& p) {
  const bool reads_keys = !p.reads_only || p.num_tokens > 1;
  const bool has_sinks = p.num_sinks > 0, is_int8 = p.window_type == WindowType::kInt8;
  const bool hands_out = p.new_k != nullptr;
  const size_t element = is_int8 ? 1 : p.window_type == WindowType::kFloat16 ? 2 : 4;
  const Named all[] = {{"q", p.q, true, 4},
                       {"k", p.k, reads_keys, 4},
                       {"v", p.v, reads_keys, 4},
                       {"out", p.out, true, 4},
                       {"position", p.position, true, 8},
                       {"window_k", p.window_k, true, element},
                       {"window_v", p.window_v, true, element},
                       {"sink_k", p.sink_k, has_sinks, 4},
                       {"sink_v", p.sink_v, has_sinks, 4},
                       {"window_k_scale", p.window_k_scale, is_int8, 2},
                       {"window_v_scale", p.window_v_scale, is_int8, 2},
                       {"new_k", p.new_k, p.new_v != nullptr, element},
                       {"new_v", p.new_v, hands_out, element},
                       {"new_k_scale", p.new_k_scale, hands_out && is_int8, 2},
                       {"new_v_scale", p.new_v_scale, hands_out && is_int8, 2},
                       {"new_sink_k", p.new_sink_k, hands_out && has_sinks && element < 4, 4},
                       {"new_sink_v", p.new_sink_v, hands_out && has_sinks && element < 4, 4},
                       {"num_valid", p.num_valid, false, 8},
                       {"q_norm_weight", p.q_norm_weight, false, 4},
                       {"k_norm_weight", p.k_norm_weight, false, 4},
                       {"v_norm_weight", p.v_norm_weight, false, 4},
                       {"q_turned_weight", p.q_turned_weight, false, 4},
                       {"k_turned_weight", p.k_turned_weight, false, 4},
                       {"frequency", p.frequency, false, 8},
                       {"shift_cos", p.shift_cos, false, 4},
                       {"shift_sin", p.shift_sin, false, 4},
                       {"alibi_slopes", p.alibi_slopes, false, 4},
                       {"sink_logit", p.sink_logit, false, 4},
                       {"sink_scale", p.sink_scale, false, 4},
                       {"gate", p.gate, false, 4}};
  for (const Named& one : all) {
    if (one.is_needed && one.pointer == nullptr) return explain("%s: received null, expected a pointer", one.name);
    if (reinterpret_cast<uintptr_t>(one.pointer) % one.alignment != 0) {
      return explain("%s: received %p, expected an address that %zu divides", one.name, one.pointer, one.alignment);
    }
  }
  return nullptr;
}

}  // namespace

const char* sinkAttentionProblem(const SinkAttentionParams& p, bool shapes_only) {
  if (const char* problem = shapeProblem(p)) return problem;
  if (const char* problem = valueProblem(p)) return problem;
  if (shapes_only) return nullptr;
  if (const char* problem = optionProblem(p)) return problem;
  return pointersProblem(p);
}

}  // namespace sinkexport::cpu
