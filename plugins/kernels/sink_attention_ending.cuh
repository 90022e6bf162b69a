// The end of a block: its warps' sums become the output, or its split's part of it, or meet those of its cluster.
#pragma once

#include "cluster.cuh"
#include "sink_attention_softmax.cuh"

namespace sinkexport {
namespace sink_attention {

template <typename C>
class Ending {
  using Half = typename C::Half;

  const AttendArgs& args_;
  const SinkAttentionParams& p_;
  const Place<C>& at_;
  const Shared<C>& memory_;

 public:
  __device__ Ending(const AttendArgs& args, const Place<C>& at, const Shared<C>& memory)
      : args_(args), p_(args.p), at_(at), memory_(memory) {}

  // The warps' sums to the output, or to where the splits meet.
  __device__ void finish(Rows<C>& rows) {
    waitForCopies<0>();
    __syncthreads();
    rows.store(at_, memory_);
    __syncthreads();
    if (args_.is_cluster) {
      mergeInCluster();
      return;
    }
    for (int r = at_.warp; r < at_.rowsHere(); r += C::kWarps) merge(r);
  }

 private:
  // A row of the block: its sums of all parts, and each part's factor.
  __device__ RowSums sumsOf(int r, float (&factor)[C::kWarps]) const {
    RowSums all;
#pragma unroll
    for (int part = 0; part < C::kWarps; ++part) {
      if (part < at_.parts) all.base = fmaxf(all.base, memory_.sums[part * at_.block_rows + r].x);
    }
#pragma unroll
    for (int part = 0; part < C::kWarps; ++part) {
      factor[part] = 0.0f;
      if (part >= at_.parts) continue;
      const float2 sum = memory_.sums[part * at_.block_rows + r];
      factor[part] = sum.x == -INFINITY ? 0.0f : exp2Fast(sum.x - all.base);
      all.sum += factor[part] * sum.y;
    }
    return all;
  }

  // The weighted sum of all parts' outputs: kCount dimensions from d on.
  template <int kCount>
  __device__ void sumOuts(int r, int d, const float (&factor)[C::kWarps], float (&sum)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
#pragma unroll
    for (int part = 0; part < C::kWarps; ++part) {
      if (part >= at_.parts) continue;
      const float* out = memory_.outs + (part * at_.block_rows + r) * C::kHeadDim + d;
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += factor[part] * out[i];
    }
  }

  // Of [B, Hq, T].
  __device__ size_t outRow(int r) const {
    const int row = at_.row_begin + r;
    const size_t head = static_cast<size_t>(at_.stream) * p_.num_q_heads + at_.headOf(row);
    return head * p_.num_tokens + at_.tokenOf(row);
  }

  // One row's output, or its part of it, of all warps' sums. By a warp.
  __device__ void merge(int r) {
    float factor[C::kWarps];
    const RowSums all = sumsOf(r, factor);
    const size_t out_row = outRow(r), partial = out_row * args_.num_splits + blockIdx.y;
    const bool is_whole = args_.num_splits == 1;
    const float normal = is_whole ? normaliser(all, p_.sink_logit, at_.headOf(at_.row_begin + r)) : 1.0f;
    if (!is_whole && at_.lane == 0) args_.partial_sums[partial] = make_float2(all.base, all.sum);
    for (int d = 2 * at_.lane; d < C::kHeadDim; d += 64) {
      float x[2];
      sumOuts(r, d, factor, x);
      if (is_whole)
        storeOut<Half>(p_, out_row, d, make_float2(x[0] * normal, x[1] * normal));
      else
        *reinterpret_cast<float2*>(args_.partial_out + partial * C::kHeadDim + d) = make_float2(x[0], x[1]);
    }
  }

  // All rows' outputs of the sums of all blocks of the cluster: each block receives its share of them and adds it up.
  __device__ void mergeInCluster() {
    constexpr int kRowPieces = C::kHeadDim / 4;
    const int num_blocks = args_.num_splits, rank = blockIdx.y, num_pieces = at_.rowsHere() * kRowPieces;
    const int share = divideUp(num_pieces, num_blocks);
    auto* const received = reinterpret_cast<float4*>(memory_.received);
    waitForCluster();  // all blocks have started
    for (int i = threadIdx.x; i < num_pieces; i += C::kThreads) {
      const int r = i / kRowPieces, piece = i % kRowPieces, owner = i / share;
      float factor[C::kWarps], x[4];
      const RowSums all = sumsOf(r, factor);
      sumOuts(r, 4 * piece, factor, x);
      storeInBlock(received + rank * share + i % share, owner, make_float4(x[0], x[1], x[2], x[3]));
      for (int block = piece; block < num_blocks; block += kRowPieces) {
        storeInBlock(memory_.received_sums + rank * C::kMostRows + r, block, make_float2(all.base, all.sum));
      }
    }
    arriveAtCluster();
    waitForCluster();
    for (int i = threadIdx.x; i < 2 * share; i += C::kThreads) {
      const int piece = rank * share + i / 2, r = piece / kRowPieces, d = 4 * (piece % kRowPieces) + 2 * (i % 2);
      if (piece >= num_pieces) break;
      RowSums all;
      float2 sums[C::kMostClusterBlocks];
#pragma unroll
      for (int block = 0; block < C::kMostClusterBlocks; ++block) {
        sums[block] = make_float2(-INFINITY, 0.0f);
        if (block < num_blocks) sums[block] = memory_.received_sums[block * C::kMostRows + r];
        all.base = fmaxf(all.base, sums[block].x);
      }
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int block = 0; block < C::kMostClusterBlocks; ++block) {
        if (block >= num_blocks) continue;
        const float2 x = *reinterpret_cast<const float2*>(memory_.received + 4 * block * share + 2 * i);
        const float factor = sums[block].x == -INFINITY ? 0.0f : exp2Fast(sums[block].x - all.base);
        all.sum += factor * sums[block].y;
        sum.x += factor * x.x, sum.y += factor * x.y;
      }
      const float normal = normaliser(all, p_.sink_logit, at_.headOf(at_.row_begin + r));
      storeOut<Half>(p_, outRow(r), d, make_float2(sum.x * normal, sum.y * normal));
    }
  }
};

}  // namespace sink_attention
}  // namespace sinkexport
