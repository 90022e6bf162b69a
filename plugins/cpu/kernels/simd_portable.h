// simd.h's vectors as arrays of 16, for any processor.
#pragma once

#include "half.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int kRows = 4, kTiles = 1, kFloatRows = 4, kFloatTiles = 1;
constexpr int kInt8Offset = 0;

struct Floats {
  float lane[16];
};
struct Ints {
  int32_t lane[16];
};
struct Bytes {
  uint8_t lane[64];
};
struct Quad {
  int8_t byte[4];
};

#define SINKEXPORT_LANES(Result, expression)                  \
  Result result;                                              \
  for (int i = 0; i < 16; ++i) result.lane[i] = (expression); \
  return result

SINKEXPORT_INLINE Floats load(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
SINKEXPORT_INLINE void store(float* to, Floats a) {
  std::memcpy(to, &a, sizeof a);
}
SINKEXPORT_INLINE Floats loadPart(const float* from, int64_t n) {
  SINKEXPORT_LANES(Floats, i < n ? from[i] : 0.0f);
}
SINKEXPORT_INLINE void storePart(float* to, Floats a, int64_t n) {
  for (int i = 0; i < n && i < 16; ++i) to[i] = a.lane[i];
}
SINKEXPORT_INLINE Floats loadHalf(const uint16_t* from) {
  SINKEXPORT_LANES(Floats, floatOfHalf(from[i]));
}
SINKEXPORT_INLINE void storeHalf(uint16_t* to, Floats a) {
  for (int i = 0; i < 16; ++i) to[i] = halfOfFloat(a.lane[i]);
}
SINKEXPORT_INLINE Floats loadBf16(const uint16_t* from) {
  SINKEXPORT_LANES(Floats, floatOfBits(static_cast<uint32_t>(from[i]) << 16));
}
SINKEXPORT_INLINE Ints loadInt8(const int8_t* from) {
  SINKEXPORT_LANES(Ints, from[i]);
}
SINKEXPORT_INLINE Ints loadUint8(const uint8_t* from) {
  SINKEXPORT_LANES(Ints, from[i]);
}
SINKEXPORT_INLINE void storeInt8(int8_t* to, Ints a) {
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(a.lane[i]);
}
SINKEXPORT_INLINE Floats broadcast(float a) {
  SINKEXPORT_LANES(Floats, a);
}
SINKEXPORT_INLINE Ints broadcastInt(int32_t a) {
  SINKEXPORT_LANES(Ints, a);
}

SINKEXPORT_INLINE Floats operator+(Floats a, Floats b) {
  SINKEXPORT_LANES(Floats, a.lane[i] + b.lane[i]);
}
SINKEXPORT_INLINE Floats operator-(Floats a, Floats b) {
  SINKEXPORT_LANES(Floats, a.lane[i] - b.lane[i]);
}
SINKEXPORT_INLINE Floats operator*(Floats a, Floats b) {
  SINKEXPORT_LANES(Floats, a.lane[i] * b.lane[i]);
}
SINKEXPORT_INLINE Floats operator/(Floats a, Floats b) {
  SINKEXPORT_LANES(Floats, a.lane[i] / b.lane[i]);
}
SINKEXPORT_INLINE Ints operator+(Ints a, Ints b) {
  SINKEXPORT_LANES(Ints, a.lane[i] + b.lane[i]);
}
SINKEXPORT_INLINE Ints operator-(Ints a, Ints b) {
  SINKEXPORT_LANES(Ints, a.lane[i] - b.lane[i]);
}
// Rounded twice: a library call for every lane would cost more than it gives.
SINKEXPORT_INLINE Floats fma(Floats a, Floats b, Floats c) {
  SINKEXPORT_LANES(Floats, a.lane[i] * b.lane[i] + c.lane[i]);
}
SINKEXPORT_INLINE Floats max(Floats a, Floats b) {
  SINKEXPORT_LANES(Floats, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
}
SINKEXPORT_INLINE Floats min(Floats a, Floats b) {
  SINKEXPORT_LANES(Floats, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]);
}
SINKEXPORT_INLINE Floats abs(Floats a) {
  SINKEXPORT_LANES(Floats, __builtin_fabsf(a.lane[i]));
}
SINKEXPORT_INLINE Floats floor(Floats a) {
  SINKEXPORT_LANES(Floats, __builtin_floorf(a.lane[i]));
}
SINKEXPORT_INLINE Floats ifLess(Floats a, Floats b, Floats yes, Floats no) {
  SINKEXPORT_LANES(Floats, a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]);
}
SINKEXPORT_INLINE float sqrt(float a) {
  return __builtin_sqrtf(a);
}
SINKEXPORT_INLINE float sum(Floats a) {
  float half[8];
  for (int i = 0; i < 8; ++i) half[i] = a.lane[i] + a.lane[i + 8];
  for (int i = 0; i < 4; ++i) half[i] += half[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}
SINKEXPORT_INLINE float largest(Floats a) {
  float result = a.lane[0];
  for (int i = 1; i < 16; ++i) result = a.lane[i] > result ? a.lane[i] : result;
  return result;
}
SINKEXPORT_INLINE Floats toFloats(Ints a) {
  SINKEXPORT_LANES(Floats, static_cast<float>(a.lane[i]));
}
// Adding 1.5 * 2^23 rounds to nearest even in the last bits of the sum: for |a| < 2^22.
SINKEXPORT_INLINE Ints toInts(Floats a) {
  SINKEXPORT_LANES(Ints, static_cast<int32_t>(bitsOfFloat(a.lane[i] + 0x1.8p23f)) - 0x4b400000);
}
SINKEXPORT_INLINE Floats shiftExponent(Floats a, Ints n) {
  SINKEXPORT_LANES(Floats, floatOfBits(bitsOfFloat(a.lane[i]) + (static_cast<uint32_t>(n.lane[i]) << 23)));
}

SINKEXPORT_INLINE Bytes loadBytes(const void* from) {
  Bytes result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
SINKEXPORT_INLINE Floats evenBf16(Bytes a) {
  SINKEXPORT_LANES(
      Floats, floatOfBits(static_cast<uint32_t>(a.lane[4 * i]) << 16 | static_cast<uint32_t>(a.lane[4 * i + 1]) << 24));
}
SINKEXPORT_INLINE Floats oddBf16(Bytes a) {
  SINKEXPORT_LANES(Floats, floatOfBits(static_cast<uint32_t>(a.lane[4 * i + 2]) << 16 |
                                       static_cast<uint32_t>(a.lane[4 * i + 3]) << 24));
}
SINKEXPORT_INLINE Bytes lowNibbles(Bytes a) {
  for (int i = 0; i < 64; ++i) a.lane[i] &= 15;
  return a;
}
SINKEXPORT_INLINE Bytes highNibbles(Bytes a) {
  for (int i = 0; i < 64; ++i) a.lane[i] >>= 4;
  return a;
}
SINKEXPORT_INLINE Quad loadQuad(const int8_t* from) {
  Quad result;
  std::memcpy(&result, from, 4);
  return result;
}
SINKEXPORT_INLINE Ints dotSmall(Ints sum, Bytes a, Quad b) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) sum.lane[i] += a.lane[4 * i + j] * b.byte[j];
  }
  return sum;
}
SINKEXPORT_INLINE Bytes prepareInt8(Bytes a) {
  return a;
}
SINKEXPORT_INLINE Ints dotInt8(Ints sum, Bytes a, Quad b) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) sum.lane[i] += static_cast<int8_t>(a.lane[4 * i + j]) * b.byte[j];
  }
  return sum;
}
SINKEXPORT_INLINE Ints minusProduct(Ints sum, Ints a, int32_t b) {
  SINKEXPORT_LANES(Ints, sum.lane[i] - a.lane[i] * b);
}
SINKEXPORT_INLINE void prefetch(const void* address) {
  __builtin_prefetch(address);
}

#undef SINKEXPORT_LANES

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
