#include "weights.h"

#include <cstring>

namespace sinkexport::ort {

AlignedInput::AlignedInput(const Node& node, size_t index, size_t bytes) : input_(node, index) {
  const void* data = node.constant(index);
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % cpu::Scratch::kAlignment == 0) return;
  copy_ = std::make_unique<cpu::Scratch>();
  std::memcpy(copy_->reserve(bytes), data, bytes);
}

Weights::Weights(Node& node, cpu::WeightType weight_type, int64_t num_inputs, int64_t rows, int64_t experts,
                 bool is_gated)
    : type(weight_type) {
  constexpr int64_t kTile = 16;
  node.choice("layout", {"n16"});
  block_size = node.size("block_size");
  scale_type = static_cast<cpu::ScaleType>(node.integer("scale_type", 0, 1));
  has_zero_points = node.flag("has_zero_points");
  const int64_t halves = is_gated ? 2 : 1;
  const int64_t tiles = halves * ((rows / halves + kTile - 1) / kTile);
  const int64_t matrices = experts > 0 ? experts : 1;
  const cpu::PackedBytes bytes = cpu::packedBytes(type, num_inputs, tiles * kTile, block_size, scale_type);
  const int64_t weight_bytes = static_cast<int64_t>(bytes.weight) * matrices;
  const size_t weight_index = node.take("weight", kUint8, {weight_bytes});
  weight = AlignedInput(node, weight_index, static_cast<size_t>(weight_bytes));
  std::vector<int64_t> groups = {tiles, block_size > 0 ? (num_inputs + block_size - 1) / block_size : 1, kTile};
  const size_t count = static_cast<size_t>(matrices * groups[0] * groups[1] * groups[2]);
  if (experts > 0) groups.insert(groups.begin(), experts);
  if (type == cpu::WeightType::kInt8 || type == cpu::WeightType::kInt4) {
    const bool is_half = scale_type == cpu::ScaleType::kFloat16;
    scale = AlignedInput(node, node.take("scales", is_half ? kFloat16 : kFloat, groups), count * (is_half ? 2 : 4));
  }
  if (has_zero_points) zero_point = AlignedInput(node, node.take("zero_points", kUint8, groups), count);
}

}  // namespace sinkexport::ort
