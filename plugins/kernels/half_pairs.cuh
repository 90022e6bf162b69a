// Two halves in a 32-bit register, as matrix instructions take them: packed, unpacked, and made of INT8.
#pragma once

#include <cstdint>

#include "halves.cuh"

namespace sinkexport {

// Two floats, rounded to nearest even, the first in the low half.
template <typename Half>
__device__ __forceinline__ uint32_t packHalves(float low, float high);
template <>
__device__ __forceinline__ uint32_t packHalves<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t packHalves<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename Half>
__device__ __forceinline__ void unpackHalves(uint32_t pair, float& low, float& high);
template <>
__device__ __forceinline__ void unpackHalves<__half>(uint32_t pair, float& low, float& high) {
  const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  low = both.x, high = both.y;
}
template <>
__device__ __forceinline__ void unpackHalves<__nv_bfloat16>(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
}

template <typename Pair>
__device__ __forceinline__ uint32_t subtractPairs(uint32_t a, uint32_t b) {
  const Pair pair = __hsub2(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Four INT8 in a word, the first in its lowest byte, to two pairs: exact, as bytes are placed in mantissas.
template <typename Half>
__device__ __forceinline__ void int8ToHalves(uint32_t bytes, uint32_t& low, uint32_t& high);

// 0x64uu is 1024 + u, u = b + 128.
template <>
__device__ __forceinline__ void int8ToHalves<__half>(uint32_t bytes, uint32_t& low, uint32_t& high) {
  const uint32_t raised = bytes ^ 0x80808080u, offset = 0x64806480u;
  low = subtractPairs<__half2>(__byte_perm(raised, 0x64646464u, 0x4140), offset);
  high = subtractPairs<__half2>(__byte_perm(raised, 0x64646464u, 0x4342), offset);
}

// bfloat16's mantissa holds 7 of the 8 bits: 0x43uu is 128 + u below 128 and 256 at 128, so that the byte is the
// difference of the two that have its lower bits and its sign.
template <>
__device__ __forceinline__ void int8ToHalves<__nv_bfloat16>(uint32_t bytes, uint32_t& low, uint32_t& high) {
  const uint32_t bits = bytes & 0x7f7f7f7fu, sign = bytes & 0x80808080u, exponent = 0x43434343u;
  low = subtractPairs<__nv_bfloat162>(__byte_perm(bits, exponent, 0x4140), __byte_perm(sign, exponent, 0x4140));
  high = subtractPairs<__nv_bfloat162>(__byte_perm(bits, exponent, 0x4342), __byte_perm(sign, exponent, 0x4342));
}

// (word & mask) | offset in one instruction: the compiler makes two of it if it knows both constants.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t maskedWith(uint32_t word, uint32_t offset) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(kMask), "r"(offset));
  return result;
}

// How INT4 become the left factor of a multiplyAdd. A word has four columns of two rows: the near row's in its low
// nibbles, the far row's in its high ones, columns 0, 2, 1, 3 by bytes. Exact:
// q - zero as halves; of the far row kFar times that.
template <typename Half>
struct Int4Differences;

// 0x640q is 1024 + q and 0x64q0 1024 + 16 q: high nibbles need no shift.
template <>
struct Int4Differences<__half> {
  static constexpr float kFar = 16.0f;
  uint32_t near, far;
  // zeros: the near row's in the lowest byte, the far one's in the next.
  __device__ __forceinline__ explicit Int4Differences(uint32_t zeros) {
    near = __byte_perm(zeros, 0x64646464u, 0x4040), far = __byte_perm(zeros << 4, 0x64646464u, 0x4141);
  }
  __device__ __forceinline__ void take(uint32_t (&a)[4], uint32_t word) const {
    const uint32_t next = word >> 8, offset = 0x64006400u;
    a[0] = subtractPairs<__half2>(maskedWith<0x000f000fu>(word, offset), near);
    a[1] = subtractPairs<__half2>(maskedWith<0x00f000f0u>(word, offset), far);
    a[2] = subtractPairs<__half2>(maskedWith<0x000f000fu>(next, offset), near);
    a[3] = subtractPairs<__half2>(maskedWith<0x00f000f0u>(next, offset), far);
  }
};

// 0x430q is 128 + q.
template <>
struct Int4Differences<__nv_bfloat16> {
  static constexpr float kFar = 1.0f;
  uint32_t near, far;
  __device__ __forceinline__ explicit Int4Differences(uint32_t zeros) {
    near = __byte_perm(zeros, 0x43434343u, 0x4040), far = __byte_perm(zeros, 0x43434343u, 0x4141);
  }
  __device__ __forceinline__ void take(uint32_t (&a)[4], uint32_t word) const {
    const auto pair = [](uint32_t shifted) { return maskedWith<0x000f000fu>(shifted, 0x43004300u); };
    a[0] = subtractPairs<__nv_bfloat162>(pair(word), near);
    a[1] = subtractPairs<__nv_bfloat162>(pair(word >> 4), far);
    a[2] = subtractPairs<__nv_bfloat162>(pair(word >> 8), near);
    a[3] = subtractPairs<__nv_bfloat162>(pair(word >> 12), far);
  }
};

}  // namespace sinkexport
