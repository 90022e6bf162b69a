#include "linear.h"

#include <initializer_list>

#include "problem.h"
#include "reads.h"

namespace sinkexport::cpu {

#define SINKEXPORT_DECLARE(isa, value)                            \
  namespace isa {                                                 \
  void runLinear(const LinearParams&, const Parallel&, Scratch&); \
  }
SINKEXPORT_FOR_EACH_ISA(SINKEXPORT_DECLARE)
#undef SINKEXPORT_DECLARE

LinearFunction linearFor(Isa isa) {
#define SINKEXPORT_FIND(name, value) \
  if (isa == value) return name::runLinear;
  SINKEXPORT_FOR_EACH_ISA(SINKEXPORT_FIND)
#undef SINKEXPORT_FIND
  return nullptr;
}

PackedBytes packedBytes(WeightType weight_type, int64_t num_inputs, int64_t weight_rows, int block_size,
                        ScaleType scale_type) {
  const auto up = [](int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; };
  const int64_t rows = up(weight_rows, 16);
  if (weight_type == WeightType::kFloat32) return {static_cast<size_t>(rows * num_inputs * 4), 0, 0};
  if (weight_type == WeightType::kBFloat16) return {static_cast<size_t>(rows * up(num_inputs, 2) * 2), 0, 0};
  const int64_t inputs = up(num_inputs, block_size > 0 ? block_size : 4);
  const int64_t blocks = block_size > 0 ? inputs / block_size : 1;
  const bool is_int4 = weight_type == WeightType::kInt4;
  return {static_cast<size_t>(is_int4 ? rows * inputs / 2 : rows * inputs),
          static_cast<size_t>(rows * blocks * (scale_type == ScaleType::kFloat16 ? 2 : 4)),
          static_cast<size_t>(is_int4 ? rows * blocks : 0)};
}

void linearReads(const LinearParams& params, int threads, Reads& reads) {
  if (params.num_experts > 0 || params.num_rows >= kRowsOfFewTasks) return;
  const int64_t unit = params.is_gated ? 2 : 1, units = (params.num_outputs + 15) / 16, tiles = units * unit;
  const PackedBytes bytes =
      packedBytes(params.weight_type, params.num_inputs, tiles * 16, params.block_size, params.scale_type);
  const int64_t workers = units < threads ? units : threads < 1 ? 1 : threads;
  for (int64_t w = 0; w < workers; ++w) {
    const int64_t first = w * units / workers * unit, count = (w + 1) * units / workers * unit - first;
    const auto set = [&](int piece, const void* start, size_t all) {
      const int64_t tile_bytes = static_cast<int64_t>(all) / tiles;
      if (start == nullptr) return;
      reads.set(static_cast<int>(w), piece, static_cast<const char*>(start) + first * tile_bytes, count * tile_bytes);
    };
    set(0, params.weight, bytes.weight);
    set(1, params.scale, bytes.scale);
    set(2, params.zero_point, bytes.zero_point);
  }
}

namespace {

constexpr int64_t kLargest = int64_t{1} << 24;

struct NamedPointer {
  const char* name;
  const void* address;
  size_t alignment;
};

const char* sizeProblem(const char* name, int64_t received, int64_t largest) {
  if (received >= 1 && received <= largest) return nullptr;
  return explain("%s: received %lld, expected 1 .. %lld", name, static_cast<long long>(received),
                 static_cast<long long>(largest));
}

const char* formatProblem(WeightType weight_type, int block_size, ScaleType scale_type) {
  const int type = static_cast<int>(weight_type), scale = static_cast<int>(scale_type);
  if (type < 0 || type > 3) {
    return explain("weight_type: received %d, expected 0 (float32), 1 (bfloat16), 2 (int8) or 3 (int4)", type);
  }
  if (scale < 0 || scale > 1) return explain("scale_type: received %d, expected 0 (float32) or 1 (float16)", scale);
  const bool is_blocks = block_size == 32 || block_size == 64 || block_size == 128;
  if (weight_type == WeightType::kInt8) {
    if (is_blocks || block_size == 0) return nullptr;
    return explain("block_size: received %d, expected 0 (a scale an output), 32, 64 or 128", block_size);
  }
  if (weight_type == WeightType::kInt4) {
    return is_blocks ? nullptr : explain("block_size: received %d, expected 32, 64 or 128", block_size);
  }
  if (block_size == 0) return nullptr;
  return explain("block_size: received %d, expected 0 with weights that are not integers", block_size);
}

const char* pointerProblem(std::initializer_list<NamedPointer> pointers) {
  for (const NamedPointer& one : pointers) {
    if (one.address == nullptr) return explain("%s: received null, expected a pointer", one.name);
    if (reinterpret_cast<uintptr_t>(one.address) % one.alignment != 0) {
      return explain("%s: received %p, expected a multiple of %zu", one.name, one.address, one.alignment);
    }
  }
  return nullptr;
}

const char* weightPointerProblem(WeightType weight_type, const void* weight, const void* scale,
                                 const uint8_t* zero_point) {
  if (const char* problem = pointerProblem({{"weight", weight, 64}})) return problem;
  const bool is_integer = weight_type == WeightType::kInt8 || weight_type == WeightType::kInt4;
  if (is_integer) {
    if (const char* problem = pointerProblem({{"scale", scale, 16}})) return problem;
  } else if (scale != nullptr) {
    return "scale: received a pointer, expected null with weights that are not integers";
  }
  if (zero_point != nullptr && weight_type != WeightType::kInt4) {
    return "zero_point: received a pointer, expected null with weights that are not int4";
  }
  return nullptr;
}

bool overlaps(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
  return first < second + static_cast<uintptr_t>(b_bytes) && second < first + static_cast<uintptr_t>(a_bytes);
}

const char* expertProblem(const LinearParams& params, bool shapes_only) {
  if (params.num_experts == 0) return nullptr;
  if (params.num_experts < 0 || params.num_experts > 4096) {
    return explain("num_experts: received %d, expected 0 (one matrix) .. 4096", params.num_experts);
  }
  if (params.num_x_rows < 1 || params.num_rows % params.num_x_rows != 0) {
    return explain("num_x_rows: received %lld, expected a number that divides the %lld rows of y",
                   static_cast<long long>(params.num_x_rows), static_cast<long long>(params.num_rows));
  }
  if (params.num_sums < 0 || (params.num_sums > 0 && params.num_rows % params.num_sums != 0)) {
    return explain("num_sums: received %lld, expected 0 or a number that divides the %lld rows",
                   static_cast<long long>(params.num_sums), static_cast<long long>(params.num_rows));
  }
  if (shapes_only) return nullptr;
  if ((params.pick_weights != nullptr) != (params.num_sums > 0)) {
    return "pick_weights, num_sums: received one of them, expected both or neither";
  }
  return pointerProblem({{"picks", params.picks, 8}});
}

}  // namespace

const char* linearProblem(const LinearParams& params, bool shapes_only) {
  if (const char* problem = sizeProblem("num_rows", params.num_rows, kLargest)) return problem;
  if (const char* problem = sizeProblem("num_inputs", params.num_inputs, kLargest)) return problem;
  if (const char* problem = sizeProblem("num_outputs", params.num_outputs, kLargest)) return problem;
  if (const char* problem = formatProblem(params.weight_type, params.block_size, params.scale_type)) return problem;
  const int activation = static_cast<int>(params.activation);
  if (activation < 0 || activation > 5) {
    return explain("activation: received %d, expected 0 (none) .. 5 (clamped_swiglu)", activation);
  }
  if (params.activation == Activation::kClampedSwiglu && !params.is_gated) {
    return "activation: received clamped_swiglu without gates, expected gates and ups";
  }
  if (!(params.activation_limit >= 0.0f && params.activation_limit < 1e30f)) {
    return explain("activation_limit: received %g, expected a number from 0 on",
                   static_cast<double>(params.activation_limit));
  }
  if (!(params.norm_epsilon >= 0.0f && params.norm_epsilon < 1e30f)) {
    return explain("norm_epsilon: received %g, expected a number from 0 on", static_cast<double>(params.norm_epsilon));
  }
  if (!(params.output_norm_epsilon >= 0.0f && params.output_norm_epsilon < 1e30f)) {
    return explain("output_norm_epsilon: received %g, expected a number from 0 on",
                   static_cast<double>(params.output_norm_epsilon));
  }
  if (!(params.multiplier > -1e30f && params.multiplier < 1e30f)) {
    return explain("multiplier: received %g, expected a finite number", static_cast<double>(params.multiplier));
  }
  if (const char* problem = expertProblem(params, shapes_only)) return problem;
  if (shapes_only) return nullptr;
  if (params.norm_bias != nullptr && (!params.is_layer_norm || params.norm_weight == nullptr)) {
    return "norm_bias: received a pointer, expected null without a layer norm";
  }
  if (const char* problem = pointerProblem({{"x", params.x, 4}, {"y", params.y, 4}})) return problem;
  if (const char* problem = weightPointerProblem(params.weight_type, params.weight, params.scale, params.zero_point)) {
    return problem;
  }
  const int64_t x_rows = params.num_experts > 0 ? params.num_x_rows : params.num_rows;
  const int64_t y_bytes = (params.num_sums > 0 ? params.num_sums : params.num_rows) * params.num_outputs * 4;
  if (overlaps(params.y, y_bytes, params.x, x_rows * params.num_inputs * 4)) {
    return "y: overlaps x, expected memory of its own";
  }
  if (params.pick_weights != nullptr && (params.num_experts == 0 || params.output_norm_weight != nullptr)) {
    return "pick_weights: received without experts or with output_norm_weight, expected experts alone";
  }
  if (params.output_norm_weight != nullptr && params.residual == params.y) {
    return "y: is residual's memory, expected memory of its own with output_norm_weight";
  }
  if (params.residual != nullptr && params.residual != params.y &&
      overlaps(params.y, y_bytes, params.residual, y_bytes)) {
    return "y: overlaps a part of residual, expected all of its memory or none";
  }
  return nullptr;
}

const char* rowsProblem(const RowsParams& params, bool shapes_only) {
  if (const char* problem = sizeProblem("num_ids", params.num_ids, kLargest)) return problem;
  if (const char* problem = sizeProblem("num_rows", params.num_rows, kLargest)) return problem;
  if (const char* problem = sizeProblem("row_length", params.row_length, kLargest)) return problem;
  if (const char* problem = formatProblem(params.weight_type, params.block_size, params.scale_type)) return problem;
  if (shapes_only) return nullptr;
  if (const char* problem = pointerProblem({{"ids", params.ids, 8}, {"y", params.y, 4}})) return problem;
  return weightPointerProblem(params.weight_type, params.weight, params.scale, params.zero_point);
}

}  // namespace sinkexport::cpu
