// Inputs: gate and up, or one tensor whose rows are gate | up where a field says so. Output: activation(gate) * up.
#include "gated_activation.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

enum Input { kGate, kUp };

class GatedActivation final
    : public KernelOperator<GatedActivationParams, gatedActivationProblem, launchGatedActivation> {
 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<GatedActivation>(*this); }

  FieldList fields() override { return {{"activation", &activation_}, {"width", &width_}, {"is_merged", &is_merged_}}; }

  std::string fieldProblem() const override {
    if (activation_ < 0 || activation_ > static_cast<int32_t>(Activation::kGeluTanh)) {
      return "field 'activation': received " + std::to_string(activation_) +
             ", expected 0 (silu), 1 (gelu) or 2 (gelu by tanh)";
    }
    const std::string problem = leastProblem("width", width_, 1);
    return problem.empty() ? flagProblem("is_merged", is_merged_) : problem;
  }

  int numInputs() const override { return is_merged_ ? 1 : 2; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kGate; }
  int lastAxis(int /*index*/) const override { return width_; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    return index == kGate ? isHalf(type) : type == before[kGate].type;
  }

 private:
  std::string misfit(const Tensors& inputs) const override {
    const nvinfer1::Dims& gate = inputs[kGate].dims;
    if (gate.nbDims < 1) return "gate: received a scalar, expected [.., N]";
    std::vector<int64_t> wanted(gate.d, gate.d + gate.nbDims);
    wanted.back() = is_merged_ ? int64_t{2} * width_ : width_;
    const std::string found = shapeProblem("gate", inputs[kGate], wanted);
    return found.empty() && !is_merged_ ? shapeProblem("up", inputs[kUp], wanted) : found;
  }

  GatedActivationParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    GatedActivationParams p;
    p.num_rows = numRows(inputs[kGate].dims);
    p.width = width_;
    p.row_stride = is_merged_ ? 2 * width_ : width_;
    p.dtype = halfType(inputs[kGate].type);
    p.activation = static_cast<Activation>(activation_);
    p.gate = in[kGate];
    p.up = is_merged_ ? static_cast<const uint16_t*>(in[kGate]) + width_ : in[kUp];
    p.out = out[0];
    return p;
  }

  int32_t activation_ = 0, width_ = 0, is_merged_ = 0;
};

}  // namespace

std::unique_ptr<Operator> makeGatedActivation() {
  return std::make_unique<GatedActivation>();
}

}  // namespace sinkexport::trt
