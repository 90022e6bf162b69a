// Int8ExpertLinear. Inputs: x, weight, scale, picks. Output: y.
// HalfExpertLinear. The same without scale; weight is of x's type.
#include "expert_linear.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

std::string axesProblem(const char* name, const Tensor& tensor, const char* expected) {
  return std::string(name) + ": received " + std::to_string(tensor.dims.nbDims) + " axes, expected " + expected;
}

template <WeightType kWeightType>
class ExpertLinear final : public KernelOperator<ExpertLinearParams, expertLinearProblem, launchExpertLinear> {
  using KernelOperator::params;
  static constexpr bool kIsInt8 = kWeightType == WeightType::kInt8;
  enum Input { kX, kWeight, kScale, kPicks = kIsInt8 ? 3 : 2 };  // kScale: of Int8ExpertLinear

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<ExpertLinear>(*this); }

  FieldList fields() override { return {{"num_outputs", &num_outputs_}}; }

  std::string fieldProblem() const override { return leastProblem("num_outputs", num_outputs_, 1); }

  int numInputs() const override { return kPicks + 1; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kPicks; }
  int appendedAxis(int /*index*/) const override { return num_outputs_; }
  nvinfer1::DataType outputType(int, const nvinfer1::DataType* inputs) const override { return inputs[kX]; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    using nvinfer1::DataType;
    if (index == kX) return isHalf(type);
    if (index == kPicks || (kIsInt8 && index == kWeight)) return type == DataType::kINT32;
    return type == (kIsInt8 ? DataType::kFLOAT : before[kX].type);
  }

 private:
  std::string misfit(const Tensors& inputs) const override {
    if (inputs[kX].dims.nbDims != 2) return axesProblem("x", inputs[kX], "[R, K]");
    if (inputs[kPicks].dims.nbDims != 1) return axesProblem("picks", inputs[kPicks], "[P]");
    const ExpertLinearParams p = params(inputs);
    const std::string found =
        shapeProblem("weight", inputs[kWeight], {p.num_experts, p.num_outputs, p.num_inputs / (kIsInt8 ? 4 : 1)});
    if (!found.empty() || !kIsInt8) return found;
    return shapeProblem("scale", inputs[kScale], {p.num_experts, p.num_outputs});
  }

  ExpertLinearParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    ExpertLinearParams p;
    const auto axis = [&](int input, int i) { return static_cast<int>(inputs[input].dims.d[i]); };
    p.num_experts = inputs[kWeight].dims.nbDims > 0 ? axis(kWeight, 0) : 0;
    p.num_picks = axis(kPicks, 0);
    p.num_rows = axis(kX, 0);
    p.num_inputs = axis(kX, 1);
    p.num_outputs = num_outputs_;
    p.dtype = halfType(inputs[kX].type);
    p.weight_type = kWeightType;
    p.picks = static_cast<const int32_t*>(in[kPicks]);
    p.x = in[kX];
    p.weight = in[kWeight];
    p.scale = kIsInt8 ? static_cast<const float*>(in[kScale]) : nullptr;
    p.y = out[0];
    return p;
  }

  int32_t num_outputs_ = 0;
};

}  // namespace

std::unique_ptr<Operator> makeInt8ExpertLinear() {
  return std::make_unique<ExpertLinear<WeightType::kInt8>>();
}
std::unique_ptr<Operator> makeHalfExpertLinear() {
  return std::make_unique<ExpertLinear<WeightType::kHalf>>();
}

}  // namespace sinkexport::trt
