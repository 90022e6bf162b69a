// The attention kernel itself: flash decoding on tensor cores, for a step (T = 1) and for a chunk (prefill).
//
// A block owns one (stream, kv head), 8 or 16 rows and one split of the cache. A row is a query head of the group at
// one of the T tokens: row = token * group + head in group. Each warp takes every kWarps-th tile of keys by itself,
// with its own online softmax; warps meet once, at the end.
//
//   sink_attention_config.cuh    sizes, who a thread is, shared memory
//   sink_attention_rows.cuh      positions, rotations, rounding to int8
//   sink_attention_tile.cuh      one tile: its copy, its two matmuls
//   sink_attention_sections.cuh  sinks, window and chunk; the order of tiles
//   sink_attention_softmax.cuh   the rows' online softmax
//   sink_attention_step.cuh      a step's own token
#pragma once

#include "sink_attention_sections.cuh"
#include "sink_attention_softmax.cuh"
#include "sink_attention_step.cuh"

namespace sinkexport {
namespace sink_attention {

template <typename C>
class Attend {
  using Half = typename C::Half;

  const AttendArgs& args_;
  const SinkAttentionParams& p_;
  const Place<C>& at_;
  const Shared<C>& memory_;

 public:
  __device__ Attend(const AttendArgs& args, const Place<C>& at, const Shared<C>& memory)
      : args_(args), p_(args.p), at_(at), memory_(memory) {}

  __device__ void run() {
    const Step<C> step{p_, at_, memory_};
    if constexpr (!C::kPrefill) step.copy();
    const Position<C> position(p_, at_.stream);
    const Sections<C> sections(args_, at_, position);

    int ahead = sections.next(sections.begin + at_.warp);  // next tile to load
    int tiles[C::kStages];                                 // being loaded, oldest first
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) {
      tiles[i] = ahead;
      issue(sections, ahead, i);
      if (ahead < sections.end) ahead = sections.next(ahead + C::kWarps);
    }

    int own_tile = -1;  // that holds the step's token
    if constexpr (C::kPrefill)
      loadQueries();
    else
      own_tile = step.take(position, sections);
    __syncthreads();

    Rows<C> rows(p_, at_);
    for (int stage = 0; tiles[0] < sections.end; stage = stage + 1 == C::kStages ? 0 : stage + 1) {
      __syncwarp();  // nobody reads what the next copy replaces
      tiles[C::kStages - 1] = ahead;
      issue(sections, ahead, stage == 0 ? C::kStages - 1 : stage - 1);
      if (ahead < sections.end) ahead = sections.next(ahead + C::kWarps);
      waitForCopies<C::kStages - 1>();
      __syncwarp();
      if constexpr (C::kInt8) {
        int row0;
        if (sections.sectionOf(tiles[0], row0) == kWindow)
          consume<true>(position, sections, own_tile, tiles[0], stage, rows);
        else
          consume<false>(position, sections, own_tile, tiles[0], stage, rows);
      } else {
        consume<false>(position, sections, own_tile, tiles[0], stage, rows);
      }
#pragma unroll
      for (int i = 0; i < C::kStages - 1; ++i) tiles[i] = tiles[i + 1];
    }

    waitForCopies<0>();
    __syncthreads();
    rows.store(at_, memory_);
    __syncthreads();
    for (int r = at_.warp; r < C::kRows && at_.row_begin + r < at_.num_rows; r += C::kWarps) merge(r);
  }

 private:
  // Starts the copy of a tile, if there is one; ends a group of copies in any case.
  __device__ void issue(const Sections<C>& sections, int tile, int stage) {
    if (tile < sections.end) {
      int row0;
      const Section section = sections.sectionOf(tile, row0);
      const Source source = sections.sourceOf(section);
      uint4* target = memory_.stage(stage);
      if constexpr (C::kInt8) {
        uint4* scale_target = memory_.stageScales(stage);
        if (section == kWindow) {
          Tile<C, true>::load(source, row0, target, at_.lane);
          loadScales<C>(sections.window_scales, row0, scale_target, at_.lane);
        } else {
          Tile<C, false>::load(source, row0, target, at_.lane);
          if (C::kPrefill && section == kChunk) loadScales<C>(sections.chunk_scales, row0, scale_target, at_.lane);
        }
      } else {
        Tile<C, false>::load(source, row0, target, at_.lane);
      }
    }
    commitCopies();
  }

