// simd.h's vectors as four of the compiler's own vectors of 16 bytes, which any processor with such registers has.
#pragma once

#include "half.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int kRows = 4, kTiles = 1, kFloatRows = 2, kFloatTiles = 1;
constexpr int kInt8Offset = 0;

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Short8 = int16_t __attribute__((vector_size(16)));

struct Floats {
  Float4 v[4];
};
struct Ints {
  Int4 v[4];
};
struct Bytes {
  Int4 v[4];
};
// Bytes 0 and 2, and bytes 1 and 3, in turns: what even and odd bytes of a lane are multiplied by.
struct Quad {
  Short8 even, odd;
};

#define SINKEXPORT_PARTS(Result, expression)              \
  Result result;                                          \
  for (int i = 0; i < 4; ++i) result.v[i] = (expression); \
  return result
#define SINKEXPORT_LANES(Result, expression)                          \
  Result result;                                                      \
  for (int i = 0; i < 16; ++i) result.v[i / 4][i % 4] = (expression); \
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
  for (int i = 0; i < n && i < 16; ++i) to[i] = a.v[i / 4][i % 4];
}
SINKEXPORT_INLINE Floats loadHalf(const uint16_t* from) {
  SINKEXPORT_LANES(Floats, floatOfHalf(from[i]));
}
SINKEXPORT_INLINE void storeHalf(uint16_t* to, Floats a) {
  for (int i = 0; i < 16; ++i) to[i] = halfOfFloat(a.v[i / 4][i % 4]);
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
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(a.v[i / 4][i % 4]);
}
SINKEXPORT_INLINE Floats broadcast(float a) {
  SINKEXPORT_PARTS(Floats, (Float4{a, a, a, a}));
}
SINKEXPORT_INLINE Ints broadcastInt(int32_t a) {
  SINKEXPORT_PARTS(Ints, (Int4{a, a, a, a}));
}

SINKEXPORT_INLINE Floats operator+(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, a.v[i] + b.v[i]);
}
SINKEXPORT_INLINE Floats operator-(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, a.v[i] - b.v[i]);
}
SINKEXPORT_INLINE Floats operator*(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, a.v[i] * b.v[i]);
}
SINKEXPORT_INLINE Floats operator/(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, a.v[i] / b.v[i]);
}
SINKEXPORT_INLINE Ints operator+(Ints a, Ints b) {
  SINKEXPORT_PARTS(Ints, a.v[i] + b.v[i]);
}
SINKEXPORT_INLINE Ints operator-(Ints a, Ints b) {
  SINKEXPORT_PARTS(Ints, a.v[i] - b.v[i]);
}
// Rounded twice: a library call for every lane would cost more than it gives.
SINKEXPORT_INLINE Floats fma(Floats a, Floats b, Floats c) {
  SINKEXPORT_PARTS(Floats, a.v[i] * b.v[i] + c.v[i]);
}
SINKEXPORT_INLINE Floats max(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
SINKEXPORT_INLINE Floats min(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
SINKEXPORT_INLINE Floats abs(Floats a) {
  SINKEXPORT_PARTS(Floats, (Float4)((Int4)a.v[i] & 0x7fffffff));
}
SINKEXPORT_INLINE Floats floor(Floats a) {
  SINKEXPORT_LANES(Floats, __builtin_floorf(a.v[i / 4][i % 4]));
}
SINKEXPORT_INLINE Floats ifLess(Floats a, Floats b, Floats yes, Floats no) {
  SINKEXPORT_PARTS(Floats, a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
SINKEXPORT_INLINE float sqrt(float a) {
  return __builtin_sqrtf(a);
}
SINKEXPORT_INLINE float sum(Floats a) {
  const Float4 four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
SINKEXPORT_INLINE float largest(Floats a) {
  float result = a.v[0][0];
  for (int i = 1; i < 16; ++i) result = a.v[i / 4][i % 4] > result ? a.v[i / 4][i % 4] : result;
  return result;
}
SINKEXPORT_INLINE Floats toFloats(Ints a) {
  SINKEXPORT_PARTS(Floats, __builtin_convertvector(a.v[i], Float4));
}
// Adding 1.5 * 2^23 rounds to nearest even in the last bits of the sum: for |a| < 2^22.
SINKEXPORT_INLINE Ints toInts(Floats a) {
  SINKEXPORT_PARTS(Ints, (Int4)(a.v[i] + 0x1.8p23f) - 0x4b400000);
}
SINKEXPORT_INLINE Floats shiftExponent(Floats a, Ints n) {
  SINKEXPORT_PARTS(Floats, (Float4)((Int4)a.v[i] + (n.v[i] << 23)));
}

SINKEXPORT_INLINE Bytes loadBytes(const void* from) {
  Bytes result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
SINKEXPORT_INLINE Floats evenBf16(Bytes a) {
  SINKEXPORT_PARTS(Floats, (Float4)(a.v[i] << 16));
}
SINKEXPORT_INLINE Floats oddBf16(Bytes a) {
  SINKEXPORT_PARTS(Floats, (Float4)(a.v[i] & static_cast<int32_t>(0xffff0000u)));
}
SINKEXPORT_INLINE Bytes lowNibbles(Bytes a) {
  SINKEXPORT_PARTS(Bytes, a.v[i] & 0x0f0f0f0f);
}
SINKEXPORT_INLINE Bytes highNibbles(Bytes a) {
  SINKEXPORT_PARTS(Bytes, a.v[i] >> 4 & 0x0f0f0f0f);
}
SINKEXPORT_INLINE Quad loadQuad(const int8_t* from) {
  const int16_t a = from[0], b = from[1], c = from[2], d = from[3];
  return {Short8{a, c, a, c, a, c, a, c}, Short8{b, d, b, d, b, d, b, d}};
}
// Products of two bytes and the sum of two such products fit 16 bits: 2 * 127 * 127 = 32258.
SINKEXPORT_INLINE Int4 dotOfLanes(Int4 sum, Int4 bytes, Quad b) {
  const Short8 pairs = (Short8)bytes;
  const Short8 products = (pairs << 8 >> 8) * b.even + (pairs >> 8) * b.odd;
  const Int4 both = (Int4)products;
  return sum + (both << 16 >> 16) + (both >> 16);
}
SINKEXPORT_INLINE Ints dotInt8(Ints sum, Bytes a, Quad b) {
  SINKEXPORT_PARTS(Ints, dotOfLanes(sum.v[i], a.v[i], b));
}
SINKEXPORT_INLINE Ints dotSmall(Ints sum, Bytes a, Quad b) {
  return dotInt8(sum, a, b);
}
SINKEXPORT_INLINE Bytes prepareInt8(Bytes a) {
  return a;
}
SINKEXPORT_INLINE Ints minusProduct(Ints sum, Ints a, int32_t b) {
  SINKEXPORT_PARTS(Ints, sum.v[i] - a.v[i] * b);
}
SINKEXPORT_INLINE void prefetch(const void* address) {
  __builtin_prefetch(address);
}
SINKEXPORT_INLINE void prefetchOnce(const void* address) {
  __builtin_prefetch(address);
}

#undef SINKEXPORT_LANES
#undef SINKEXPORT_PARTS

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
