// Weights that lie in shared memory as integers become left factors in registers (linear_wide.cuh).
//
// A lane's registers have k = 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of each 16, as the tokens in shared memory have their k
// in order: a lane reads two INT8 at a time. INT4 lie as other instructions want them, 8 consecutive k in one lane's 16
// bytes; here each lane picks its pairs out of four lanes' words. Both are swizzled by 64 bytes: no bank twice.
#pragma once

#include "linear_wide_shape.cuh"

#ifdef SINKEXPORT_HAS_WGMMA

namespace sinkexport {
namespace linear {

constexpr int kWideSteps = kManyChunk / 16;  // of 16 k in a stage

// By how many 16-byte pieces a row of 64 bytes is swizzled.
__device__ __forceinline__ int swizzleOf(int row) {
  return row / 2 % 4;
}

// rows: the tile's first of 16, of 64 bytes each.
template <typename Half>
__device__ __forceinline__ void takeInt8(uint32_t (&a)[kWideSteps][4], const unsigned char* rows, int lane) {
  const int g = lane / 4, t = lane % 4;
  const unsigned char* const row = rows + g * kManyChunk + 2 * t;
  const auto four = [](const unsigned char* at) {
    const uint32_t low = *reinterpret_cast<const uint16_t*>(at), high = *reinterpret_cast<const uint16_t*>(at + 8);
    return __byte_perm(low, high, 0x5410);
  };
#pragma unroll
  for (int s = 0; s < kWideSteps; ++s) {
    const unsigned char* const at = row + (s ^ swizzleOf(g)) * 16;
    int8ToHalves<Half>(four(at), a[s][0], a[s][2]);
    int8ToHalves<Half>(four(at + 8 * kManyChunk), a[s][1], a[s][3]);
  }
}

// INT4 of two rows to factors, (q - zero) * scale, rounded to halves once.
template <typename Half>
struct Int4Scaled;

template <>
struct Int4Scaled<__half> {
  __half2 near_zero, far_zero, near_scale, far_scale;
  // scales: float16, the near row's in the low half; zeros: the near row's in the lowest byte, the far one's in the
  // next.
  __device__ __forceinline__ Int4Scaled(uint32_t scales, uint32_t zeros) {
    const auto halves = [](uint32_t pair) { return *reinterpret_cast<const __half2*>(&pair); };
    near_zero = halves(__byte_perm(zeros, 0x64646464u, 0x4040));          // 1024 + zero
    far_zero = halves(__byte_perm(zeros << 4, 0, 0x4141) | 0xd400d400u);  // -(64 + zero)
    near_scale = halves(__byte_perm(scales, 0, 0x1010)), far_scale = halves(__byte_perm(scales, 0, 0x3232));
  }
  // word: q of the near row in bits 0 .. 3 of both halves, of the far row in bits 4 .. 7.
  __device__ __forceinline__ void take(uint32_t& near, uint32_t& far, uint32_t word) const {
    const uint32_t low = maskedWith<0x000f000fu>(word, 0x64006400u), high = maskedWith<0x00f000f0u>(word, 0x64006400u);
    const __half2 near_difference = __hsub2(*reinterpret_cast<const __half2*>(&low), near_zero);
    const __half2 sixteenth = __float2half2_rn(1.0f / 16.0f);
    const __half2 far_difference = __hfma2(*reinterpret_cast<const __half2*>(&high), sixteenth, far_zero);
    const __half2 scaled[] = {__hmul2(near_difference, near_scale), __hmul2(far_difference, far_scale)};
    near = reinterpret_cast<const uint32_t*>(scaled)[0], far = reinterpret_cast<const uint32_t*>(scaled)[1];
  }
};

// A float16 scale is a bfloat16 and a rest, whose product joins before the only rounding that matters.
template <>
struct Int4Scaled<__nv_bfloat16> {
  __nv_bfloat162 near_zero, far_zero, near_scale, far_scale, near_rest, far_rest;
  __device__ __forceinline__ Int4Scaled(uint32_t scales, uint32_t zeros) {
    const auto halves = [](uint32_t pair) { return *reinterpret_cast<const __nv_bfloat162*>(&pair); };
    near_zero = halves(__byte_perm(zeros, 0x43434343u, 0x4040));  // 128 + zero
    far_zero = halves(__byte_perm(zeros, 0x43434343u, 0x4141));
    float near, far;
    unpackHalves<__half>(scales, near, far);
    near_scale = __float2bfloat162_rn(near), far_scale = __float2bfloat162_rn(far);
    near_rest = __float2bfloat162_rn(near - __low2float(near_scale));
    far_rest = __float2bfloat162_rn(far - __low2float(far_scale));
  }
  __device__ __forceinline__ void take(uint32_t& near, uint32_t& far, uint32_t word) const {
    const auto scaled = [](uint32_t shifted, const auto& zero, const auto& scale, const auto& rest) {
      const uint32_t raised = maskedWith<0x000f000fu>(shifted, 0x43004300u);
      const __nv_bfloat162 difference = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&raised), zero);
      const __nv_bfloat162 pair = __hfma2(difference, scale, __hmul2(difference, rest));
      return *reinterpret_cast<const uint32_t*>(&pair);
    };
    near = scaled(word, near_zero, near_scale, near_rest);
    far = scaled(word >> 4, far_zero, far_scale, far_rest);
  }
};

