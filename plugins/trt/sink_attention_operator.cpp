// Inputs: q, k, v or, in a step, all of them as one, [B, 1, (Hq + 2 Hkv) * D]; position, window_k, window_v; then,
// where a field says so, window_k_scale, window_v_scale, sink_k, sink_v, frequency, num_valid, alibi_slopes,
// sink_logit, sink_scale, gate. Outputs: out as q, or [B, 1, Hq * D]; window_k, window_v, then window_k_scale,
// window_v_scale, sink_k, sink_v.
#include "operator.h"
#include "sink_attention.h"

namespace sinkexport::trt {
namespace {

enum Input { kQ, kK, kV };

class SinkAttention final : public KernelOperator<SinkAttentionParams, sinkAttentionProblem, launchSinkAttention> {
  using KernelOperator::params;

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<SinkAttention>(*this); }

  FieldList fields() override {
    return {{"scale", &scale_},
            {"softcap", &softcap_},
            {"rope_scaling", &rope_scaling_},
            {"packed_width", &packed_width_},
            {"rotary_dim", &rotary_dim_},
            {"interleaved", &interleaved_},
            {"num_sinks", &num_sinks_},
            {"int8_window", &int8_window_},
            {"has_num_valid", &has_num_valid_},
            {"has_alibi", &has_alibi_},
            {"has_sink_logit", &has_sink_logit_},
            {"has_sink_scale", &has_sink_scale_},
            {"has_gate", &has_gate_}};
  }

  std::string fieldProblem() const override {
    const struct {
      const char* name;
      int32_t value;
    } flags[] = {
        {"interleaved", interleaved_}, {"int8_window", int8_window_},       {"has_num_valid", has_num_valid_},
        {"has_alibi", has_alibi_},     {"has_sink_logit", has_sink_logit_}, {"has_sink_scale", has_sink_scale_},
        {"has_gate", has_gate_}};
    std::string found;
    for (const auto& flag : flags) {
      if (found.empty()) found = flagProblem(flag.name, flag.value);
    }
    if (found.empty()) found = leastProblem("packed_width", packed_width_, 0);
    if (found.empty()) found = leastProblem("num_sinks", num_sinks_, 0);
    if (!found.empty()) return found;
    if (rotary_dim_ < 0 || rotary_dim_ % 2 != 0) {
      return "field 'rotary_dim': received " + std::to_string(rotary_dim_) + ", expected an even number >= 0";
    }
    if (!(scale_ > 0.0f)) return "field 'scale': received " + std::to_string(scale_) + ", expected > 0";
    if (!(softcap_ >= 0.0f)) return "field 'softcap': received " + std::to_string(softcap_) + ", expected >= 0";
    return "";
  }

  int numInputs() const override { return gateAt() + has_gate_; }
  int numOutputs() const override { return 1 + numStates(); }
  int likeInput(int index) const override { return index == 0 ? kQ : aliasedInput(index); }
  int lastAxis(int index) const override { return index == 0 ? packed_width_ : 0; }
  int aliasedInput(int index) const override { return index == 0 ? -1 : windowAt() + index - 1; }  // states in order

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    using nvinfer1::DataType;
    if (index == kQ) return isHalf(type);
    if (index >= gateAt()) return type == before[kQ].type;
    if (index >= alibiAt()) return type == DataType::kFLOAT;
    if (index == positionAt() || index >= frequencyAt()) return type == DataType::kINT32;
    if (index == windowAt() || index == windowAt() + 1) {
      return int8_window_ ? type == DataType::kINT8 : type == before[kQ].type;
    }
    if (index >= scalesAt() && index < sinksAt()) return type == DataType::kHALF;
    return type == before[kQ].type;
  }

  size_t workspaceBytes(const Tensors& inputs) const override { return sinkAttentionWorkspaceBytes(params(inputs)); }

 private:
  std::string misfit(const Tensors& inputs) const override {
    if (inputs[kQ].dims.nbDims != (packed_width_ > 0 ? 3 : 4) || inputs[windowAt()].dims.nbDims != 4) {
      return "q, window_k: received other ranks, expected [B, heads, tokens, D] or, of q, [B, 1, N]";
    }
    const SinkAttentionParams p = params(inputs);
    const std::vector<int64_t> chunk = {p.batch, p.num_kv_heads, p.num_tokens, p.head_dim};
    const std::vector<int64_t> window = {p.batch, p.num_kv_heads, p.window_size, p.head_dim};
    const std::vector<int64_t> sinks = {p.batch, p.num_kv_heads, p.num_sinks, p.head_dim};
    const std::vector<int64_t> scales = {p.batch, p.num_kv_heads, p.window_size};
    std::string found;
    const auto check = [&](const char* name, int index, const std::vector<int64_t>& wanted) {
      if (found.empty()) found = shapeProblem(name, inputs[index], wanted);
    };
    if (packed_width_ > 0) {
      if (packed_width_ % p.head_dim != 0) return "field 'packed_width': expected a multiple of the heads' size";
      check("q, k, v", kQ, {p.batch, 1, int64_t{p.stream_rows} * p.head_dim});
    } else {
      check("q", kQ, {p.batch, p.num_q_heads, p.num_tokens, p.head_dim});
      check("k", kK, chunk);
      check("v", kV, chunk);
    }
    check("position", positionAt(), {p.batch, 2});
    check("window_k", windowAt(), window);
    check("window_v", windowAt() + 1, window);
    if (int8_window_) {
      check("window_k_scale", scalesAt(), scales);
      check("window_v_scale", scalesAt() + 1, scales);
    }
    if (num_sinks_ > 0) {
      check("sink_k", sinksAt(), sinks);
      check("sink_v", sinksAt() + 1, sinks);
    }
    if (rotary_dim_ > 0) check("frequency", frequencyAt(), {rotary_dim_ / 2});
    if (has_num_valid_) check("num_valid", numValidAt(), {p.batch});
    if (has_alibi_) check("alibi_slopes", alibiAt(), {p.num_q_heads});
    if (has_sink_logit_) check("sink_logit", sinkLogitAt(), {p.num_q_heads});
    if (has_sink_scale_) check("sink_scale", sinkScaleAt(), {p.num_q_heads});
    if (has_gate_) check("gate", gateAt(), {p.batch, p.num_q_heads, p.num_tokens, p.gate_dim});
    return found;
  }

