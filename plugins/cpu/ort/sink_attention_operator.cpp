// SinkAttention: attention over sinks and a ring of recent tokens, its states written in place (plugins/README.md has
// inputs and fields).
//
// A state's input and output are one buffer where a runtime binds them so; two buffers are right too, each run copies
// the state first then. A node that only reads states has none of them among its outputs, but may hand out the rows
// that it would write.
#include "sink_attention.h"

#include <cstring>

#include "operator.h"

namespace sinkexport::ort {
namespace {

size_t bytesOf(int type) {
  switch (type) {
    case kInt8:
      return 1;
    case kFloat16:
      return 2;
    default:
      return 4;
  }
}

// A state: input `index`, and output 1 + its place among the states.
struct State {
  Tensor tensor;
  size_t index;
};

class SinkAttention final : public Kernel {
 public:
  SinkAttention(Node& node, const Library& library) : run_(cpu::sinkAttentionFor(library.isa)) {
    takeTokens(node);
    takeStates(node);
    takeExtras(node);
    std::vector<Tensor> outputs = {{kFloat, out_shape_}};
    if (!params_.reads_only) {
      for (const State& state : states_) outputs.push_back(state.tensor);
    } else if (hands_out_) {
      for (size_t i = 0; i < rowsHandedOut(); ++i) outputs.push_back(newRows(i));
    }
    node.finish(outputs);
    node.refuseIf(cpu::sinkAttentionProblem(params_, true));
  }

  void compute(Run& run) const override {
    cpu::SinkAttentionParams params = params_;
    params.q = q_.of<float>(run);
    if (params.tokens_first) {
      params.k = params.q + params.num_q_heads * params.head_dim;
      params.v = params.k + params.num_kv_heads * params.head_dim;
    } else if (takes_keys_) {
      params.k = k_.of<float>(run);
      params.v = v_.of<float>(run);
    }
    params.position = position_.of<int64_t>(run);
    void* states[6] = {};
    for (size_t i = 0; i < states_.size(); ++i) states[i] = params.reads_only ? readOnly(run, i) : inPlace(run, i);
    size_t next = 0;
    params.window_k = states[next++];
    params.window_v = states[next++];
    if (params.window_type == cpu::WindowType::kInt8) {
      params.window_k_scale = static_cast<uint16_t*>(states[next++]);
      params.window_v_scale = static_cast<uint16_t*>(states[next++]);
    }
    if (params.num_sinks > 0) {
      params.sink_k = static_cast<float*>(states[next++]);
      params.sink_v = static_cast<float*>(states[next++]);
    }
    if (hands_out_) handOut(run, params);
    if (params.rotary_dim > 0) params.frequency = frequency_.of<int64_t>(run);
    if (has_num_valid_) params.num_valid = num_valid_.of<int64_t>(run);
    if (has_alibi_) params.alibi_slopes = alibi_.of<float>(run);
    if (has_sink_logit_) params.sink_logit = sink_logit_.of<float>(run);
    if (has_sink_scale_) params.sink_scale = sink_scale_.of<float>(run);
    if (params.gate_dim > 0) params.gate = gate_.of<float>(run);
    if (has_qk_norm_) params.q_norm_weight = q_norm_.of<float>(run);
    if (has_qk_norm_ && takes_keys_) params.k_norm_weight = k_norm_.of<float>(run);
    if (has_v_norm_) params.v_norm_weight = v_norm_.of<float>(run);
    if (turned_weights_ > 0) params.q_turned_weight = q_turned_.of<float>(run);
    if (turned_weights_ > 1) params.k_turned_weight = k_turned_.of<float>(run);
    params.out = static_cast<float*>(run.output(0, out_shape_));
    if (params.num_tokens == 1) cpu::sinkAttentionReads(params, run.parallel().threads, run.reads());
    run_(params, run.parallel(), run.scratch());
  }

