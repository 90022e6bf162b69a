// FloatRows, Bf16Rows, Int8Rows, Int4Rows: rows of a packed table, which may be an output projection's weights too.
#include "weights.h"

namespace sinkexport::ort {
namespace {

class Rows final : public Kernel {
 public:
  Rows(Node& node, cpu::WeightType type) {
    params_.num_rows = node.size("num_rows", 1);
    params_.row_length = node.size("row_length", 1);
    const size_t ids = node.take("ids");
    if (node.input(ids).type != kInt64) node.refuse("ids", "another type", "int64");
    params_.num_ids = node.input(ids).elements();
    ids_ = Input(node, ids);
    weights_ = std::make_unique<Weights>(node, type, params_.row_length, params_.num_rows, 0, false);
    weights_->setTypes(params_);
    shape_ = node.input(ids).shape;
    shape_.push_back(params_.row_length);
    node.finish({{kFloat, shape_}});
    node.refuseIf(cpu::rowsProblem(params_, true));
  }

  void compute(Run& run) const override {
    cpu::RowsParams params = params_;
    params.ids = ids_.of<int64_t>(run);
    weights_->setPointers(params, run);
    params.y = static_cast<float*>(run.output(0, shape_));
    cpu::runRows(params, run.parallel());
  }

 private:
  cpu::RowsParams params_;  // without pointers
  std::vector<int64_t> shape_;
  std::unique_ptr<Weights> weights_;
  Input ids_;
};

}  // namespace

std::unique_ptr<Kernel> createFloatRows(Node& node, const Library&) {
  return std::make_unique<Rows>(node, cpu::WeightType::kFloat32);
}
std::unique_ptr<Kernel> createBf16Rows(Node& node, const Library&) {
  return std::make_unique<Rows>(node, cpu::WeightType::kBFloat16);
}
std::unique_ptr<Kernel> createInt8Rows(Node& node, const Library&) {
  return std::make_unique<Rows>(node, cpu::WeightType::kInt8);
}
std::unique_ptr<Kernel> createInt4Rows(Node& node, const Library&) {
  return std::make_unique<Rows>(node, cpu::WeightType::kInt4);
}

}  // namespace sinkexport::ort
