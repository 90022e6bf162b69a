// The online softmax of a warp's rows, and what makes the output of their sums.
#pragma once

#include <cuda_runtime.h>

#include "half_pairs.cuh"
#include "sink_attention_tile.cuh"

namespace sinkexport {
namespace sink_attention {

// Weights are 2^(kBias + logit - base), where no logit is more than kSlack above the base: so sums need not be scaled
// down for every new largest logit. Weights of up to 64 keep weight * scale of small int8 rows out of float16's
// denormals; the largest scale of a float16 row is 516, so that 64 * scale does not overflow either.
constexpr float kBias = 4.0f, kSlack = 2.0f;
constexpr float kLog2E = 1.4426950408889634f;

// 2^x; 0 for -inf. Relative error 2^-22.
__device__ inline float exp2Fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A row's sums: weights were 2^(logit - base + kBias) of logits in units of log2(e).
struct RowSums {
  float base = -INFINITY;
  float sum = 0.0f;
};

// Factor on a row's weighted sum of values, with the logit that has no value taken in.
__device__ inline float normaliser(RowSums sums, const float* sink_logit, int head) {
  if (sink_logit == nullptr) return sums.sum > 0.0f ? 1.0f / sums.sum : 0.0f;
  const float extra = sink_logit[head] * kLog2E;
  const float base = fmaxf(sums.base, extra);
  if (base == -INFINITY) return 0.0f;
  const float factor = exp2Fast(sums.base - base);
  return factor / (sums.sum * factor + exp2Fast(extra - base + kBias));
}

// row: of [B, Hq, T]. value: of dimensions d (even) and d + 1, normalised.
template <typename Half>
__device__ void storeOut(const SinkAttentionParams& p, size_t row, int d, float2 value) {
  if (p.gate != nullptr) {
    const auto* gate = static_cast<const Half*>(p.gate) + row * p.gate_dim;
    const auto factor = [&](int i) { return 1.0f / (1.0f + __expf(-toFloat(gate[p.gate_dim == 1 ? 0 : d + i]))); };
    value.x *= factor(0), value.y *= factor(1);
  }
  *reinterpret_cast<uint32_t*>(static_cast<Half*>(p.out) + row * p.head_dim + d) = packHalves<Half>(value.x, value.y);
}

// The rows that a thread has, 2c and 2c+1 of each row tile, as far as its warp has summed them.
template <typename C>
struct Rows {
  using Half = typename C::Half;

  int token[C::kRowTiles][2];
  int first_token, last_token;  // of the warp's rows
  float slope[C::kRowTiles][2], sink_scale_log2[C::kRowTiles][2];
  RowSums sums[C::kRowTiles][2];
  float out[C::kRowTiles][C::kOutTiles][4];
  float logit_scale;  // factor on q . k: to logits in units of log2(e), or to what the softcap's tanh is of

  __device__ Rows(const SinkAttentionParams& p, const Place<C>& at) {
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = min(at.row_begin + at.warp_row + 8 * r + 2 * at.c + j, at.num_rows - 1), head = at.headOf(row);
        token[r][j] = at.tokenOf(row);
        slope[r][j] = p.alibi_slopes != nullptr ? p.alibi_slopes[head] * kLog2E : 0.0f;
        sink_scale_log2[r][j] = p.sink_scale != nullptr ? __log2f(p.sink_scale[head]) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < C::kOutTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out[r][i][j] = 0.0f;
      }
    }
    const int first_row = at.row_begin + at.warp_row;
    first_token = at.tokenOf(min(first_row, at.num_rows - 1));
    last_token = at.tokenOf(min(first_row + C::kWarpRows, at.num_rows) - 1);
    logit_scale = p.softcap != 0.0f ? p.scale / p.softcap : p.scale * kLog2E;
  }

  // Whether logits are q . k times a factor.
  __device__ static bool isPlain(const SinkAttentionParams& p) {
    return p.softcap == 0.0f && p.alibi_slopes == nullptr && p.sink_scale == nullptr;
  }

  // Makes the base of row tile r high enough for a thread's largest logits, and its sums smaller where it rises.
  __device__ void raiseBase(int r, float (&largest)[2]) {
    bool rises = false;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
        largest[j] = fmaxf(largest[j], __shfl_xor_sync(kAllLanes, largest[j], other));
      }
      rises = rises || largest[j] > sums[r][j].base + kSlack;
    }
    if (__any_sync(kAllLanes, rises)) {
      float shrink[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float base = fmaxf(sums[r][j].base, largest[j]);
        shrink[j] = base == -INFINITY ? 0.0f : exp2Fast(sums[r][j].base - base);
        sums[r][j].base = base;
        sums[r][j].sum *= shrink[j];
      }
#pragma unroll
      for (int i = 0; i < C::kOutTiles; ++i) {
        out[r][i][0] *= shrink[0], out[r][i][2] *= shrink[0];
        out[r][i][1] *= shrink[1], out[r][i][3] *= shrink[1];
      }
    }
  }

  // Weights of the logits of row tile r, times the values' scales, transposed, and their sum.
  template <bool kInt8Tile, int kGroups>
  __device__ void weigh(int r, const float (&logits)[kGroups][2], bool has_scales, const float (&value_scale)[kGroups],
                        uint32_t (&weights)[kGroups]) {
    float offset[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) offset[j] = kBias - (sums[r][j].base == -INFINITY ? 0.0f : sums[r][j].base);
    // The sum is of weights as they were rounded, so that their errors shift nothing on average; with scales, whose
    // division is slow, in bfloat16 only: float16's errors are of the output's own size.
    constexpr bool kSumsRounded = !kInt8Tile || std::is_same_v<Half, __nv_bfloat16>;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float weight[2], rounded[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        weight[j] = exp2Fast(logits[group][j] + offset[j]);
        if (!kSumsRounded) sums[r][j].sum += weight[j];
        // A row that is not there may have any scale, NaN too.
        if (has_scales && weight[j] != 0.0f) weight[j] *= value_scale[group];
      }
      const uint32_t pair = packHalves<Half>(weight[0], weight[1]);
      weights[group] = transposed(pair);
      if (!kSumsRounded) continue;
      unpackHalves<Half>(pair, rounded[0], rounded[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (has_scales && rounded[j] != 0.0f) rounded[j] = __fdividef(rounded[j], value_scale[group]);
        sums[r][j].sum += rounded[j];
      }
    }
  }

  // The warp's sums to shared memory, where all warps' meet.
  __device__ void store(const Place<C>& at, const Shared<C>& memory) const {
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = sums[r][j].sum;
#pragma unroll
        for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(kAllLanes, sum, other);
        if (at.g == 0) memory.sums[at.warp * C::kWarpRows + 8 * r + 2 * at.c + j] = make_float2(sums[r][j].base, sum);
      }
      float* target = memory.outs + (at.warp * C::kWarpRows + 8 * r + 2 * at.c) * C::kHeadDim;
#pragma unroll
      for (int i = 0; i < C::kOutTiles; ++i) {
        const int d = C::outDim(i, at.g);
        *reinterpret_cast<float2*>(target + d) = make_float2(out[r][i][0], out[r][i][2]);
        *reinterpret_cast<float2*>(target + C::kHeadDim + d) = make_float2(out[r][i][1], out[r][i][3]);
      }
    }
  }
};

}  // namespace sink_attention
}  // namespace sinkexport
