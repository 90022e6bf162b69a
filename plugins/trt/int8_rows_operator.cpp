// Inputs: ids, table, scale. Output: the table's rows.
#include "int8_rows.h"
#include "operator.h"

namespace sinkexport::trt {
namespace {

enum Input { kIds, kTable, kScale };

class Int8Rows final : public KernelOperator<Int8RowsParams, int8RowsProblem, launchInt8Rows> {
  using KernelOperator::params;

 public:
  std::unique_ptr<Operator> clone() const override { return std::make_unique<Int8Rows>(*this); }

  FieldList fields() override { return {{"row_length", &row_length_}}; }

  std::string fieldProblem() const override { return leastProblem("row_length", row_length_, 1); }

  int numInputs() const override { return 3; }
  int numOutputs() const override { return 1; }
  int likeInput(int /*index*/) const override { return kIds; }
  int appendedAxis(int /*index*/) const override { return row_length_; }
  nvinfer1::DataType outputType(int, const nvinfer1::DataType*) const override { return nvinfer1::DataType::kHALF; }

  bool takesType(int index, nvinfer1::DataType type, const Tensors&) const override {
    return type == (index == kScale ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kINT32);
  }

 private:
  std::string misfit(const Tensors& inputs) const override {
    const int num_rows = params(inputs).num_rows;
    const std::string found = shapeProblem("table", inputs[kTable], {num_rows, row_length_ / 4});
    return found.empty() ? shapeProblem("scale", inputs[kScale], {num_rows}) : found;
  }

  Int8RowsParams params(const Tensors& inputs, const void* const* in, void* const* out) const override {
    Int8RowsParams p;
    p.num_ids = 1;
    for (int32_t i = 0; i < inputs[kIds].dims.nbDims; ++i) p.num_ids *= static_cast<int>(inputs[kIds].dims.d[i]);
    p.num_rows = inputs[kTable].dims.nbDims > 0 ? static_cast<int>(inputs[kTable].dims.d[0]) : 0;
    p.row_length = row_length_;
    p.ids = static_cast<const int32_t*>(in[kIds]);
    p.table = static_cast<const int8_t*>(in[kTable]);
    p.scale = static_cast<const float*>(in[kScale]);
    p.out = out[0];
    return p;
  }

  int32_t row_length_ = 0;
};

}  // namespace

std::unique_ptr<Operator> makeInt8Rows() {
  return std::make_unique<Int8Rows>();
}

}  // namespace sinkexport::trt
