// FloatExpertLinear, Int8ExpertLinear: rows of x by matrices that are chosen at run time, read where they lie.
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
    weights_ =
        std::make_unique<Weights>(node, type, params_.num_inputs, params_.num_outputs, params_.num_experts, false);
    weights_->setTypes(params_);
    shape_ = node.input(picks).shape;
    shape_.push_back(params_.num_outputs);
    valid_rows_ = ValidRows(node, params_.num_x_rows);
    node.finish({{kFloat, shape_}});
    node.refuseIf(cpu::linearProblem(params_, true));
  }

  void compute(Run& run) const override {
    cpu::LinearParams params = params_;
    params.x = x_.of<float>(run);
    params.picks = picks_.of<int64_t>(run);
    weights_->setPointers(params, run);
    params.y = static_cast<float*>(run.output(0, shape_));
    params.num_x_rows = valid_rows_.of(run, params_.num_x_rows);
    params.num_rows = params_.num_rows / params_.num_x_rows * params.num_x_rows;
    run_(params, run.parallel(), run.scratch());
    valid_rows_.fill(params.y, params.num_rows, params_.num_rows, params_.num_outputs, run.parallel());
  }

 private:
  cpu::LinearFunction run_;
  cpu::LinearParams params_;  // without pointers
  std::vector<int64_t> shape_;
  std::unique_ptr<Weights> weights_;
  ValidRows valid_rows_;
  Input x_, picks_;
};

}  // namespace

std::unique_ptr<Kernel> createFloatExpertLinear(Node& node, const Library& library) {
  return std::make_unique<ExpertLinear>(node, library, cpu::WeightType::kFloat32);
}
std::unique_ptr<Kernel> createInt8ExpertLinear(Node& node, const Library& library) {
  return std::make_unique<ExpertLinear>(node, library, cpu::WeightType::kInt8);
}

}  // namespace sinkexport::ort
