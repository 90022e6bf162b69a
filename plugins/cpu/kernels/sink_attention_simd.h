// What attention needs of a processor beside simd.h.
//
//   kRegisters: Floats that fit into the registers; SINKEXPORT_WIDE_TILES: 32 of them
//   roundEven(Floats); timesPowerOf2(Floats x, Floats n): x * 2^n for whole n, 0 where that is below 2^-126
//   sumEach(Floats (&)[16]): lane i is the sum of vector i
//   transpose(Floats (&)[16]): lane i of vector j changes places with lane j of vector i
//   loadHalfPart, loadInt8Part: the first n lanes, the others 0; memory behind the n-th is not touched
//   With SINKEXPORT_BF16: packBf16(Floats first, Floats second): pairs of bfloat16, to nearest even; storeBf16(to, a):
//     16 bfloat16; dotBf16(Floats sum, Bytes a, Bytes b): sum + a.first * b.first + a.second * b.second;
//     broadcastPair(const void*): a pair in every lane
#pragma once

#include "simd.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

#if defined(SINKEXPORT_ISA_avx512_vnni) || defined(SINKEXPORT_ISA_avx512_bf16)
#define SINKEXPORT_WIDE_TILES
constexpr int kRegisters = 32;

SINKEXPORT_INLINE Floats roundEven(Floats a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SINKEXPORT_INLINE Floats timesPowerOf2(Floats a, Floats n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}
// Vectors are added in pairs, then parts of 128 bits.
SINKEXPORT_INLINE Floats sumEach(const Floats (&a)[16]) {
  __m512 x[8];
  for (int i = 0; i < 8; ++i) {  // lanes of 64 bits: a0 b0 a2 b2 .. + a1 b1 a3 b3 ..
    x[i] =
        _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i].v, a[2 * i + 1].v), _mm512_unpackhi_ps(a[2 * i].v, a[2 * i + 1].v));
  }
  __m512 y[4];
  for (int i = 0; i < 4; ++i) {  // each 128 bits hold sums of four vectors over that 128-bit part
    const __m512d low = _mm512_castps_pd(x[2 * i]), high = _mm512_castps_pd(x[2 * i + 1]);
    y[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(y[0], y[1], 0x88), _mm512_shuffle_f32x4(y[0], y[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(y[2], y[3], 0x88), _mm512_shuffle_f32x4(y[2], y[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}
SINKEXPORT_INLINE void transpose(Floats (&a)[16]) {
  __m512 x[16], y[16];
  for (int i = 0; i < 16; i += 2) {
    x[i] = _mm512_unpacklo_ps(a[i].v, a[i + 1].v);
    x[i + 1] = _mm512_unpackhi_ps(a[i].v, a[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {  // 128 bits of y[i + j]: column j, 4 + j, 8 + j, 12 + j of four vectors
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(x[i + j]), high = _mm512_castps_pd(x[i + 2 + j]);
      y[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      y[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(y[j], y[4 + j], 0x88),
                 high = _mm512_shuffle_f32x4(y[8 + j], y[12 + j], 0x88);
    const __m512 next = _mm512_shuffle_f32x4(y[j], y[4 + j], 0xdd),
                 last = _mm512_shuffle_f32x4(y[8 + j], y[12 + j], 0xdd);
    a[j].v = _mm512_shuffle_f32x4(low, high, 0x88);
    a[4 + j].v = _mm512_shuffle_f32x4(next, last, 0x88);
    a[8 + j].v = _mm512_shuffle_f32x4(low, high, 0xdd);
    a[12 + j].v = _mm512_shuffle_f32x4(next, last, 0xdd);
  }
}
SINKEXPORT_INLINE Floats loadHalfPart(const uint16_t* from, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(firstLanes(n), from))};
}
SINKEXPORT_INLINE Ints loadInt8Part(const int8_t* from, int64_t n) {
  return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(firstLanes(n), from))};
}
#else

#if defined(SINKEXPORT_ISA_avx2) || defined(SINKEXPORT_ISA_avx2_vnni)
constexpr int kRegisters = 8;

SINKEXPORT_INLINE __m256 sumEight(const Floats* a) {
  __m256 x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm256_hadd_ps(a[2 * i].a + a[2 * i].b, a[2 * i + 1].a + a[2 * i + 1].b);
  const __m256 low = _mm256_hadd_ps(x[0], x[1]), high = _mm256_hadd_ps(x[2], x[3]);
  return _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31);
}
SINKEXPORT_INLINE Floats sumEach(const Floats (&a)[16]) {
  return {sumEight(a), sumEight(a + 8)};
}
#elif defined(SINKEXPORT_ISA_neon_dot) || defined(SINKEXPORT_ISA_neon_i8mm)
constexpr int kRegisters = 8;

SINKEXPORT_INLINE Floats sumEach(const Floats (&a)[16]) {
  Floats result;
  for (int i = 0; i < 4; ++i) {
    float32x4_t x[4];
    for (int j = 0; j < 4; ++j) {
      const Floats& one = a[4 * i + j];
      x[j] = vaddq_f32(vaddq_f32(one.v[0], one.v[1]), vaddq_f32(one.v[2], one.v[3]));
    }
    result.v[i] = vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
  }
  return result;
}
#else
constexpr int kRegisters = 4;

SINKEXPORT_INLINE Floats sumEach(const Floats (&a)[16]) {
  float sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = sum(a[i]);
  return load(sums);
}
#endif

SINKEXPORT_INLINE void transpose(Floats (&a)[16]) {
  float rows[16][16];
  for (int i = 0; i < 16; ++i) store(rows[i], a[i]);
  for (int i = 0; i < 16; ++i) {
    float column[16];
    for (int j = 0; j < 16; ++j) column[j] = rows[j][i];
    a[i] = load(column);
  }
}
SINKEXPORT_INLINE Floats roundEven(Floats a) {
  return toFloats(toInts(a));
}
SINKEXPORT_INLINE Floats timesPowerOf2(Floats a, Floats n) {
  return shiftExponent(a, toInts(n));
}
SINKEXPORT_INLINE Floats loadHalfPart(const uint16_t* from, int64_t n) {
  uint16_t lanes[16] = {};
  for (int64_t i = 0; i < n && i < 16; ++i) lanes[i] = from[i];
  return loadHalf(lanes);
}
SINKEXPORT_INLINE Ints loadInt8Part(const int8_t* from, int64_t n) {
  int8_t lanes[16] = {};
  for (int64_t i = 0; i < n && i < 16; ++i) lanes[i] = from[i];
  return loadInt8(lanes);
}
#endif

#if defined(SINKEXPORT_ISA_avx512_bf16)
#define SINKEXPORT_BF16
SINKEXPORT_INLINE Bytes packBf16(Floats first, Floats second) {
  const __m512i apart = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, apart)};
}
SINKEXPORT_INLINE void storeBf16(uint16_t* to, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
SINKEXPORT_INLINE Bytes broadcastPair(const void* from) {
  int32_t pair;
  std::memcpy(&pair, from, 4);
  return {_mm512_set1_epi32(pair)};
}
SINKEXPORT_INLINE Floats dotBf16(Floats sum, Bytes a, Bytes b) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
