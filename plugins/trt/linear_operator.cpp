// Int8Linear. Inputs: x, weight, scale, and bias where a field says so. Output: y.
// HalfLinear. The same without scale; weight is of x's type.
// Int4Linear. Inputs: x, weight, scale, and zero points and bias where fields say so.
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
    FieldList list = {{"num_outputs", &num_outputs_}, {"has_bias", &has_bias_}};
    if (kIsInt4) int4_.addFields(list);
    return list;
  }

  std::string fieldProblem() const override {
    std::string problem = leastProblem("num_outputs", num_outputs_, 1);
    if (problem.empty()) problem = flagProblem("has_bias", has_bias_);
    return problem.empty() && kIsInt4 ? int4_.fieldProblem() : problem;
  }

  int numInputs() const override { return bias() + has_bias_; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kX; }
  int lastAxis(int /*index*/) const override { return num_outputs_; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    using nvinfer1::DataType;
    if (index == kX) return isHalf(type);
    if (kIsInt4 && index < bias()) return type == int4_.typeOf(index - kWeight);
    if (kIsInt8 && index == kWeight) return type == DataType::kINT32;
    if (kIsInt8 && index == kScale) return type == DataType::kFLOAT;
    return type == before[kX].type;
  }

  size_t workspaceBytes(const Tensors& inputs) const override { return linearWorkspaceBytes(params(inputs)); }

 private:
  int bias() const { return kIsInt4 ? kWeight + int4_.numInputs() : kIsInt8 ? kScale + 1 : kScale; }

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
    if (found.empty() && has_bias_) found = shapeProblem("bias", inputs[bias()], {p.num_outputs});
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
    p.bias = has_bias_ ? in[bias()] : nullptr;
    p.y = out[0];
    p.constant_weight = true;  // of the engine
    return p;
  }

  int32_t num_outputs_ = 0, has_bias_ = 0;
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
