// Inputs: gate and up, or one tensor whose rows are gate | up where a field says so. Output: activation(gate) * up.
#include "gated_activation.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

enum Input { kGate, kUp };

class GatedActivation final : public Operator {
 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<GatedActivation>(*this); }

  FieldList fields() override { return {{"activation", &activation_}, {"width", &width_}, {"is_merged", &is_merged_}}; }

  std::string fieldProblem() const override {
    if (activation_ < 0 || activation_ > static_cast<int32_t>(Activation::kGeluTanh)) {
      return "field 'activation': received " + std::to_string(activation_) +
             ", expected 0 (silu), 1 (gelu) or 2 (gelu by tanh)";
    }
    if (width_ < 1) return "field 'width': received " + std::to_string(width_) + ", expected >= 1";
    return flagProblem("is_merged", is_merged_);
  }

  int numInputs() const override { return is_merged_ ? 1 : 2; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kGate; }
  int lastAxis(int /*index*/) const override { return width_; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    return index == kGate ? isHalf(type) : type == before[kGate].type;
  }

  std::string problem(const Tensors& inputs) const override {
    const nvinfer1::Dims& gate = inputs[kGate].dims;
    if (gate.nbDims < 1) return "gate: received a scalar, expected [.., N]";
    std::vector<int64_t> wanted(gate.d, gate.d + gate.nbDims);
    wanted.back() = is_merged_ ? int64_t{2} * width_ : width_;
    std::string found = shapeProblem("gate", inputs[kGate], wanted);
    if (found.empty() && !is_merged_) found = shapeProblem("up", inputs[kUp], wanted);
    if (!found.empty()) return found;
    const char* refused = gatedActivationProblem(params(inputs));
    return refused != nullptr ? refused : "";
  }

  size_t workspaceBytes(const Tensors&) const override { return 0; }

  cudaError_t enqueue(const Tensors& inputs, const void* const* in, void* const* out, void*,
                      cudaStream_t stream) const override {
    GatedActivationParams p = params(inputs);
    p.gate = in[kGate];
    p.up = is_merged_ ? static_cast<const uint16_t*>(in[kGate]) + width_ : in[kUp];
    p.out = out[0];
    return launchGatedActivation(p, stream);
  }

 private:
  // With placeholders for pointers: enough for checks.
  GatedActivationParams params(const Tensors& inputs) const {
    GatedActivationParams p;
    p.num_rows = numRows(inputs[kGate].dims);
    p.width = width_;
    p.row_stride = is_merged_ ? 2 * width_ : width_;
    p.dtype = halfType(inputs[kGate].type);
    p.activation = static_cast<Activation>(activation_);
    p.gate = p.up = p.out = placeholder();
    return p;
  }

  int32_t activation_ = 0, width_ = 0, is_merged_ = 0;
};

}  // namespace

std::unique_ptr<Operator> makeGatedActivation() {
  return std::make_unique<GatedActivation>();
}

}  // namespace sinkexport::trt
