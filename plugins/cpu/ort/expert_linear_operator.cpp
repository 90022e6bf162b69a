// FloatExpertLinear, Bf16ExpertLinear, Int8ExpertLinear: rows of x by matrices that are chosen at run time, read where
// they lie, or the weighted sums of what these give.
#include <numeric>

#include "valid_rows.h"
#include "weights.h"

namespace sinkexport::ort {
namespace {

class ExpertLinear final : public Kernel {
 public:
  ExpertLinear(Node& node, const Library& library, cpu::WeightType type) : run_(cpu::linearFor(library.isa)) {
    params_.num_inputs = node.size("in_features", 1);
    params_.num_outputs = node.size("out_features", 1);
    params_.num_experts = node.size("num_experts", 1);
    params_.is_gated = node.flag("gated");
    params_.activation = static_cast<cpu::Activation>(node.choice("activation", kActivations));
    params_.activation_limit = node.number("activation_limit");
    params_.norm_epsilon = node.number("norm_epsilon");
    params_.multiplier = node.number("multiplier");
    const size_t x = node.take("x"), picks = node.take("picks");
    if (node.input(x).type != kFloat || node.input(x).shape.empty() ||
        node.input(x).shape.back() != params_.num_inputs) {
      node.refuse("x", shown(node.input(x).shape), "float32 [.., in_features]");
    }
    if (node.input(picks).type != kInt64) node.refuse("picks", "another type", "int64");
    params_.num_x_rows = node.input(x).elements() / params_.num_inputs;
    params_.num_rows = node.input(picks).elements();
    x_ = Input(node, x);
    picks_ = Input(node, picks);
    const int64_t rows = params_.is_gated ? 2 * params_.num_outputs : params_.num_outputs;
    weights_ = std::make_unique<Weights>(node, type, params_.num_inputs, rows, params_.num_experts, params_.is_gated);
    weights_->setTypes(params_);
    shape_ = node.input(picks).shape;
    const int64_t norm = node.integer("norm", 0, 2);  // 1: RMS norm, 2: layer norm
    params_.is_layer_norm = norm == 2;
    if ((has_norm_ = norm > 0)) norm_ = Input(node, node.take("norm_weight", kFloat, {params_.num_inputs}));
    if ((has_bias_ = node.flag("has_bias"))) {
      bias_ = Input(node, node.take("bias", kFloat, {params_.num_experts, rows}));
    }
    takeSums(node);
    shape_.push_back(params_.num_outputs);
    if ((has_residual_ = node.flag("has_residual"))) takeResidual(node);
    valid_rows_ = ValidRows(node, std::gcd(params_.num_x_rows, numRowsOfY()));
    node.finish({{kFloat, shape_}});
    node.refuseIf(cpu::linearProblem(params_, true));
  }

  void compute(Run& run) const override {
    cpu::LinearParams params = params_;
    params.x = x_.of<float>(run);
    params.picks = picks_.of<int64_t>(run);
    weights_->setPointers(params, run);
    if (has_norm_) params.norm_weight = norm_.of<float>(run);
    if (has_bias_) params.bias = bias_.of<float>(run);
    if (params.num_sums > 0) params.pick_weights = pick_weights_.of<float>(run);
    if (has_residual_) params.residual = residual_.of<float>(run);
    params.y = static_cast<float*>(run.output(0, shape_));
    params.num_x_rows = valid_rows_.of(run, params_.num_x_rows);
    params.num_rows = params_.num_rows / params_.num_x_rows * params.num_x_rows;
    params.num_sums = valid_rows_.of(run, params_.num_sums);
    run_(params, run.parallel(), run.scratch());
    const int64_t rows = params.num_sums > 0 ? params.num_sums : params.num_rows;
    valid_rows_.fill(params.y, rows, numRowsOfY(), params_.num_outputs, run.parallel());
  }

 private:
  // Weights [.., top_k] of the picks, in their order: y is [.., N] then.
  void takeSums(Node& node) {
    if (!node.flag("has_pick_weights")) return;
    const size_t index = node.take("pick_weights");
    const Tensor& weights = node.input(index);
    if (weights.type != kFloat || weights.shape.empty() || weights.elements() != params_.num_rows) {
      node.refuse("pick_weights", shown(weights.shape), "float32 [.., top_k], one for each pick");
    }
    params_.num_sums = params_.num_rows / weights.shape.back();
    shape_ = weights.shape;
    shape_.pop_back();
    pick_weights_ = Input(node, index);
  }

  int64_t numRowsOfY() const { return params_.num_sums > 0 ? params_.num_sums : params_.num_rows; }

  // y has its shape.
  void takeResidual(Node& node) {
    const size_t index = node.take("residual");
    const Tensor& residual = node.input(index);
    if (residual.type != kFloat || residual.shape.empty() || residual.shape.back() != params_.num_outputs ||
        residual.elements() != numRowsOfY() * params_.num_outputs) {
      node.refuse("residual", shown(residual.shape), "float32 [.., out_features], a row for each of y");
    }
    shape_ = residual.shape;
    residual_ = Input(node, index);
  }

  cpu::LinearFunction run_;
  cpu::LinearParams params_;  // without pointers
  std::vector<int64_t> shape_;
  std::unique_ptr<Weights> weights_;
  ValidRows valid_rows_;
  Input x_, picks_, norm_, bias_, pick_weights_, residual_;
  bool has_norm_ = false, has_bias_ = false, has_residual_ = false;
};

}  // namespace

std::unique_ptr<Kernel> createFloatExpertLinear(Node& node, const Library& library) {
  return std::make_unique<ExpertLinear>(node, library, cpu::WeightType::kFloat32);
}
std::unique_ptr<Kernel> createBf16ExpertLinear(Node& node, const Library& library) {
  return std::make_unique<ExpertLinear>(node, library, cpu::WeightType::kBFloat16);
}
std::unique_ptr<Kernel> createInt8ExpertLinear(Node& node, const Library& library) {
  return std::make_unique<ExpertLinear>(node, library, cpu::WeightType::kInt8);
}

}  // namespace sinkexport::ort
