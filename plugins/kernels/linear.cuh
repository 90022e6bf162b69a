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
template <typename Weight>
constexpr int kUnitWeights = 16 / static_cast<int>(sizeof(Weight));  // of a 16-byte copy

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
  __device__ __forceinline__ Half operator()(float sum) const {
    return fromFloat<Half>(kIsInt8<Weight> ? fmaf(sum, scale, bias) : sum + bias);
  }
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

// --- checks ---

// nullptr, or one line.
inline const char* weightProblem(WeightType type, int num_inputs, int num_outputs) {
  constexpr int kMaxFeatures = 1 << 21;
  if (type != WeightType::kInt8 && type != WeightType::kHalf) {
    return explain("weight_type: received %d, expected 0 (int8) or 1 (half)", static_cast<int>(type));
  }
  const int unit = type == WeightType::kInt8 ? kUnitWeights<int8_t> : kUnitWeights<__half>;
  if (num_inputs < unit || num_inputs > kMaxFeatures || num_inputs % unit) {
    return explain("num_inputs: received %d, expected a multiple of %d in %d .. %d; pad x and weight with zeros",
                   num_inputs, unit, unit, kMaxFeatures);
  }
  if (num_outputs < 1 || num_outputs > kMaxFeatures) {
    return explain("num_outputs: received %d, expected 1 .. %d", num_outputs, kMaxFeatures);
  }
  return nullptr;
}

}  // namespace linear
}  // namespace sinkexport