  // A chunk's prepared queries to shared memory.
  __device__ void loadQueries() {
    for (int i = threadIdx.x; i < C::kRows * (C::kHeadDim / 8); i += C::kThreads) {
      const int r = i / (C::kHeadDim / 8), piece = i % (C::kHeadDim / 8), row = at_.row_begin + r;
      uint4 plain = make_uint4(0, 0, 0, 0), for_sinks = plain;
      if (row < at_.num_rows) {
        const size_t head = static_cast<size_t>(at_.stream) * p_.num_q_heads + at_.headOf(row);
        const size_t at = (head * p_.num_tokens + at_.tokenOf(row)) * (C::kHeadDim / 8) + piece;
        plain = static_cast<const uint4*>(args_.q)[at];
        for_sinks = static_cast<const uint4*>(args_.q_sink)[at];
      }
      *reinterpret_cast<uint4*>(memory_.q + r * C::kRowStride + 8 * piece) = plain;
      *reinterpret_cast<uint4*>(memory_.q_sink + r * C::kRowStride + 8 * piece) = for_sinks;
    }
  }

  // Attends to one tile.
  template <bool kInt8Tile>
  __device__ void consume(const Position<C>& position, const Sections<C>& sections, int own_tile, int tile, int stage,
                          Rows<C>& rows) {
    using L = Tile<C, kInt8Tile>;
    const int lane = at_.lane, g = at_.g;
    int row0;
    const Section section = sections.sectionOf(tile, row0);
    const int limit = sections.sourceOf(section).limit;
    uint4* data = memory_.stage(stage);
    const bool has_scales = kInt8Tile || (C::kInt8 && C::kPrefill && section == kChunk);
    __half* tile_scales = reinterpret_cast<__half*>(memory_.stageScales(stage)) +
                          (kInt8Tile ? sections.window_scales : sections.chunk_scales).shift;
    if (!C::kPrefill && tile == own_tile) {
      const int own_key = sections.own_row - row0;
      L::insert(memory_.new_k, memory_.new_v, own_key, data, lane);
      if (kInt8Tile && lane < 2) tile_scales[lane * C::kValueScalesAt + own_key] = memory_.new_scales[lane];
      __syncwarp();
    }

    typename L::Dots dots = {};
    L::multiplyKeys(section == kSinks ? memory_.q_sink : memory_.q, data, lane, dots);

    float factor[L::kGroups], value_scale[L::kGroups];
#pragma unroll
    for (int group = 0; group < L::kGroups; ++group) {
      factor[group] = rows.logit_scale;
      if (!has_scales) continue;
      factor[group] *= __half2float(tile_scales[L::keyRow(group, g)]);
      value_scale[group] = __half2float(tile_scales[C::kValueScalesAt + L::keyRow(group, g)]);
    }

    typename L::Weights weights;
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      float logits[L::kGroups][2], largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int group = 0; group < L::kGroups; ++group) {
        const int row = row0 + L::keyRow(group, g);
        // Steps since the slot was written, as the newest token in the ring sees it.
        const int age = position.newest_slot - row + (row > position.newest_slot ? p_.window_size : 0);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float scaled = dots[r][group / 2][2 * (group % 2) + j] * factor[group];
          const float logit = logitOf(scaled, section, row, age, position, rows, r, j);
          bool is_seen = row < limit;
          if constexpr (C::kPrefill) {
            if (section == kWindow) is_seen = is_seen && age + 1 + rows.token[r][j] < p_.window_size;
            if (section == kChunk) is_seen = is_seen && row <= rows.token[r][j];
          }
          logits[group][j] = is_seen ? logit : -INFINITY;
          largest[j] = fmaxf(largest[j], logits[group][j]);
        }
      }
      rows.raiseBase(r, largest);
      rows.template weigh<kInt8Tile>(r, logits, has_scales, value_scale, weights[r]);
    }
    L::addValues(weights, data, lane, rows.out);
  }

  // Logit, in units of log2(e), of a scaled q . k.
  __device__ float logitOf(float logit, Section section, int row, int age, const Position<C>& position,
                           const Rows<C>& rows, int r, int j) const {
    const int token = rows.token[r][j];
    if (p_.softcap != 0.0f) logit = p_.softcap * kLog2E * tanhf(logit);
    if (p_.alibi_slopes != nullptr) {
      const int query = static_cast<int>(min(position.t + token, position.ring.capacity() - 1));  // in-cache position
      int distance = age + (C::kPrefill ? 1 + token : 0);
      if (section == kSinks) distance = query - row;
      if (section == kChunk) distance = token - row;
      logit -= rows.slope[r][j] * static_cast<float>(distance);
    }
    if (p_.sink_scale != nullptr && row == 0 && (section == kSinks || (section == kChunk && position.t == 0))) {
      logit += rows.sink_scale_log2[r][j];  // token 0
    }
    return logit;
  }

  // One row's output, or its part of it, of all warps' sums. By a warp.
  __device__ void merge(int r) {
    const float2* const sums = memory_.sums;
    RowSums all;
    float factor[C::kWarps];
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) all.base = fmaxf(all.base, sums[w * C::kRows + r].x);
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      const float2 sum = sums[w * C::kRows + r];
      factor[w] = sum.x == -INFINITY ? 0.0f : exp2Fast(sum.x - all.base);
      all.sum += factor[w] * sum.y;
    }
    const int row = at_.row_begin + r, head = at_.headOf(row);
    const size_t out_row = (static_cast<size_t>(at_.stream) * p_.num_q_heads + head) * p_.num_tokens + at_.tokenOf(row);
    const float normal = args_.num_splits == 1 ? normaliser(all, p_.sink_logit, head) : 1.0f;
    const size_t partial = out_row * args_.num_splits + blockIdx.y;
    if (args_.num_splits > 1 && at_.lane == 0) args_.partial_sums[partial] = make_float2(all.base, all.sum);
    for (int d = at_.lane; d < C::kHeadDim; d += 32) {
      float x = 0.0f;
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) x += factor[w] * memory_.outs[(w * C::kRows + r) * C::kHeadDim + d];
      if (args_.num_splits == 1)
        storeOut<Half>(p_, out_row, d, x * normal);
      else
        args_.partial_out[partial * C::kHeadDim + d] = x;
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksOfSm) attend(const __grid_constant__ AttendArgs args) {
  waitForEarlierKernels();
  allowNextKernel();
  extern __shared__ uint4 shared[];
  const Place<C> at(args.p);
  const Shared<C> memory(shared, at.warp);
  Attend<C>(args, at, memory).run();
}