 private:
  // q, k, v and position. Heads of keys and their size are those of the window, which comes later.
  void takeTokens(Node& node) {
    const int packed_width = node.size("packed_width");
    const size_t first = node.take("q");
    const std::vector<int64_t> shape = node.input(first).shape;
    const int64_t reads_only = node.integer("reads_only", 0, 2);  // 2: and hands out new rows
    params_.reads_only = reads_only > 0;
    hands_out_ = reads_only == 2;
    const size_t token_axis = packed_width > 0 ? 1 : 2;
    takes_keys_ = !params_.reads_only || (shape.size() > token_axis && shape[token_axis] > 1);
    if (hands_out_ && !takes_keys_) node.refuse("reads_only", "2 with one token", "0 or 1");
    const size_t window = packed_width > 0 || !takes_keys_ ? 2 : 4;  // its place among the inputs
    window_ = window;
    if (node.inputs() < window + 2) node.refuse("inputs", std::to_string(node.inputs()), "tokens, position and states");
    const std::vector<int64_t>& keys = node.input(window).shape;
    const std::vector<int64_t>& values = node.input(window + 1).shape;
    if (keys.size() != 4 || values.size() != 4) node.refuse("window_k", shown(keys), "[B, Hkv, W, D]");
    params_.num_kv_heads = static_cast<int>(keys[1]);
    params_.window_size = static_cast<int>(keys[2]);
    params_.head_dim = static_cast<int>(keys[3]);
    params_.value_dim = static_cast<int>(values[3]);
    const int64_t kv_width = takes_keys_ ? keys[1] * (keys[3] + values[3]) : 0;
    if (node.input(first).type != kFloat) node.refuse("q", "another type", "float32");
    if (packed_width > 0) {
      if (shape.size() != 3 || shape[2] != packed_width + kv_width || packed_width % keys[3] != 0) {
        node.refuse("q", shown(shape), "[B, T, packed_width + Hkv * (D + Dv)]");
      }
      params_.tokens_first = params_.out_tokens_first = true;
      params_.row_width = static_cast<int>(shape[2]);
      params_.num_q_heads = static_cast<int>(packed_width / keys[3]);
      params_.num_tokens = static_cast<int>(shape[1]);
      out_shape_ = {shape[0], shape[1], params_.num_q_heads * values[3]};
    } else {
      if (shape.size() != 4 || shape[3] != keys[3]) node.refuse("q", shown(shape), "[B, Hq, T, D]");
      params_.num_q_heads = static_cast<int>(shape[1]);
      params_.num_tokens = static_cast<int>(shape[2]);
      if (takes_keys_) {
        k_ = Input(node, node.take("k", kFloat, {shape[0], keys[1], shape[2], keys[3]}));
        v_ = Input(node, node.take("v", kFloat, {shape[0], keys[1], shape[2], values[3]}));
      }
      out_shape_ = {shape[0], shape[1], shape[2], values[3]};
    }
    params_.batch = static_cast<int>(shape[0]);
    q_ = Input(node, first);
    position_ = Input(node, node.take("position", kInt64, {shape[0]}));
  }

  void takeStates(Node& node) {
    const int64_t batch = params_.batch, heads = params_.num_kv_heads, window = params_.window_size;
    const int64_t dims[] = {params_.head_dim, params_.value_dim};
    const bool is_int8 = node.flag("int8_window");
    const int type = is_int8 ? kInt8 : node.input(window_).type;
    if (!is_int8 && type != kFloat && type != kFloat16) node.refuse("window_k", "another type", "float32 or float16");
    params_.window_type = is_int8            ? cpu::WindowType::kInt8
                          : type == kFloat16 ? cpu::WindowType::kFloat16
                                             : cpu::WindowType::kFloat32;
    params_.num_sinks = node.size("num_sinks");
    takeState(node, "window_k", {type, {batch, heads, window, dims[0]}});
    takeState(node, "window_v", {type, {batch, heads, window, dims[1]}});
    if (is_int8) {
      takeState(node, "window_k_scale", {kFloat16, {batch, heads, window}});
      takeState(node, "window_v_scale", {kFloat16, {batch, heads, window}});
    }
    if (params_.num_sinks > 0) {
      takeState(node, "sink_k", {kFloat, {batch, heads, params_.num_sinks, dims[0]}});
      takeState(node, "sink_v", {kFloat, {batch, heads, params_.num_sinks, dims[1]}});
    }
  }

  void takeState(Node& node, const char* name, const Tensor& wanted) {
    const size_t index = node.take(name, wanted.type, wanted.shape);
    states_.push_back({wanted, index});
  }

  void takeExtras(Node& node) {
    params_.scale = node.number("scale");
    params_.softcap = node.number("softcap");
    params_.rope_scaling = node.number("rope_scaling");
    params_.rotary_dim = node.size("rotary_dim");
    params_.interleaved = node.flag("interleaved");
    params_.bfloat16_chunks = node.flag("bfloat16_chunks");
    const int64_t batch = params_.batch, heads = params_.num_q_heads;
    if (params_.rotary_dim > 0) {
      frequency_ = Input(node, node.take("frequency", kInt64, {params_.rotary_dim / 2}));
    }
    if ((has_num_valid_ = node.flag("has_num_valid"))) {
      num_valid_ = Input(node, node.take("num_valid", kInt64, {batch}));
    }
    if ((has_alibi_ = node.flag("has_alibi"))) alibi_ = Input(node, node.take("alibi_slopes", kFloat, {heads}));
    if ((has_sink_logit_ = node.flag("has_sink_logit"))) {
      sink_logit_ = Input(node, node.take("sink_logit", kFloat, {heads}));
    }
    if ((has_sink_scale_ = node.flag("has_sink_scale"))) {
      sink_scale_ = Input(node, node.take("sink_scale", kFloat, {heads}));
    }
    if (node.flag("has_gate")) takeGate(node);
    takeNorms(node);
  }

