// Packed weights of a node: fields and inputs that linears, rows of tables and expert linears have in common.
#pragma once

#include "linear.h"
#include "operator.h"

namespace sinkexport::ort {

// Values of a field `activation`, in the order of cpu::Activation.
constexpr std::initializer_list<const char*> kActivations = {"none",      "silu",  "gelu",
                                                             "gelu_tanh", "relu2", "clamped_swiglu"};

// A constant that kernels read at any offset: where it does not lie at a multiple of 64 bytes, a copy of it does.
class AlignedInput {
 public:
  AlignedInput() = default;
  AlignedInput(const Node& node, size_t index, size_t bytes);

  template <typename T>
  const T* of(const Run& run) const {
    return copy_ != nullptr ? reinterpret_cast<const T*>(copy_->reserve(0)) : input_.of<T>(run);
  }

 private:
  Input input_;
  std::unique_ptr<cpu::Scratch> copy_;
};

struct Weights {
  cpu::WeightType type;
  int block_size;
  cpu::ScaleType scale_type;
  AlignedInput weight, scale, zero_point;
  bool has_zero_points;

  // Takes weight, scales and zero points. rows: N, or 2N if the matrix is gated. experts: 0: one matrix.
  Weights(Node& node, cpu::WeightType weight_type, int64_t num_inputs, int64_t rows, int64_t experts, bool is_gated);

  template <typename Params>
  void setTypes(Params& params) const {
    params.weight_type = type;
    params.block_size = block_size;
    params.scale_type = scale_type;
  }

  template <typename Params>
  void setPointers(Params& params, const Run& run) const {
    params.weight = weight.of<void>(run);
    if (type == cpu::WeightType::kInt8 || type == cpu::WeightType::kInt4) params.scale = scale.of<void>(run);
    if (has_zero_points) params.zero_point = zero_point.of<uint8_t>(run);
  }
};

}  // namespace sinkexport::ort
