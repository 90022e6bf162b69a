// Int8Linear. Inputs: x, weight, scale, and norm weight, bias and residual where fields say so. Output: y.
// HalfLinear. The same without scale; weight is of x's type.
// Int4Linear. Inputs: x, weight, scale, zero points where a field says so, and the same.
// norm: 0 none, 1 with a weight of x's type, 2 of float32. gate: 0 none, else the activation's number + 1; the weight's
// rows, num_outputs of them, are then gate | up.
#include "int4_weight.h"
#include "linear.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

template <WeightType kWeightType>
class Linear final : public KernelOperator<LinearParams, linearProblem, launchLinear> {
  using KernelOperator::params;
  static constexpr bool kIsInt8 = kWeightType == WeightType::kInt8, kIsInt4 = kWeightType == WeightType::kInt4;
  enum Input { kX, kWeight, kScale };  // kScale: of integer weights

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<Linear>(*this); }

  FieldList fields() override {
    FieldList list = {{"num_outputs", &num_outputs_},   {"has_bias", &has_bias_},         {"norm", &norm_},
                      {"norm_epsilon", &norm_epsilon_}, {"has_residual", &has_residual_}, {"gate", &gate_}};
    if (kIsInt4) int4_.addFields(list);
    return list;
  }

  std::string fieldProblem() const override {
    constexpr int32_t kMostGate = static_cast<int32_t>(Activation::kGeluTanh) + 1;
    std::string problem = leastProblem("num_outputs", num_outputs_, 1);
    if (problem.empty()) problem = flagProblem("has_bias", has_bias_);
    if (problem.empty()) problem = flagProblem("has_residual", has_residual_);
    if (problem.empty() && (norm_ < 0 || norm_ > kFloatNorm)) {
      problem = "field 'norm': received " + std::to_string(norm_) + ", expected 0 (none), 1 (half) or 2 (float32)";
    }
    if (problem.empty() && (norm_ != 0) != (norm_epsilon_ > 0.0f)) {
      problem =
          "field 'norm_epsilon': received " + std::to_string(norm_epsilon_) + ", expected > 0 with a norm, else 0";
    }
    if (problem.empty() && (gate_ < 0 || gate_ > kMostGate)) {
      problem = "field 'gate': received " + std::to_string(gate_) +
                ", expected 0 (none), 1 (silu), 2 (gelu) or 3 (gelu by tanh)";
    }
    return problem.empty() && kIsInt4 ? int4_.fieldProblem() : problem;
  }

  int numInputs() const override { return residual() + has_residual_; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kX; }
  int lastAxis(int /*index*/) const override { return gate_ ? num_outputs_ / 2 : num_outputs_; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    using nvinfer1::DataType;
    if (index == kX) return isHalf(type);
    if (norm_ == kFloatNorm && index == normWeight()) return type == DataType::kFLOAT;
    if (kIsInt4 && index < normWeight()) return type == int4_.typeOf(index - kWeight);
    if (kIsInt8 && index == kWeight) return type == DataType::kINT32;
    if (kIsInt8 && index == kScale) return type == DataType::kFLOAT;
    return type == before[kX].type;
  }

  size_t workspaceBytes(const Tensors& inputs) const override { return linearWorkspaceBytes(params(inputs)); }

 private:
  static constexpr int32_t kFloatNorm = 2;

  // Inputs that may follow the weights, in their order.
  int normWeight() const { return kIsInt4 ? kWeight + int4_.numInputs() : kIsInt8 ? kScale + 1 : kScale; }
  int bias() const { return normWeight() + (norm_ != 0); }
  int residual() const { return bias() + has_bias_; }

  std::string misfit(const Tensors& inputs) const override {
    if (inputs[kX].dims.nbDims < 1) return "x: received a scalar, expected [.., K]";
    const LinearParams p = params(inputs);
    std::string found;
    if (kIsInt4) {
      found = int4_.misfit(inputs, kWeight, {}, p.num_outputs, p.num_inputs);
    } else {
      found = shapeProblem("weight", inputs[kWeight], {p.num_outputs, p.num_inputs / (kIsInt8 ? 4 : 1)});
      if (found.empty() && kIsInt8) found = shapeProblem("scale", inputs[kScale], {p.num_outputs});
    }
    if (found.empty() && norm_) found = shapeProblem("norm_weight", inputs[normWeight()], {p.num_inputs});
    if (found.empty() && has_bias_) found = shapeProblem("bias", inputs[bias()], {p.num_outputs});
    if (found.empty() && has_residual_) {
      std::vector<int64_t> wanted(inputs[kX].dims.d, inputs[kX].dims.d + inputs[kX].dims.nbDims);
      wanted.back() = num_outputs_;
      found = shapeProblem("residual", inputs[residual()], wanted);
    }
    return found;
  }

  LinearParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    const nvinfer1::Dims& x = inputs[kX].dims;
    LinearParams p;
    p.num_rows = numRows(x);
    p.num_inputs = static_cast<int>(x.d[x.nbDims - 1]);
    p.num_outputs = num_outputs_;
    p.dtype = halfType(inputs[kX].type);
    p.weight_type = kWeightType;
    p.x = in[kX];
    p.weight = in[kWeight];
    if (kIsInt8) p.scale = static_cast<const float*>(in[kScale]);
    if (kIsInt4) int4_.set(p, in + kWeight);
    p.norm_weight = norm_ ? in[normWeight()] : nullptr;
    p.float_norm_weight = norm_ == kFloatNorm;
    p.norm_epsilon = norm_epsilon_;
    p.bias = has_bias_ ? in[bias()] : nullptr;
    p.residual = has_residual_ ? in[residual()] : nullptr;
    p.is_gated = gate_ != 0;
    if (gate_) p.activation = static_cast<Activation>(gate_ - 1);
    p.y = out[0];
    p.constant_weight = true;  // of the engine, as norms' weights, scales and biases are
    return p;
  }

  int32_t num_outputs_ = 0, has_bias_ = 0, norm_ = 0, has_residual_ = 0, gate_ = 0;
  float norm_epsilon_ = 0.0f;
  Int4Weight int4_;
};

}  // namespace

std::unique_ptr<Operator> makeInt8Linear() {
  return std::make_unique<Linear<WeightType::kInt8>>();
}
std::unique_ptr<Operator> makeInt4Linear() {
  return std::make_unique<Linear<WeightType::kInt4>>();
}
std::unique_ptr<Operator> makeHalfLinear() {
  return std::make_unique<Linear<WeightType::kHalf>>();
}

}  // namespace sinkexport::trt
