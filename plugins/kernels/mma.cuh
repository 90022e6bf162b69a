// The tensor cores' matmul of 16 x 8 x 16 halves, and the transposition of 8 x 8 of them.
//
// SINKEXPORT_NO_TENSOR_CORES lets any GPU do as those below compute capability 8.0 have to, for tests.
#pragma once

#include <cstdint>
#include <type_traits>

#include "halves.cuh"
#include "warp.cuh"

namespace sinkexport {

// sum += a . b of a [16, 16], b [16, 8]: PTX's mma.m16n8k16. With g = lane / 4 and t = lane % 4 a lane holds
//   a[0]: a[g, 2t ..], a[1]: a[g + 8, 2t ..], a[2]: a[g, 2t + 8 ..], a[3]: a[g + 8, 2t + 8 ..]   (two halves each)
//   b0: b[2t .., g], b1: b[2t + 8 .., g]
//   sum[0], sum[1]: sum[g, 2t ..], sum[2], sum[3]: sum[g + 8, 2t ..]
#if __CUDA_ARCH__ >= 800 && !defined(SINKEXPORT_NO_TENSOR_CORES)
template <typename Half>
__device__ __forceinline__ void multiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Half, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
#else
template <typename Half>
__device__ __forceinline__ float2 toFloats(uint32_t pair) {
  const Half* halves = reinterpret_cast<const Half*>(&pair);
  return {toFloat(halves[0]), toFloat(halves[1])};
}

// The same sums by exchange within the warp, not as fast.
template <typename Half>
__device__ __forceinline__ void multiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 4 * 4, column = lane % 4 * 2;
#pragma unroll 1
  for (int t = 0; t < 4; ++t) {
    float2 factors[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) factors[i] = toFloats<Half>(__shfl_sync(kAllLanes, a[i], row + t));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 near = toFloats<Half>(__shfl_sync(kAllLanes, b0, (column + i) * 4 + t));
      const float2 far = toFloats<Half>(__shfl_sync(kAllLanes, b1, (column + i) * 4 + t));
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // rows g and g + 8
        float& total = sum[2 * j + i];
        total = fmaf(factors[j].x, near.x, fmaf(factors[j].y, near.y, total));
        total = fmaf(factors[2 + j].x, far.x, fmaf(factors[2 + j].y, far.y, total));
      }
    }
  }
}
#endif

// A warp's 8 x 8 halves, two of a row in a lane (4 * row + column / 2), the same transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
#if __CUDA_ARCH__ >= 750 && !defined(SINKEXPORT_NO_TENSOR_CORES)
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
  return pair;
#else
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, c = lane % 4;
  const uint32_t even = __shfl_sync(kAllLanes, pair, 8 * c + g / 2);
  const uint32_t odd = __shfl_sync(kAllLanes, pair, 8 * c + 4 + g / 2);
  return __byte_perm(even, odd, g % 2 ? 0x7632 : 0x5410);
#endif
}

}  // namespace sinkexport
