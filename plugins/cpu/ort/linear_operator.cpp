// FloatLinear, Bf16Linear, Int8Linear, Int4Linear:
// y = output_norm(activation(norm(x) . W^T + bias) * multiplier) + residual.
#include "valid_rows.h"
#include "weights.h"

namespace sinkexport::ort {
namespace {

class Linear final : public Kernel {
 public:
  Linear(Node& node, const Library& library, cpu::WeightType type) : run_(cpu::linearFor(library.isa)) {
    const int64_t inputs = node.size("in_features", 1), outputs = node.size("out_features", 1);
    params_.num_inputs = inputs;
    params_.num_outputs = outputs;
    params_.is_gated = node.flag("gated");
    params_.activation = static_cast<cpu::Activation>(node.choice("activation", kActivations));
    params_.activation_limit = node.number("activation_limit");
    params_.norm_epsilon = node.number("norm_epsilon");
    params_.multiplier = node.number("multiplier");
    params_.output_norm_epsilon = node.number("output_norm_epsilon");
    const size_t x = node.take("x");
    shape_ = node.input(x).shape;
    if (node.input(x).type != kFloat || shape_.empty() || shape_.back() != inputs) {
      node.refuse("x", shown(shape_), "float32 [.., in_features]");
    }
    params_.num_rows = node.input(x).elements() / inputs;
    shape_.back() = outputs;
    x_ = Input(node, x);
    const int64_t rows = params_.is_gated ? 2 * outputs : outputs;
    weights_ = std::make_unique<Weights>(node, type, inputs, rows, 0, params_.is_gated);
    weights_->setTypes(params_);
    const int64_t norm = node.integer("norm", 0, 2);  // 1: RMS norm, 2: layer norm
    params_.is_layer_norm = norm == 2;
    if ((has_norm_ = norm > 0)) norm_ = Input(node, node.take("norm_weight", kFloat, {inputs}));
    if ((has_norm_bias_ = node.flag("has_norm_bias"))) {
      if (!params_.is_layer_norm) node.refuse("has_norm_bias", "1", "0 without a layer norm");
      norm_bias_ = Input(node, node.take("norm_bias", kFloat, {inputs}));
    }
    if ((has_bias_ = node.flag("has_bias"))) bias_ = Input(node, node.take("bias", kFloat, {rows}));
    if ((has_output_norm_ = node.flag("output_norm"))) {
      output_norm_ = Input(node, node.take("output_norm_weight", kFloat, {outputs}));
    }
    if ((has_residual_ = node.flag("has_residual"))) residual_ = Input(node, node.take("residual", kFloat, shape_));
    valid_rows_ = ValidRows(node, params_.num_rows);
    node.finish({{kFloat, shape_}});
    node.refuseIf(cpu::linearProblem(params_, true));
  }

  void compute(Run& run) const override {
    cpu::LinearParams params = params_;
    params.x = x_.of<float>(run);
    weights_->setPointers(params, run);
    if (has_norm_) params.norm_weight = norm_.of<float>(run);
    if (has_norm_bias_) params.norm_bias = norm_bias_.of<float>(run);
    if (has_output_norm_) params.output_norm_weight = output_norm_.of<float>(run);
    if (has_bias_) params.bias = bias_.of<float>(run);
    if (has_residual_) params.residual = residual_.of<float>(run);
    params.y = static_cast<float*>(run.output(0, shape_));
    params.num_rows = valid_rows_.of(run, params_.num_rows);
    if (!run.reads().isKnown()) cpu::linearReads(params, run.parallel().threads, run.reads());
    run_(params, run.parallel(), run.scratch());
    valid_rows_.fill(params.y, params.num_rows, params_.num_rows, params_.num_outputs, run.parallel());
  }

 private:
  cpu::LinearFunction run_;
  cpu::LinearParams params_;  // without pointers
  std::vector<int64_t> shape_;
  std::unique_ptr<Weights> weights_;
  ValidRows valid_rows_;
  Input x_, norm_, norm_bias_, bias_, output_norm_, residual_;
  bool has_norm_ = false, has_norm_bias_ = false, has_bias_ = false, has_output_norm_ = false, has_residual_ = false;
};

}  // namespace

std::unique_ptr<Kernel> createFloatLinear(Node& node, const Library& library) {
  return std::make_unique<Linear>(node, library, cpu::WeightType::kFloat32);
}
std::unique_ptr<Kernel> createBf16Linear(Node& node, const Library& library) {
  return std::make_unique<Linear>(node, library, cpu::WeightType::kBFloat16);
}
std::unique_ptr<Kernel> createInt8Linear(Node& node, const Library& library) {
  return std::make_unique<Linear>(node, library, cpu::WeightType::kInt8);
}
std::unique_ptr<Kernel> createInt4Linear(Node& node, const Library& library) {
  return std::make_unique<Linear>(node, library, cpu::WeightType::kInt4);
}

}  // namespace sinkexport::ort
