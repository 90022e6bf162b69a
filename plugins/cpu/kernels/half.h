// float16 in plain C++, for processors and places without an instruction for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace sinkexport::cpu {

// Inlined always: the linker could keep a copy that was compiled for a newer processor (simd.h).
#define SINKEXPORT_ALWAYS_INLINE inline __attribute__((always_inline))

SINKEXPORT_ALWAYS_INLINE float floatOfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
SINKEXPORT_ALWAYS_INLINE uint32_t bitsOfFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
SINKEXPORT_ALWAYS_INLINE float floatOfHalf(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return floatOfBits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Exponents differ by 112; multiplying makes subnormals normal.
  return floatOfBits(sign | bitsOfFloat(floatOfBits(rest << 13) * 0x1p112f));
}
SINKEXPORT_ALWAYS_INLINE uint16_t halfOfFloat(float value) {
  const uint32_t bits = bitsOfFloat(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {  // subnormal: the unit of 0.5f is a half's smallest step
    return static_cast<uint16_t>(sign | (bitsOfFloat(floatOfBits(rest) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (((rest + 0xfffu + (rest >> 13 & 1u)) >> 13) - 0x1c000u));
}

#undef SINKEXPORT_ALWAYS_INLINE

}  // namespace sinkexport::cpu
