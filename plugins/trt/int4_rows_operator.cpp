// Inputs: ids, table, scale, and zero points where a field says so. Output: the table's rows.
#include "int4_rows.h"
#include "int4_weight.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

enum Input { kIds, kTable };

class Int4Rows final : public KernelOperator<Int4RowsParams, int4RowsProblem, launchInt4Rows> {
  using KernelOperator::params;

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<Int4Rows>(*this); }

  FieldList fields() override {
    FieldList list = {{"row_length", &row_length_}, {"num_rows", &num_rows_}};
    int4_.addFields(list);
    return list;
  }

  std::string fieldProblem() const override {
    std::string problem = leastProblem("row_length", row_length_, 1);
    if (problem.empty()) problem = leastProblem("num_rows", num_rows_, 1);
    return problem.empty() ? int4_.fieldProblem() : problem;
  }

  int numInputs() const override { return kTable + int4_.numInputs(); }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kIds; }
  int appendedAxis(int /*index*/) const override { return row_length_; }
  nvinfer1::DataType outputType(int, const nvinfer1::DataType*) const override { return nvinfer1::DataType::kHALF; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors&) const override {
    return type == (index == kIds ? nvinfer1::DataType::kINT32 : Int4Weight::typeOf(index - kTable));
  }

 private:
  std::string misfit(const Tensors& inputs) const override {
    return int4_.misfit(inputs, kTable, {}, num_rows_, row_length_);
  }

  Int4RowsParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    Int4RowsParams p;
    p.num_ids = 1;
    for (int32_t i = 0; i < inputs[kIds].dims.nbDims; ++i) p.num_ids *= static_cast<int>(inputs[kIds].dims.d[i]);
    p.num_rows = num_rows_;
    p.row_length = row_length_;
    p.ids = static_cast<const int32_t*>(in[kIds]);
    p.table = in[kTable];
    int4_.set(p, in + kTable);
    p.out = out[0];
    return p;
  }

  int32_t row_length_ = 0, num_rows_ = 0;
  Int4Weight int4_;
};

}  // namespace

std::unique_ptr<Operator> makeInt4Rows() {
  return std::make_unique<Int4Rows>();
}

}  // namespace sinkexport::trt
