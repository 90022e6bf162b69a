// Int8Linear. Inputs: x, weight, scale, and bias where a field says so. Output: y.
// HalfLinear. The same without scale; weight is of x's type.
#include "linear.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

template <WeightType kWeightType>
class Linear final : public Operator {
  static constexpr bool kIsInt8 = kWeightType == WeightType::kInt8;
  enum Input { kX, kWeight, kScale, kBias = kIsInt8 ? 3 : 2 };  // kScale: of Int8Linear

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<Linear>(*this); }

  FieldList fields() override { return {{"num_outputs", &num_outputs_}, {"has_bias", &has_bias_}}; }

  std::string fieldProblem() const override {
    if (num_outputs_ < 1) return "field 'num_outputs': received " + std::to_string(num_outputs_) + ", expected >= 1";
    return flagProblem("has_bias", has_bias_);
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

  std::string problem(const Tensors& inputs) const override {
    if (inputs[kX].dims.nbDims < 1) return "x: received a scalar, expected [.., K]";
    const LinearParams p = params(inputs);
    std::string found = shapeProblem("weight", inputs[kWeight], {p.num_outputs, p.num_inputs / (kIsInt8 ? 4 : 1)});
    if (found.empty() && kIsInt8) found = shapeProblem("scale", inputs[kScale], {p.num_outputs});
    if (found.empty() && has_bias_) found = shapeProblem("bias", inputs[kBias], {p.num_outputs});
    if (!found.empty()) return found;
    const char* refused = linearProblem(p);
    return refused != nullptr ? refused : "";
  }

  size_t workspaceBytes(const Tensors& inputs) const override { return linearWorkspaceBytes(params(inputs)); }

  cudaError_t enqueue(const Tensors& inputs, const void* const* in, void* const* out, void* workspace,
                      cudaStream_t stream) const override {
    LinearParams p = params(inputs);
    p.x = in[kX];
    p.weight = in[kWeight];
    p.scale = kIsInt8 ? static_cast<const float*>(in[kScale]) : nullptr;
    p.bias = has_bias_ ? in[kBias] : nullptr;
    p.y = out[0];
    p.constant_weight = true;  // of the engine
    return launchLinear(p, workspace, stream);
  }

 private:
  // With addresses that lie far apart instead of pointers: enough for checks and sizes.
  LinearParams params(const Tensors& inputs) const {
    const nvinfer1::Dims& x = inputs[kX].dims;
    LinearParams p;
    p.num_rows = numRows(x);
    p.num_inputs = static_cast<int>(x.d[x.nbDims - 1]);
    p.num_outputs = num_outputs_;
    p.dtype = halfType(inputs[kX].type);
    p.weight_type = kWeightType;
    p.x = farApart(0);
    p.weight = farApart(1);
    p.scale = kIsInt8 ? static_cast<const float*>(farApart(2)) : nullptr;
    p.bias = has_bias_ ? farApart(3) : nullptr;
    p.y = farApart(4);
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
