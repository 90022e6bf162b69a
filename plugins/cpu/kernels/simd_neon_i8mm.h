// Two rows of x by two outputs and 8 inputs in one instruction (smmla), for linear_tile.h.
#pragma once

#include <arm_neon.h>

#include "simd_neon.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

// 16 outputs of 8 inputs as pairs of outputs: each register holds 8 inputs of one and 8 of the next.
struct OutputPairs {
  int8x16_t v[8];
};

SINKEXPORT_INLINE OutputPairs outputPairs(Bytes first, Bytes second) {
  OutputPairs result;
  for (int i = 0; i < 4; ++i) {
    const int32x4_t a = vreinterpretq_s32_u8(first.v[i]), b = vreinterpretq_s32_u8(second.v[i]);
    result.v[2 * i] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    result.v[2 * i + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
  }
  return result;
}

// Rows r and r + 1 of two quads: 8 inputs of one row and 8 of the next.
SINKEXPORT_INLINE int8x16_t rowPair(const int8_t* first, const int8_t* second) {
  const int32x2_t a = vreinterpret_s32_s8(vld1_s8(first)), b = vreinterpret_s32_s8(vld1_s8(second));
  return vreinterpretq_s8_s32(vcombine_s32(vzip1_s32(a, b), vzip2_s32(a, b)));
}

// Exact sums of `steps` quads of an even number of rows with 16 outputs, added to `sum`.
template <bool is_int4, int rows>
SINKEXPORT_INLINE void addRowPairs(int64_t steps, const int8_t* x, const char* weight, int64_t ahead,
                                   Ints (&sum)[rows]) {
  int32x4_t squares[rows / 2][8];  // [r o, r o+1, r+1 o, r+1 o+1]
  for (int p = 0; p < rows / 2; ++p) {
    for (int i = 0; i < 8; ++i) squares[p][i] = vdupq_n_s32(0);
  }
  int64_t k = 0;
  for (; k + 2 <= steps; k += 2, x += 8 * rows, weight += is_int4 ? 64 : 128) {
    prefetch(weight + ahead);
    const Bytes first = loadBytes(weight);
    const OutputPairs w =
        is_int4 ? outputPairs(lowNibbles(first), highNibbles(first)) : outputPairs(first, loadBytes(weight + 64));
    for (int p = 0; p < rows / 2; ++p) {
      const int8x16_t pair = rowPair(x + 8 * p, x + 4 * rows + 8 * p);
      for (int i = 0; i < 8; ++i) squares[p][i] = vmmlaq_s32(squares[p][i], pair, w.v[i]);
    }
  }
  for (int p = 0; p < rows / 2; ++p) {
    for (int i = 0; i < 4; ++i) {
      const int64x2_t a = vreinterpretq_s64_s32(squares[p][2 * i]), b = vreinterpretq_s64_s32(squares[p][2 * i + 1]);
      sum[2 * p].v[i] = vaddq_s32(sum[2 * p].v[i], vreinterpretq_s32_s64(vzip1q_s64(a, b)));
      sum[2 * p + 1].v[i] = vaddq_s32(sum[2 * p + 1].v[i], vreinterpretq_s32_s64(vzip2q_s64(a, b)));
    }
  }
  if (k < steps) {  // int8 alone: int4 has an even number
    for (int r = 0; r < rows; ++r) sum[r] = dotInt8(sum[r], loadBytes(weight), loadQuad(x + 4 * r));
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