  void takeNorms(Node& node) {
    params_.qk_norm_epsilon = node.number("qk_norm_epsilon");
    params_.v_norm_epsilon = node.number("v_norm_epsilon");
    const int64_t qk_norm = node.integer("qk_norm", 0, 2);  // 1: of each head, 2: of all heads of a token
    params_.qk_norm_of_rows = qk_norm == 2;
    if ((has_qk_norm_ = qk_norm > 0)) {
      const int64_t dim = params_.head_dim;
      const int64_t rows[] = {qk_norm == 2 ? params_.num_q_heads : 1, qk_norm == 2 ? params_.num_kv_heads : 1};
      q_norm_ = Input(node, node.take("q_norm_weight", kFloat, {rows[0] * dim}));
      if (takes_keys_) k_norm_ = Input(node, node.take("k_norm_weight", kFloat, {rows[1] * dim}));
    }
    if ((has_v_norm_ = node.flag("has_v_norm"))) {
      if (!takes_keys_) node.refuse("has_v_norm", "1", "0 without values");
      v_norm_ = Input(node, node.take("v_norm_weight", kFloat, {params_.value_dim}));
    }
    turned_weights_ = static_cast<int>(node.integer("turned_weights", 0, 2));
    if (turned_weights_ > 0 && params_.rotary_dim == 0) {
      node.refuse("turned_weights", std::to_string(turned_weights_), "0 where queries do not turn");
    }
    if (turned_weights_ > 0) q_turned_ = Input(node, node.take("q_turned_weight", kFloat, {params_.head_dim}));
    if (turned_weights_ > 1) k_turned_ = Input(node, node.take("k_turned_weight", kFloat, {params_.head_dim}));
  }

  // [B, Hq, T, 1 or Dv]; of packed tokens, which then are one a stream, the same numbers.
  void takeGate(Node& node) {
    const size_t index = node.take("gate");
    const Tensor& gate = node.input(index);
    if (gate.shape.size() == 4) params_.gate_dim = static_cast<int>(gate.shape[3]);
    const std::vector<int64_t> wanted = {params_.batch, params_.num_q_heads, params_.num_tokens, params_.gate_dim};
    if (gate.type != kFloat || gate.shape != wanted) node.refuse("gate", shown(gate.shape), "[B, Hq, T, 1 or Dv]");
    if (params_.tokens_first && params_.num_tokens > 1) node.refuse("gate", "packed tokens", "one token a stream");
    gate_ = Input(node, index);
  }

  // Sinks and a window of one type have the same rows.
  size_t rowsHandedOut() const { return params_.window_type == cpu::WindowType::kFloat32 ? 2 : states_.size(); }

  Tensor newRows(size_t place) const {
    Tensor rows = states_[place].tensor;
    rows.shape[2] = params_.num_tokens;
    return rows;
  }

  void handOut(Run& run, cpu::SinkAttentionParams& params) const {
    void* rows[6] = {};
    for (size_t i = 0; i < rowsHandedOut(); ++i) rows[i] = run.output(1 + i, newRows(i).shape);
    size_t next = 0;
    params.new_k = rows[next++];
    params.new_v = rows[next++];
    if (params.window_type == cpu::WindowType::kInt8) {
      params.new_k_scale = static_cast<uint16_t*>(rows[next++]);
      params.new_v_scale = static_cast<uint16_t*>(rows[next++]);
    }
    params.new_sink_k = static_cast<float*>(rows[next++]);
    params.new_sink_v = static_cast<float*>(rows[next++]);
  }

  // The kernel takes a pointer to what it could write, and does not.
  void* readOnly(const Run& run, size_t place) const { return const_cast<void*>(run.input(states_[place].index)); }

  void* inPlace(const Run& run, size_t place) const {
    const State& state = states_[place];
    const void* before = run.input(state.index);
    void* after = run.output(1 + place, state.tensor.shape);
    if (after != before) {
      std::memcpy(after, before, static_cast<size_t>(state.tensor.elements()) * bytesOf(state.tensor.type));
    }
    return after;
  }

  cpu::SinkAttentionFunction run_;
  cpu::SinkAttentionParams params_;  // without pointers
  std::vector<int64_t> out_shape_;
  std::vector<State> states_;
  Input q_, k_, v_, position_, frequency_, num_valid_, alibi_, sink_logit_, sink_scale_, gate_;
  Input q_norm_, k_norm_, v_norm_, q_turned_, k_turned_;
  size_t window_ = 0;  // index of the first state
  bool takes_keys_ = true, has_num_valid_ = false, has_alibi_ = false, has_sink_logit_ = false, has_sink_scale_ = false;
  bool has_qk_norm_ = false, has_v_norm_ = false, hands_out_ = false;
  int turned_weights_ = 0;
};

}  // namespace

std::unique_ptr<Kernel> createSinkAttention(Node& node, const Library& library) {
  return std::make_unique<SinkAttention>(node, library);
}

}  // namespace sinkexport::ort
