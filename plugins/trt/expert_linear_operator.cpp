// Int8ExpertLinear. Inputs: x, weight, scale, picks. Output: y.
// HalfExpertLinear. The same without scale; weight is of x's type.
// Int4ExpertLinear. Inputs: x, weight, scale, zero points where a field says so, picks.
#include "expert_linear.h"
#include "int4_weight.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

std::string axesProblem(const char* name, const Tensor& tensor, const char* expected) {
  return std::string(name) + ": received " + std::to_string(tensor.dims.nbDims) + " axes, expected " + expected;
}

template <WeightType kWeightType>
class ExpertLinear final : public KernelOperator<ExpertLinearParams, expertLinearProblem, launchExpertLinear> {
  using KernelOperator::params;
  static constexpr bool kIsInt8 = kWeightType == WeightType::kInt8, kIsInt4 = kWeightType == WeightType::kInt4;
  enum Input { kX, kWeight, kScale };  // kScale: of integer weights

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<ExpertLinear>(*this); }

  FieldList fields() override {
    FieldList list = {{"num_outputs", &num_outputs_}};
    if (kIsInt4) int4_.addFields(list);
    return list;
  }

  std::string fieldProblem() const override {
    const std::string problem = leastProblem("num_outputs", num_outputs_, 1);
    return problem.empty() && kIsInt4 ? int4_.fieldProblem() : problem;
  }

  int numInputs() const override { return picks() + 1; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return picks(); }
  int appendedAxis(int /*index*/) const override { return num_outputs_; }
  nvinfer1::DataType outputType(int, const nvinfer1::DataType* inputs) const override { return inputs[kX]; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    using nvinfer1::DataType;
    if (index == kX) return isHalf(type);
    if (index == picks() || (kIsInt8 && index == kWeight)) return type == DataType::kINT32;
    if (kIsInt4) return type == int4_.typeOf(index - kWeight);
    return type == (kIsInt8 ? DataType::kFLOAT : before[kX].type);
  }

 private:
  int picks() const { return kIsInt4 ? kWeight + int4_.numInputs() : kIsInt8 ? kScale + 1 : kScale; }

  std::string misfit(const Tensors& inputs) const override {
    if (inputs[kX].dims.nbDims != 2) return axesProblem("x", inputs[kX], "[R, K]");
    if (inputs[picks()].dims.nbDims != 1) return axesProblem("picks", inputs[picks()], "[P]");
    const ExpertLinearParams p = params(inputs);
    if (kIsInt4) return int4_.misfit(inputs, kWeight, {p.num_experts}, p.num_outputs, p.num_inputs);
    const std::string found =
        shapeProblem("weight", inputs[kWeight], {p.num_experts, p.num_outputs, p.num_inputs / (kIsInt8 ? 4 : 1)});
    if (!found.empty() || !kIsInt8) return found;
    return shapeProblem("scale", inputs[kScale], {p.num_experts, p.num_outputs});
  }

  ExpertLinearParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    ExpertLinearParams p;
    const auto axis = [&](int input, int i) { return static_cast<int>(inputs[input].dims.d[i]); };
    p.num_experts = inputs[kWeight].dims.nbDims > 0 ? axis(kWeight, 0) : 0;
    p.num_picks = axis(picks(), 0);
    p.num_rows = axis(kX, 0);
    p.num_inputs = axis(kX, 1);
    p.num_outputs = num_outputs_;
    p.dtype = halfType(inputs[kX].type);
    p.weight_type = kWeightType;
    p.picks = static_cast<const int32_t*>(in[picks()]);
    p.x = in[kX];
    p.weight = in[kWeight];
    if (kIsInt8) p.scale = static_cast<const float*>(in[kScale]);
    if (kIsInt4) int4_.set(p, in + kWeight);
    p.y = out[0];
    return p;
  }

  int32_t num_outputs_ = 0;
  Int4Weight int4_;
};

}  // namespace

std::unique_ptr<Operator> makeInt8ExpertLinear() {
  return std::make_unique<ExpertLinear<WeightType::kInt8>>();
}
std::unique_ptr<Operator> makeInt4ExpertLinear() {
  return std::make_unique<ExpertLinear<WeightType::kInt4>>();
}
std::unique_ptr<Operator> makeHalfExpertLinear() {
  return std::make_unique<ExpertLinear<WeightType::kHalf>>();
}

}  // namespace sinkexport::trt
