// simd.h's vectors as four NEON registers each.
#pragma once

#include <arm_neon.h>

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int kRows = 4, kTiles = 1, kFloatRows = 6, kFloatTiles = 1;
constexpr int kInt8Offset = 0;

struct Floats {
  float32x4_t v[4];
};
struct Ints {
  int32x4_t v[4];
};
struct Bytes {
  uint8x16_t v[4];
};
struct Quad {
  int8x16_t v;
};

#define SINKEXPORT_PARTS(Result, expression)              \
  Result result;                                          \
  for (int i = 0; i < 4; ++i) result.v[i] = (expression); \
  return result

SINKEXPORT_INLINE Floats load(const float* from) {
  SINKEXPORT_PARTS(Floats, vld1q_f32(from + 4 * i));
}
SINKEXPORT_INLINE void store(float* to, Floats a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, a.v[i]);
}
SINKEXPORT_INLINE Floats loadPart(const float* from, int64_t n) {
  float all[16] = {};
  for (int64_t i = 0; i < n && i < 16; ++i) all[i] = from[i];
  return load(all);
}
SINKEXPORT_INLINE void storePart(float* to, Floats a, int64_t n) {
  float all[16];
  store(all, a);
  for (int64_t i = 0; i < n && i < 16; ++i) to[i] = all[i];
}
SINKEXPORT_INLINE Floats loadHalf(const uint16_t* from) {
  SINKEXPORT_PARTS(Floats, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i))));
}
SINKEXPORT_INLINE void storeHalf(uint16_t* to, Floats a) {
  for (int i = 0; i < 4; ++i) vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
SINKEXPORT_INLINE Floats loadBf16(const uint16_t* from) {
  SINKEXPORT_PARTS(Floats, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)));
}
SINKEXPORT_INLINE Ints loadInt8(const int8_t* from) {
  const int8x16_t all = vld1q_s8(from);
  const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_high_s8(all);
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
SINKEXPORT_INLINE Ints loadUint8(const uint8_t* from) {
  const uint8x16_t all = vld1q_u8(from);
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(all)));
  const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(all));
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
SINKEXPORT_INLINE void storeInt8(int8_t* to, Ints a) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(a.v[0]), vqmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(a.v[2]), vqmovn_s32(a.v[3]));
  vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
SINKEXPORT_INLINE Floats broadcast(float a) {
  SINKEXPORT_PARTS(Floats, vdupq_n_f32(a));
}
SINKEXPORT_INLINE Ints broadcastInt(int32_t a) {
  SINKEXPORT_PARTS(Ints, vdupq_n_s32(a));
}

SINKEXPORT_INLINE Floats operator+(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, vaddq_f32(a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Floats operator-(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, vsubq_f32(a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Floats operator*(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, vmulq_f32(a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Floats operator/(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, vdivq_f32(a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Ints operator+(Ints a, Ints b) {
  SINKEXPORT_PARTS(Ints, vaddq_s32(a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Ints operator-(Ints a, Ints b) {
  SINKEXPORT_PARTS(Ints, vsubq_s32(a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Floats fma(Floats a, Floats b, Floats c) {
  SINKEXPORT_PARTS(Floats, vfmaq_f32(c.v[i], a.v[i], b.v[i]));
}
// By comparison, as x86 does: b if either is not a number.
SINKEXPORT_INLINE Floats max(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Floats min(Floats a, Floats b) {
  SINKEXPORT_PARTS(Floats, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
SINKEXPORT_INLINE Floats abs(Floats a) {
  SINKEXPORT_PARTS(Floats, vabsq_f32(a.v[i]));
}
SINKEXPORT_INLINE Floats floor(Floats a) {
  SINKEXPORT_PARTS(Floats, vrndmq_f32(a.v[i]));
}
SINKEXPORT_INLINE Floats ifLess(Floats a, Floats b, Floats yes, Floats no) {
  SINKEXPORT_PARTS(Floats, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]));
}
SINKEXPORT_INLINE float sqrt(float a) {
  return vget_lane_f32(vsqrt_f32(vdup_n_f32(a)), 0);
}
SINKEXPORT_INLINE float sum(Floats a) {
  const float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
SINKEXPORT_INLINE float largest(Floats a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
SINKEXPORT_INLINE Floats toFloats(Ints a) {
  SINKEXPORT_PARTS(Floats, vcvtq_f32_s32(a.v[i]));
}
SINKEXPORT_INLINE Ints toInts(Floats a) {
  SINKEXPORT_PARTS(Ints, vcvtnq_s32_f32(a.v[i]));
}
SINKEXPORT_INLINE Floats shiftExponent(Floats a, Ints n) {
  SINKEXPORT_PARTS(Floats, vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a.v[i]), vshlq_n_s32(n.v[i], 23))));
}

SINKEXPORT_INLINE Bytes loadBytes(const void* from) {
  SINKEXPORT_PARTS(Bytes, vld1q_u8(static_cast<const uint8_t*>(from) + 16 * i));
}
SINKEXPORT_INLINE Floats evenBf16(Bytes a) {
  SINKEXPORT_PARTS(Floats, vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(a.v[i]), 16)));
}
SINKEXPORT_INLINE Floats oddBf16(Bytes a) {
  SINKEXPORT_PARTS(Floats, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(a.v[i]), vdupq_n_u32(0xffff0000u))));
}
SINKEXPORT_INLINE Bytes lowNibbles(Bytes a) {
  SINKEXPORT_PARTS(Bytes, vandq_u8(a.v[i], vdupq_n_u8(15)));
}
SINKEXPORT_INLINE Bytes highNibbles(Bytes a) {
  SINKEXPORT_PARTS(Bytes, vshrq_n_u8(a.v[i], 4));
}
SINKEXPORT_INLINE Quad loadQuad(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  return {vreinterpretq_s8_s32(vdupq_n_s32(four))};
}
SINKEXPORT_INLINE Ints dotInt8(Ints sum, Bytes a, Quad b) {
  SINKEXPORT_PARTS(Ints, vdotq_s32(sum.v[i], vreinterpretq_s8_u8(a.v[i]), b.v));
}
SINKEXPORT_INLINE Ints dotSmall(Ints sum, Bytes a, Quad b) {
  return dotInt8(sum, a, b);
}
SINKEXPORT_INLINE Bytes prepareInt8(Bytes a) {
  return a;
}
SINKEXPORT_INLINE Ints minusProduct(Ints sum, Ints a, int32_t b) {
  SINKEXPORT_PARTS(Ints, vmlsq_n_s32(sum.v[i], a.v[i], b));
}
SINKEXPORT_INLINE void prefetch(const void* address) {
  __builtin_prefetch(address);
}
SINKEXPORT_INLINE void prefetchOnce(const void* address) {
  __builtin_prefetch(address);
}

#undef SINKEXPORT_PARTS

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
