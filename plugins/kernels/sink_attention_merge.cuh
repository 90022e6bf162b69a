// The merge of what the splits of the cache gave.
#pragma once

#include "overlap.cuh"
#include "sink_attention_softmax.cuh"

namespace sinkexport {
namespace sink_attention {

constexpr int kMergeThreads = 128, kMergeWarps = kMergeThreads / kWarpSize;

// A block for each row of [B, Hq, T].
template <typename Half>
__global__ void __launch_bounds__(kMergeThreads) mergeSplits(const __grid_constant__ AttendArgs args) {
  extern __shared__ float outs[];  // [kMergeWarps, D]
  waitForEarlierKernels();
  allowNextKernel();
  const SinkAttentionParams& p = args.p;
  const size_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float2* sums = args.partial_sums + row * args.num_splits;
  const float* partials = args.partial_out + row * args.num_splits * p.head_dim;
  constexpr int kMostPieces = 2;  // of 128 dimensions, 4 a lane
  constexpr int kAtOnce = 4;      // splits a warp reads before it needs the first
  auto read = [&](int split, float2& sum, float4(&x)[kMostPieces]) {
    const bool is_there = split < args.num_splits;
    sum = is_there ? sums[split] : make_float2(-INFINITY, 0.0f);
#pragma unroll
    for (int i = 0; i < kMostPieces; ++i) {
      const int d = 4 * (32 * i + lane);
      x[i] = is_there && d < p.head_dim
                 ? *reinterpret_cast<const float4*>(partials + static_cast<size_t>(split) * p.head_dim + d)
                 : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  };
  float2 sum[kAtOnce];
  float4 x[kAtOnce][kMostPieces];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) read(warp + kMergeWarps * i, sum[i], x[i]);

  RowSums all;
  for (int split = lane; split < args.num_splits; split += 32) all.base = fmaxf(all.base, sums[split].x);
  all.base = warpMax(all.base);
  auto factorOf = [&](float base) { return base == -INFINITY ? 0.0f : exp2Fast(base - all.base); };
  for (int split = lane; split < args.num_splits; split += 32) all.sum += factorOf(sums[split].x) * sums[split].y;
  all.sum = warpSum(all.sum);

  float4 out[kMostPieces] = {};
  for (int begin = warp; begin < args.num_splits; begin += kMergeWarps * kAtOnce) {
    if (begin > warp) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) read(begin + kMergeWarps * i, sum[i], x[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float factor = factorOf(sum[i].x);
#pragma unroll
      for (int j = 0; j < kMostPieces; ++j) {
        out[j].x += factor * x[i][j].x, out[j].y += factor * x[i][j].y;
        out[j].z += factor * x[i][j].z, out[j].w += factor * x[i][j].w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i) {
    const int d = 4 * (32 * i + lane);
    if (d < p.head_dim) *reinterpret_cast<float4*>(outs + warp * p.head_dim + d) = out[i];
  }
  __syncthreads();
  const int head = static_cast<int>(row / p.num_tokens % p.num_q_heads);
  const float normal = normaliser(all, p.sink_logit, head);
  for (int d = 2 * threadIdx.x; d < p.head_dim; d += 2 * kMergeThreads) {
    float2 sum = make_float2(0.0f, 0.0f);
    for (int w = 0; w < kMergeWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(outs + w * p.head_dim + d);
      sum.x += part.x, sum.y += part.y;
    }
    storeOut<Half>(p, row, d, make_float2(sum.x * normal, sum.y * normal));
  }
}

}  // namespace sink_attention
}  // namespace sinkexport
