// Inputs: x, weight, and residual where a field says so. Outputs: y, and x + residual where there is one.
#include "operator.h"
#include "rms_norm.h"

namespace sinkexport::trt {
namespace {

enum Input { kX, kWeight, kResidual };

class RmsNorm final : public KernelOperator<RmsNormParams, rmsNormProblem, launchRmsNorm> {
 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<RmsNorm>(*this); }

  FieldList fields() override {
    return {{"epsilon", &epsilon_}, {"has_residual", &has_residual_}, {"float_weight", &float_weight_}};
  }

  std::string fieldProblem() const override {
    if (!(epsilon_ > 0.0f)) return "field 'epsilon': received " + std::to_string(epsilon_) + ", expected > 0";
    const std::string problem = flagProblem("has_residual", has_residual_);
    return problem.empty() ? flagProblem("float_weight", float_weight_) : problem;
  }

  int numInputs() const override { return has_residual_ ? 3 : 2; }
  int numOutputs() const override { return has_residual_ ? 2 : 1; }
  int likeInput(int /*index*/) const override { return kX; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors& before) const override {
    if (index == kX) return isHalf(type);
    if (index == kWeight && float_weight_) return type == nvinfer1::DataType::kFLOAT;
    return type == before[kX].type;
  }

 private:
  std::string misfit(const Tensors& inputs) const override {
    const nvinfer1::Dims& x = inputs[kX].dims;
    if (x.nbDims < 1) return "x: received a scalar, expected [.., K]";
    const std::string found = shapeProblem("weight", inputs[kWeight], {x.d[x.nbDims - 1]});
    if (!found.empty() || !has_residual_) return found;
    return shapeProblem("residual", inputs[kResidual], {x.d, x.d + x.nbDims});
  }

  RmsNormParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    RmsNormParams p;
    p.num_rows = numRows(inputs[kX].dims);
    p.row_length = static_cast<int>(inputs[kX].dims.d[inputs[kX].dims.nbDims - 1]);
    p.dtype = halfType(inputs[kX].type);
    p.float_weight = float_weight_ != 0;
    p.epsilon = epsilon_;
    p.x = in[kX], p.weight = in[kWeight], p.y = out[0];
    if (has_residual_) p.residual = in[kResidual], p.sum = out[1];
    return p;
  }

  float epsilon_ = 0.0f;
  int32_t has_residual_ = 0, float_weight_ = 0;
};

}  // namespace

std::unique_ptr<Operator> makeRmsNorm() {
  return std::make_unique<RmsNorm>();
}

}  // namespace sinkexport::trt
