// float16 and bfloat16: to float and back, and eight of them as one access of 16 bytes moves them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "types.h"

namespace sinkexport {

template <DType kDType>
using HalfOf = std::conditional_t<kDType == DType::kFloat16, __half, __nv_bfloat16>;

__device__ __forceinline__ float toFloat(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float toFloat(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <typename Half>
__device__ __forceinline__ Half fromFloat(float value);  // to nearest, ties to even
template <>
__device__ __forceinline__ __half fromFloat<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 fromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

constexpr int kHalvesOfPiece = 8;

template <typename Half>
struct alignas(16) Piece {
  Half halves[kHalvesOfPiece];
};

}  // namespace sinkexport