  // Where an optional input is, or would be. Flags are 0 or 1.
  int positionAt() const { return packed_width_ > 0 ? 1 : 3; }
  int windowAt() const { return positionAt() + 1; }
  int scalesAt() const { return windowAt() + 2; }
  int sinksAt() const { return scalesAt() + 2 * int8_window_; }
  int frequencyAt() const { return sinksAt() + (num_sinks_ > 0 ? 2 : 0); }
  int numValidAt() const { return frequencyAt() + (rotary_dim_ > 0 ? 1 : 0); }
  int alibiAt() const { return numValidAt() + has_num_valid_; }
  int sinkLogitAt() const { return alibiAt() + has_alibi_; }
  int sinkScaleAt() const { return sinkLogitAt() + has_sink_logit_; }
  int gateAt() const { return sinkScaleAt() + has_sink_scale_; }
  int numStates() const { return frequencyAt() - windowAt(); }

  SinkAttentionParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    SinkAttentionParams p;
    setShapes(p, inputs);
    p.q = in[kQ];
    if (packed_width_ > 0) {
      constexpr size_t kHalfBytes = 2;
      p.k = static_cast<const char*>(p.q) + kHalfBytes * packed_width_;
      p.v = static_cast<const char*>(p.k) + kHalfBytes * p.num_kv_heads * p.head_dim;
    } else {
      p.k = in[kK], p.v = in[kV];
    }
    p.position = static_cast<const int32_t*>(in[positionAt()]);
    p.out = out[0], p.window_k = out[1], p.window_v = out[2];
    int next = 3;
    if (int8_window_) p.window_k_scale = out[next], p.window_v_scale = out[next + 1], next += 2;
    if (num_sinks_ > 0) p.sink_k = out[next], p.sink_v = out[next + 1];
    if (rotary_dim_ > 0) p.frequency = static_cast<const uint32_t*>(in[frequencyAt()]);
    if (has_num_valid_) p.num_valid = static_cast<const int32_t*>(in[numValidAt()]);
    if (has_alibi_) p.alibi_slopes = static_cast<const float*>(in[alibiAt()]);
    if (has_sink_logit_) p.sink_logit = static_cast<const float*>(in[sinkLogitAt()]);
    if (has_sink_scale_) p.sink_scale = static_cast<const float*>(in[sinkScaleAt()]);
    if (has_gate_) p.gate = in[gateAt()];
    p.rope_scaling = rope_scaling_;
    p.rotary_dim = rotary_dim_;
    p.interleaved = interleaved_ != 0;
    p.scale = scale_;
    p.softcap = softcap_;
    return p;
  }

  void setShapes(SinkAttentionParams& p, const Tensors& inputs) const {
    const nvinfer1::Dims &q = inputs[kQ].dims, &window = inputs[windowAt()].dims;  // [B, Hkv, W, D]
    p.batch = static_cast<int>(q.d[0]);
    p.num_kv_heads = static_cast<int>(window.d[1]);
    p.window_size = static_cast<int>(window.d[2]);
    p.head_dim = static_cast<int>(window.d[3]);
    if (packed_width_ > 0) {
      p.num_tokens = 1;
      p.num_q_heads = p.head_dim > 0 ? packed_width_ / p.head_dim : 0;
      p.stream_rows = p.num_q_heads + 2 * p.num_kv_heads;
    } else {
      p.num_q_heads = static_cast<int>(q.d[1]);
      p.num_tokens = static_cast<int>(q.d[2]);
    }
    p.num_sinks = num_sinks_;
    p.dtype = halfType(inputs[kQ].type);
    p.int8_window = int8_window_ != 0;
    p.settled_states = true;  // one node has them; between its runs lies the copy of the engine's inputs
    if (has_gate_) {
      const nvinfer1::Dims& gate = inputs[gateAt()].dims;
      p.gate_dim = gate.nbDims > 0 ? static_cast<int>(gate.d[gate.nbDims - 1]) : 0;
    }
  }

  float scale_ = 0.0f, softcap_ = 0.0f, rope_scaling_ = 1.0f;
  int32_t packed_width_ = 0, rotary_dim_ = 0, interleaved_ = 0, num_sinks_ = 0, int8_window_ = 0, has_num_valid_ = 0;
  int32_t has_alibi_ = 0, has_sink_logit_ = 0, has_sink_scale_ = 0, has_gate_ = 0;
};

}  // namespace

std::unique_ptr<Operator> makeSinkAttention() {
  return std::make_unique<SinkAttention>();
}

}  // namespace sinkexport::trt
