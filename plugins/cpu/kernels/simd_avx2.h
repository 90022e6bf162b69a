// simd.h's vectors as pairs of AVX2 registers.
#pragma once

#include <immintrin.h>

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int kRows = 4, kTiles = 1, kFloatRows = 6, kFloatTiles = 1;
#ifdef __AVXVNNI__
constexpr int kInt8Offset = 128;
#define SINKEXPORT_UNSIGNED_DOT
#else
constexpr int kInt8Offset = 0;
#endif

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};
struct Bytes {
  __m256i a, b;
};
struct Quad {
  __m256i v;
};

// All ones in the first n of 8 lanes.
SINKEXPORT_INLINE __m256i firstLanes(int64_t n) {
  const int count = n < 0 ? 0 : n > 8 ? 8 : static_cast<int>(n);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

SINKEXPORT_INLINE Floats load(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
SINKEXPORT_INLINE void store(float* to, Floats x) {
  _mm256_storeu_ps(to, x.a);
  _mm256_storeu_ps(to + 8, x.b);
}
SINKEXPORT_INLINE Floats loadPart(const float* from, int64_t n) {
  return {_mm256_maskload_ps(from, firstLanes(n)), _mm256_maskload_ps(from + 8, firstLanes(n - 8))};
}
SINKEXPORT_INLINE void storePart(float* to, Floats x, int64_t n) {
  _mm256_maskstore_ps(to, firstLanes(n), x.a);
  _mm256_maskstore_ps(to + 8, firstLanes(n - 8), x.b);
}
SINKEXPORT_INLINE __m128i load16(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}
SINKEXPORT_INLINE Floats loadHalf(const uint16_t* from) {
  return {_mm256_cvtph_ps(load16(from)), _mm256_cvtph_ps(load16(from + 8))};
}
SINKEXPORT_INLINE void storeHalf(uint16_t* to, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
SINKEXPORT_INLINE Floats loadBf16(const uint16_t* from) {
  const __m256i a = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(from)), 16);
  const __m256i b = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(from + 8)), 16);
  return {_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)};
}
SINKEXPORT_INLINE Ints loadInt8(const int8_t* from) {
  const __m128i all = load16(from);
  return {_mm256_cvtepi8_epi32(all), _mm256_cvtepi8_epi32(_mm_srli_si128(all, 8))};
}
SINKEXPORT_INLINE Ints loadUint8(const uint8_t* from) {
  const __m128i all = load16(from);
  return {_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))};
}
SINKEXPORT_INLINE void storeInt8(int8_t* to, Ints x) {
  // Packs work within halves of 128 bits: a0 b0 | a1 b1, then put in order.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
SINKEXPORT_INLINE void storeUint8(uint8_t* to, Ints x) {
  // Packs work within halves of 128 bits: a0 b0 | a1 b1, then put in order.
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
SINKEXPORT_INLINE Floats broadcast(float x) {
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
SINKEXPORT_INLINE Ints broadcastInt(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}

SINKEXPORT_INLINE Floats operator+(Floats x, Floats y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
SINKEXPORT_INLINE Floats operator-(Floats x, Floats y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
SINKEXPORT_INLINE Floats operator*(Floats x, Floats y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
SINKEXPORT_INLINE Floats operator/(Floats x, Floats y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
SINKEXPORT_INLINE Ints operator+(Ints x, Ints y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
SINKEXPORT_INLINE Ints operator-(Ints x, Ints y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
SINKEXPORT_INLINE Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
SINKEXPORT_INLINE Floats max(Floats x, Floats y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
SINKEXPORT_INLINE Floats min(Floats x, Floats y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
SINKEXPORT_INLINE Floats abs(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
SINKEXPORT_INLINE Floats floor(Floats x) {
  return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)};
}
SINKEXPORT_INLINE Floats ifLess(Floats x, Floats y, Floats yes, Floats no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
SINKEXPORT_INLINE float sqrt(float x) {
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
}
SINKEXPORT_INLINE float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
SINKEXPORT_INLINE float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
SINKEXPORT_INLINE Floats toFloats(Ints x) {
  return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)};
}
SINKEXPORT_INLINE Ints toInts(Floats x) {
  return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
}
SINKEXPORT_INLINE Floats shiftExponent(Floats x, Ints n) {
  const __m256i a = _mm256_add_epi32(_mm256_castps_si256(x.a), _mm256_slli_epi32(n.a, 23));
  const __m256i b = _mm256_add_epi32(_mm256_castps_si256(x.b), _mm256_slli_epi32(n.b, 23));
  return {_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)};
}

SINKEXPORT_INLINE Bytes loadBytes(const void* from) {
  const auto* halves = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
SINKEXPORT_INLINE Floats evenBf16(Bytes x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
SINKEXPORT_INLINE Floats oddBf16(Bytes x) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, upper)), _mm256_castsi256_ps(_mm256_and_si256(x.b, upper))};
}
SINKEXPORT_INLINE Bytes lowNibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
SINKEXPORT_INLINE Bytes highNibbles(Bytes x) {
  return lowNibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
SINKEXPORT_INLINE Quad loadQuad(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return {_mm256_set1_epi32(four)};
}
#ifdef __AVXVNNI__
SINKEXPORT_INLINE Ints dotSmall(Ints sum, Bytes x, Quad y) {
  return {_mm256_dpbusd_avx_epi32(sum.a, x.a, y.v), _mm256_dpbusd_avx_epi32(sum.b, x.b, y.v)};
}
SINKEXPORT_INLINE Ints dotUnsigned(Ints sum, Quad x, Bytes y) {
  return {_mm256_dpbusd_avx_epi32(sum.a, x.v, y.a), _mm256_dpbusd_avx_epi32(sum.b, x.v, y.b)};
}
SINKEXPORT_INLINE Quad repeatQuad(int byte) {
  return {_mm256_set1_epi8(static_cast<char>(byte))};
}
SINKEXPORT_INLINE void storeBytes(void* to, Bytes x) {
  auto* halves = static_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, x.a);
  _mm256_storeu_si256(halves + 1, x.b);
}
SINKEXPORT_INLINE Ints loadInts(const int32_t* from) {
  const auto* halves = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
SINKEXPORT_INLINE void storeInts(int32_t* to, Ints x) {
  auto* halves = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(halves, x.a);
  _mm256_storeu_si256(halves + 1, x.b);
}
SINKEXPORT_INLINE Bytes repeatByte(Ints x) {
  const __m256i ones = _mm256_set1_epi32(0x01010101);
  return {_mm256_mullo_epi32(x.a, ones), _mm256_mullo_epi32(x.b, ones)};
}
SINKEXPORT_INLINE Bytes operator-(Bytes x, Bytes y) {
  return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)};
}
SINKEXPORT_INLINE Bytes prepareInt8(Bytes x) {
  const __m256i offset = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(x.a, offset), _mm256_xor_si256(x.b, offset)};
}
SINKEXPORT_INLINE Ints dotInt8(Ints sum, Bytes x, Quad y) {
  return dotSmall(sum, x, y);
}
#else
// maddubs adds two products in 16 bits and saturates beyond 32767.
SINKEXPORT_INLINE __m256i addPairs(__m256i sum, __m256i unsigned_x, __m256i y) {
  const __m256i pairs = _mm256_maddubs_epi16(unsigned_x, y);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// At most 2 * 15 * 127.
SINKEXPORT_INLINE Ints dotSmall(Ints sum, Bytes x, Quad y) {
  return {addPairs(sum.a, x.a, y.v), addPairs(sum.b, x.b, y.v)};
}
SINKEXPORT_INLINE Bytes prepareInt8(Bytes x) {
  return x;
}
// |x| times y with x's sign: at most 2 * 127 * 127 = 32258.
SINKEXPORT_INLINE Ints dotInt8(Ints sum, Bytes x, Quad y) {
  return {addPairs(sum.a, _mm256_abs_epi8(x.a), _mm256_sign_epi8(y.v, x.a)),
          addPairs(sum.b, _mm256_abs_epi8(x.b), _mm256_sign_epi8(y.v, x.b))};
}
#endif
SINKEXPORT_INLINE Ints minusProduct(Ints sum, Ints x, int32_t y) {
  // x is below 256, so that the upper 16 bits of each lane add nothing.
  const __m256i factor = _mm256_set1_epi32(y & 0xffff);
  return {_mm256_sub_epi32(sum.a, _mm256_madd_epi16(x.a, factor)),
          _mm256_sub_epi32(sum.b, _mm256_madd_epi16(x.b, factor))};
}
SINKEXPORT_INLINE void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}
SINKEXPORT_INLINE void prefetchOnce(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_NTA);
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