// How a kernel of one head dimension is launched.
struct AttendKernel {
  const void* function;
  int num_rows;  // of a block
  int num_threads;
  int num_warps;
  int shared_bytes;
  int blocks_of_sm;  // at most
};

template <int kHeadDim, DType kDType, bool kInt8, int kRowTiles, bool kPrefill>
AttendKernel attendKernel() {
  using C = Config<kHeadDim, kDType, kInt8, kRowTiles, kPrefill>;
  return {reinterpret_cast<const void*>(&attend<C>), C::kRows, C::kThreads, C::kWarps, C::kSharedBytes, C::kBlocksOfSm};
}

// A step's groups of up to 8 query heads make 8 rows, larger ones 16, as a chunk's do.
template <int kHeadDim, DType kDType, bool kInt8>
AttendKernel attendKernel(int group, bool is_prefill) {
  if (is_prefill) return attendKernel<kHeadDim, kDType, kInt8, 2, true>();
  return group > 8 ? attendKernel<kHeadDim, kDType, kInt8, 2, false>()
                   : attendKernel<kHeadDim, kDType, kInt8, 1, false>();
}

// Instantiated for each head dimension in sink_attention_d*.cu.
template <int kHeadDim>
AttendKernel attendKernelOf(DType dtype, bool is_int8, int group, bool is_prefill) {
  if (dtype == DType::kFloat16) {
    return is_int8 ? attendKernel<kHeadDim, DType::kFloat16, true>(group, is_prefill)
                   : attendKernel<kHeadDim, DType::kFloat16, false>(group, is_prefill);
  }
  return is_int8 ? attendKernel<kHeadDim, DType::kBFloat16, true>(group, is_prefill)
                 : attendKernel<kHeadDim, DType::kBFloat16, false>(group, is_prefill);
}

}  // namespace sink_attention
}  // namespace sinkexport
