// INT4 weights as inputs of a node: int32 tiles, float16 scales and, where a field says so, int32 zero points, in the
// layout of kernels/linear.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "linear.h"
#include "operator.h"

namespace sinkexport::trt {

class Int4Weight {
 public:
  void addFields(FieldList& list) {
    list.emplace_back("block_size", &block_size_);
    list.emplace_back("has_zero_points", &has_zero_points_);
  }

  std::string fieldProblem() const {
    if (block_size_ != 32 && block_size_ != 64 && block_size_ != 128) {
      return "field 'block_size': received " + std::to_string(block_size_) + ", expected 32, 64 or 128";
    }
    return flagProblem("has_zero_points", has_zero_points_);
  }

  int numInputs() const { return 2 + has_zero_points_; }

  // Of its inputs by number.
  static nvinfer1::DataType typeOf(int input) {
    return input == kScale ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kINT32;
  }

  // "", or one line. inputs[first] is the weight. leading: axes before those of a matrix [N, K].
  std::string misfit(const Tensors& inputs, int first, const std::vector<int64_t>& leading, int64_t num_outputs,
                     int64_t num_inputs) const {
    const auto shape = [&](int64_t columns, int64_t words) {
      std::vector<int64_t> wanted = leading;
      const int64_t tiles = (num_outputs + kInt4TileOutputs - 1) / kInt4TileOutputs;
      for (const int64_t axis : {tiles, columns, words}) wanted.push_back(axis);
      return wanted;
    };
    const int64_t groups = (num_inputs + block_size_ - 1) / block_size_;
    const int64_t steps = (num_inputs + kInt4TileInputs - 1) / kInt4TileInputs;
    std::string found = shapeProblem("weight", inputs[first], shape(steps, kInt4TileBytes / 4));
    if (found.empty()) found = shapeProblem("scale", inputs[first + kScale], shape(groups, kInt4TileOutputs));
    if (found.empty() && has_zero_points_) {
      found = shapeProblem("zero_points", inputs[first + kZeros], shape(groups, kInt4TileOutputs / 4));
    }
    return found;
  }

  // in[0] is the weight.
  template <typename Params>
  void set(Params& p, const void* const* in) const {
    p.block_size = block_size_;
    p.block_scale = in[kScale];
    p.zero_points = has_zero_points_ ? static_cast<const uint8_t*>(in[kZeros]) : nullptr;
  }

 private:
  enum Input { kWeight, kScale, kZeros };
  int32_t block_size_ = 0, has_zero_points_ = 0;
};

}  // namespace sinkexport::trt
