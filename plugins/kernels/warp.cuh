// What the lanes of a warp find out together, and small arithmetic of sizes.
#pragma once

#include <cuda_runtime.h>

namespace sinkexport {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int divideUp(int a, int b) {
  return (a + b - 1) / b;
}

__device__ inline float warpSum(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ inline float warpMax(float x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

}  // namespace sinkexport
