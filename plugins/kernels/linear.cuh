// What matmuls by constant matrices share: weights as factors, what makes an output of a sum, launches, checks.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cp_async.cuh"
#include "device.h"
#include "half_pairs.cuh"
#include "linear.h"
#include "mma.cuh"
#include "overlap.cuh"
#include "problem.h"
#include "warp.cuh"

namespace sinkexport {
namespace linear {

template <typename Weight>
constexpr bool kIsInt8 = std::is_same_v<Weight, int8_t>;
// INT4 weights, where a type of weights is asked for.
struct Int4 {};
template <typename Weight>
constexpr bool kIsInt4 = std::is_same_v<Weight, Int4>;
template <typename Weight>
constexpr bool kIsHalf = !kIsInt8<Weight> && !kIsInt4<Weight>;
template <typename Weight>
constexpr int kBits = kIsInt4<Weight> ? 4 : 8 * static_cast<int>(sizeof(Weight));
template <typename Weight>
constexpr int kUnitWeights = 128 / kBits<Weight>;  // of a 16-byte copy

__device__ __forceinline__ uint32_t wordOf(const uint2& words, int i) {
  return i == 0 ? words.x : words.y;
}
__device__ __forceinline__ uint32_t wordOf(const uint4& words, int i) {
  return i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w);
}

// The left factor of the s-th multiplyAdd: four weights of row g out of `near`, and of row g + 8 out of `far`, which
// are those of a[0], a[2] and of a[1], a[3].
template <typename Weight, typename Half, typename Words>
__device__ __forceinline__ void takeTile(uint32_t (&a)[4], const Words& near, const Words& far, int s) {
  if constexpr (kIsInt8<Weight>) {
    int8ToHalves<Half>(wordOf(near, s), a[0], a[2]);
    int8ToHalves<Half>(wordOf(far, s), a[1], a[3]);
  } else {
    a[0] = wordOf(near, 2 * s), a[2] = wordOf(near, 2 * s + 1);
    a[1] = wordOf(far, 2 * s), a[3] = wordOf(far, 2 * s + 1);
  }
}

// What makes an output of a sum.
template <typename Weight, typename Half>
struct Output {
  float scale, bias;
  __device__ __forceinline__ Output(const LinearParams& p, size_t output)
      : scale(kIsInt8<Weight> ? p.scale[output] : 1.0f),
        bias(p.bias ? toFloat(static_cast<const Half*>(p.bias)[output]) : 0.0f) {}
  __device__ __forceinline__ float operator()(float sum) const {
    return kIsInt8<Weight> ? fmaf(sum, scale, bias) : sum + bias;
  }
};

// Number `at` of y's [M, N], no gate: the output's value, and the residual where there is one.
template <typename Half>
__device__ __forceinline__ void storeOutput(const LinearParams& p, size_t at, float value) {
  if (p.residual) value += toFloat(static_cast<const Half*>(p.residual)[at]);
  static_cast<Half*>(p.y)[at] = fromFloat<Half>(value);
}

constexpr int kInt4ScaleBytes = 2 * kInt4TileOutputs;                // of a tile's block
constexpr int kInt4GroupBytes = kInt4ScaleBytes + kInt4TileOutputs;  // zero points included

// How many tiles, tiles along K and blocks INT4 weights have (linear.h).
struct Int4Sizes {
  int num_tiles, num_steps, num_groups;
  int block_shift;  // by which an input's number becomes that of its block
  template <typename Params>
  __host__ __device__ explicit Int4Sizes(const Params& p)
      : num_tiles(divideUp(p.num_outputs, kInt4TileOutputs)),
        num_steps(divideUp(p.num_inputs, kInt4TileInputs)),
        block_shift(5 + (p.block_size > 32) + (p.block_size > 64)) {
    num_groups = (p.num_inputs + p.block_size - 1) >> block_shift;
  }
};

// sum += scale * part, of rows g and g + 8 of an INT4 tile. scales: both, float16. Not what it should be until it is
// `finished`.
__device__ __forceinline__ void addScaled(float (&sum)[4], const float (&part)[4], uint32_t scales) {
  float near, far;
  unpackHalves<__half>(scales, near, far);
  sum[0] = fmaf(part[0], near, sum[0]), sum[1] = fmaf(part[1], near, sum[1]);
  sum[2] = fmaf(part[2], far, sum[2]), sum[3] = fmaf(part[3], far, sum[3]);
}

// Number i of a multiplyAdd's sums, once all is added.
template <typename Weight, typename Half>
__device__ __forceinline__ float finished(const float (&sum)[4], int i) {
  if constexpr (kIsInt4<Weight>) return i < 2 ? sum[i] : sum[i] * (1.0f / Int4Differences<Half>::kFar);
  return sum[i];
}

// Scales of rows g and g + 8 of an INT4 tile, and how a block's weights become factors.
template <typename Factors>
struct Int4Group {
  uint32_t scales;
  Factors factors;
  // scales_: [16] float16; zeros: [16] bytes.
  __device__ __forceinline__ Int4Group(const unsigned char* scales_, const unsigned char* zeros, int g, bool has_zeros)
      : scales(reinterpret_cast<const uint32_t*>(scales_)[g]),
        factors(has_zeros ? reinterpret_cast<const uint16_t*>(zeros)[g] : 0x0808u) {}
};

// --- launches ---

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, const Device& device,
                   cudaStream_t stream, Arguments... arguments) {
  constexpr int kFreeSharedBytes = 48 << 10;  // more must be asked for
  if (shared_bytes > kFreeSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return launchOverlapping(kernel, grid, dim3(threads), shared_bytes, device.overlaps, stream, arguments...);
}

// use(a weight of the type), for weights of a type that is known at run time.
template <typename Half, typename Use>
auto withWeight(WeightType type, Use use) {
  if (type == WeightType::kInt8) return use(int8_t{});
  return type == WeightType::kInt4 ? use(Int4{}) : use(Half{});
}

// --- checks ---

// nullptr, or one line.
template <typename Params>
const char* weightProblem(const Params& p) {
  constexpr int kMaxFeatures = 1 << 21;
  const WeightType type = p.weight_type;
  const int num_inputs = p.num_inputs, num_outputs = p.num_outputs;
  if (type != WeightType::kInt8 && type != WeightType::kHalf && type != WeightType::kInt4) {
    return explain("weight_type: received %d, expected 0 (int8), 1 (half) or 2 (int4)", static_cast<int>(type));
  }
  const int unit = type == WeightType::kInt8 ? kUnitWeights<int8_t> : kUnitWeights<__half>;
  if (num_inputs < unit || num_inputs > kMaxFeatures || num_inputs % unit) {
    return explain("num_inputs: received %d, expected a multiple of %d in %d .. %d; pad x and weight with zeros",
                   num_inputs, unit, unit, kMaxFeatures);
  }
  if (num_outputs < 1 || num_outputs > kMaxFeatures) {
    return explain("num_outputs: received %d, expected 1 .. %d", num_outputs, kMaxFeatures);
  }
  if (type != WeightType::kInt8 && p.scale) {
    return explain("scale: received a pointer, expected null with %s weights",
                   type == WeightType::kHalf ? "half" : "int4");
  }
  if (type == WeightType::kInt4) {
    if (p.block_size != 32 && p.block_size != 64 && p.block_size != 128) {
      return explain("block_size: received %d, expected 32, 64 or 128", p.block_size);
    }
  } else if (p.block_size || p.block_scale || p.zero_points) {
    return "block_size, block_scale, zero_points: received one of them, expected none but with int4 weights";
  }
  return nullptr;
}

// Bytes of `count` matrices, their scales and their zero points.
struct WeightBytes {
  size_t weight, scale, block_scale, zero_points;
};

template <typename Params>
WeightBytes weightBytes(const Params& p, size_t count = 1) {
  const size_t outputs = p.num_outputs, inputs = p.num_inputs;
  if (p.weight_type == WeightType::kInt4) {
    const Int4Sizes sizes(p);
    const size_t tiles = count * sizes.num_tiles, groups = tiles * sizes.num_groups * kInt4TileOutputs;
    return {tiles * sizes.num_steps * kInt4TileBytes, 0, groups * 2, groups};
  }
  const bool is_int8 = p.weight_type == WeightType::kInt8;
  return {count * outputs * inputs * (is_int8 ? 1 : 2), is_int8 ? count * outputs * sizeof(float) : 0, 0, 0};
}

}  // namespace linear
}  // namespace sinkexport