// INT4 weights of a stage: tiles of 512 bytes, their scales, their zero points; of each tile one block for each 32 k
// (num_groups = 2), or one of all.
struct Int4Stage {
  const unsigned char *weights, *scales, *zeros;
  bool has_zeros;
  int num_groups;

  __device__ __forceinline__ uint32_t scalesOf(int tile, int which, int g) const {
    return reinterpret_cast<const uint32_t*>(scales + (tile * num_groups + which) * kInt4ScaleBytes)[g];
  }
  __device__ __forceinline__ uint32_t zerosOf(int tile, int which, int g) const {
    constexpr uint32_t kNone = 0x0808u;
    const unsigned char* const block = zeros + (tile * num_groups + which) * kInt4TileOutputs;
    return has_zeros ? reinterpret_cast<const uint16_t*>(block)[g] : kNone;
  }
};

// rows: the number of 16 rows. Of a gate and up in turn these are 8 of each, out of a tile of each.
template <typename Half>
__device__ __forceinline__ void takeInt4(uint32_t (&a)[kWideSteps][4], const Int4Stage& stage, int rows, bool is_gated,
                                         int lane) {
  const int g = lane / 4, t = lane % 4, odd = t % 2 * 8;
  const int near_tile = is_gated ? rows / 2 * 2 : rows, far_tile = is_gated ? near_tile + 1 : rows, side = rows % 2;
  const unsigned char* const words = stage.weights + g * kManyChunk + t / 2 * 4;
#pragma unroll
  for (int block = 0; block < 2; ++block) {  // of 32 k
    const int which = stage.num_groups > 1 ? block : 0;
    uint32_t scales = stage.scalesOf(near_tile, which, g), zeros = stage.zerosOf(near_tile, which, g);
    if (is_gated) {
      scales = __byte_perm(scales, stage.scalesOf(far_tile, which, g), side ? 0x7632 : 0x5410);
      zeros = __byte_perm(zeros, stage.zerosOf(far_tile, which, g), side ? 0x51 : 0x40);
    }
    const Int4Scaled<Half> scaled(scales, zeros);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = (j ^ swizzleOf(g)) * 16 + block * 8;
      uint32_t word = *reinterpret_cast<const uint32_t*>(words + near_tile * kInt4TileBytes + at) >> odd;
      if (is_gated) {
        const uint32_t far = *reinterpret_cast<const uint32_t*>(words + far_tile * kInt4TileBytes + at) >> odd;
        word = (word >> 4 * side & 0x000f000fu) | (far >> 4 * side << 4 & 0x00f000f0u);
      }
      uint32_t (&to)[4] = a[2 * block + j / 2];
      scaled.take(to[j % 2 * 2], to[j % 2 * 2 + 1], word);
    }
  }
}

}  // namespace linear
}  // namespace sinkexport

#endif
