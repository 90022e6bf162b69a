// simd.h's vectors as AVX-512 registers.
#pragma once

#include <immintrin.h>

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int kRows = 6, kTiles = 2, kFloatRows = 12, kFloatTiles = 2;
constexpr int kInt8Offset = 128;
#define SINKEXPORT_UNSIGNED_DOT

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Bytes {
  __m512i v;
};
struct Quad {
  __m512i v;
};

SINKEXPORT_INLINE __mmask16 firstLanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u);
}

SINKEXPORT_INLINE Floats load(const float* from) {
  return {_mm512_loadu_ps(from)};
}
SINKEXPORT_INLINE void store(float* to, Floats a) {
  _mm512_storeu_ps(to, a.v);
}
SINKEXPORT_INLINE Floats loadPart(const float* from, int64_t n) {
  return {_mm512_maskz_loadu_ps(firstLanes(n), from)};
}
SINKEXPORT_INLINE void storePart(float* to, Floats a, int64_t n) {
  _mm512_mask_storeu_ps(to, firstLanes(n), a.v);
}
SINKEXPORT_INLINE Floats loadHalf(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
SINKEXPORT_INLINE void storeHalf(uint16_t* to, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
SINKEXPORT_INLINE Floats loadBf16(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
SINKEXPORT_INLINE Ints loadInt8(const int8_t* from) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
SINKEXPORT_INLINE Ints loadUint8(const uint8_t* from) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
SINKEXPORT_INLINE void storeInt8(int8_t* to, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(a.v));
}
SINKEXPORT_INLINE void storeUint8(uint8_t* to, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a.v));
}
SINKEXPORT_INLINE Floats broadcast(float a) {
  return {_mm512_set1_ps(a)};
}
SINKEXPORT_INLINE Ints broadcastInt(int32_t a) {
  return {_mm512_set1_epi32(a)};
}

SINKEXPORT_INLINE Floats operator+(Floats a, Floats b) {
  return {_mm512_add_ps(a.v, b.v)};
}
SINKEXPORT_INLINE Floats operator-(Floats a, Floats b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
SINKEXPORT_INLINE Floats operator*(Floats a, Floats b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
SINKEXPORT_INLINE Floats operator/(Floats a, Floats b) {
  return {_mm512_div_ps(a.v, b.v)};
}
SINKEXPORT_INLINE Ints operator+(Ints a, Ints b) {
  return {_mm512_add_epi32(a.v, b.v)};
}
SINKEXPORT_INLINE Ints operator-(Ints a, Ints b) {
  return {_mm512_sub_epi32(a.v, b.v)};
}
SINKEXPORT_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
SINKEXPORT_INLINE Floats max(Floats a, Floats b) {
  return {_mm512_max_ps(a.v, b.v)};
}
SINKEXPORT_INLINE Floats min(Floats a, Floats b) {
  return {_mm512_min_ps(a.v, b.v)};
}
SINKEXPORT_INLINE Floats abs(Floats a) {
  return {_mm512_abs_ps(a.v)};
}
SINKEXPORT_INLINE Floats floor(Floats a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
SINKEXPORT_INLINE Floats ifLess(Floats a, Floats b, Floats yes, Floats no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
SINKEXPORT_INLINE float sqrt(float a) {
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(a)));
}
// Halves are added lane by lane, in the order of every simd_*.h.
SINKEXPORT_INLINE float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
SINKEXPORT_INLINE float largest(Floats a) {
  return _mm512_reduce_max_ps(a.v);
}
SINKEXPORT_INLINE Floats toFloats(Ints a) {
  return {_mm512_cvtepi32_ps(a.v)};
}
SINKEXPORT_INLINE Ints toInts(Floats a) {
  return {_mm512_cvtps_epi32(a.v)};
}
SINKEXPORT_INLINE Floats shiftExponent(Floats a, Ints n) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(n.v, 23)))};
}

SINKEXPORT_INLINE Bytes loadBytes(const void* from) {
  return {_mm512_loadu_si512(from)};
}
SINKEXPORT_INLINE Floats evenBf16(Bytes a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))};
}
SINKEXPORT_INLINE Floats oddBf16(Bytes a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
SINKEXPORT_INLINE void storeBytes(void* to, Bytes a) {
  _mm512_storeu_si512(to, a.v);
}
SINKEXPORT_INLINE Ints loadInts(const int32_t* from) {
  return {_mm512_loadu_si512(from)};
}
SINKEXPORT_INLINE void storeInts(int32_t* to, Ints a) {
  _mm512_storeu_si512(to, a.v);
}
SINKEXPORT_INLINE Bytes repeatByte(Ints a) {
  return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(0x01010101))};
}
SINKEXPORT_INLINE Bytes operator-(Bytes a, Bytes b) {
  return {_mm512_sub_epi8(a.v, b.v)};
}
SINKEXPORT_INLINE Bytes lowNibbles(Bytes a) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))};
}
SINKEXPORT_INLINE Bytes highNibbles(Bytes a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
SINKEXPORT_INLINE Quad loadQuad(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return {_mm512_set1_epi32(four)};
}
SINKEXPORT_INLINE Quad repeatQuad(int byte) {
  return {_mm512_set1_epi8(static_cast<char>(byte))};
}
SINKEXPORT_INLINE Ints dotSmall(Ints sum, Bytes a, Quad b) {
  return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
}
SINKEXPORT_INLINE Ints dotUnsigned(Ints sum, Quad a, Bytes b) {
  return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
}
SINKEXPORT_INLINE Bytes prepareInt8(Bytes a) {
  return {_mm512_xor_si512(a.v, _mm512_set1_epi8(-128))};
}
SINKEXPORT_INLINE Ints dotInt8(Ints sum, Bytes a, Quad b) {
  return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
}
SINKEXPORT_INLINE Ints minusProduct(Ints sum, Ints a, int32_t b) {
  // a is below 256, so that the upper 16 bits of each lane add nothing.
  return {_mm512_sub_epi32(sum.v, _mm512_madd_epi16(a.v, _mm512_set1_epi32(b & 0xffff)))};
}
SINKEXPORT_INLINE void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}
SINKEXPORT_INLINE void prefetchOnce(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_NTA);
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
