// Int8Linear. Inputs: x, weight, scale, and bias where a field says so. Output: y.
// HalfLinear. The same without scale; weight is of x's type.
#include "linear.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

template <WeightType kWeightType>
class Linear final : public KernelOperator<LinearParams, linearProblem, launchLinear> {
  using KernelOperator::params;
  static constexpr bool kIsInt8 = kWeightType == WeightType::kInt8;
  enum Input { kX, kWeight, kScale, kBias = kIsInt8 ? 3 : 2 };  // kScale: of Int8Linear

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<Linear>(*this); }

  FieldList fields() override { return {{"num_outputs", &num_outputs_}, {"has_bias", &has_bias_}}; }

  std::string fieldProblem() const override {
    const std::string problem = leastProblem("num_outputs", num_outputs_, 1);
    return problem.empty() ? flagProblem("has_bias", has_bias_) : problem;
  }

  int numInputs() const override { return kBias + has_bias_; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kX; }
  int lastAxis(int /*index*/) const override { return num_outputs_; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    using nvinfer1::DataType;
    if (index == kX) return isHalf(type);
    if (kIsInt8 && index == kWeight) return type == DataType::kINT32;
    if (kIsInt8 && index == kScale) return type == DataType::kFLOAT;
    return type == before[kX].type;
  }

  size_t workspaceBytes(const Tensors& inputs) const override { return linearWorkspaceBytes(params(inputs)); }

 private:
  std::string misfit(const Tensors& inputs) const override {
    if (inputs[kX].dims.nbDims < 1) return "x: received a scalar, expected [.., K]";
    const LinearParams p = params(inputs);
    std::string found = shapeProblem("weight", inputs[kWeight], {p.num_outputs, p.num_inputs / (kIsInt8 ? 4 : 1)});
    if (found.empty() && kIsInt8) found = shapeProblem("scale", inputs[kScale], {p.num_outputs});
    if (found.empty() && has_bias_) found = shapeProblem("bias", inputs[kBias], {p.num_outputs});
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
    p.scale = kIsInt8 ? static_cast<const float*>(in[kScale]) : nullptr;
    p.bias = has_bias_ ? in[kBias] : nullptr;
    p.y = out[0];
    p.constant_weight = true;  // of the engine
    return p;
  }

  int32_t num_outputs_ = 0, has_bias_ = 0;
};

}  // namespace

std::unique_ptr<Operator> makeInt8Linear() {
  return std::make_unique<Linear<WeightType::kInt8>>();
}
std::unique_ptr<Operator> makeHalfLinear() {
  return std::make_unique<Linear<WeightType::kHalf>>();
}

}  // namespace sinkexport::trt
