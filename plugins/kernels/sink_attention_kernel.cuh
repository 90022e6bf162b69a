// The attention kernel itself: flash decoding on tensor cores, for a step (T = 1) and for a chunk (prefill).
//
// A block owns one (stream, kv head), 8 to 64 rows and one split of the cache. A row is a query head of the group at
// one of the T tokens: row = token * group + head in group. In a step each warp takes every kWarps-th tile of keys by
// itself, with its own online softmax; warps meet once, at the end. In a chunk warps have rows of their own, as far as
// there are any (16 a warp), and read tiles that all of them copy.
//
//   sink_attention_config.cuh    sizes, who a thread is, shared memory
//   sink_attention_rows.cuh      positions, rotations, rounding to int8
//   sink_attention_tile.cuh      one tile: its copy, its two matmuls
//   sink_attention_sections.cuh  sinks, window and chunk; the order of tiles
//   sink_attention_softmax.cuh   the rows' online softmax
//   sink_attention_step.cuh      a step's own token
//   sink_attention_ending.cuh    sums of warps, of splits in a cluster, and the output
#pragma once

#include "sink_attention_ending.cuh"
#include "sink_attention_sections.cuh"
#include "sink_attention_softmax.cuh"
#include "sink_attention_step.cuh"

namespace sinkexport {
namespace sink_attention {

// A tile in a stage that a warp copied.
struct Staged {
  TileAt tile;
  int warp, stage;
};

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
    Sections<C> sections(args_, at_);
    if constexpr (C::kPrefill)
      runChunk(sections);
    else
      runStep(sections);
  }

 private:
  // What the states held before is on its way before anything of this step is known.
  __device__ void runStep(Sections<C>& sections) {
    const Step<C> step{p_, at_, memory_};
    if (!p_.settled_states) waitForEarlierKernels();
    issueFirst(sections);
    step.prefetch();
    if (args_.is_cluster) arriveAtCluster();
    const Position<C> position(p_, at_.stream);
    sections.settleStep(position);
    Turns turns = makeTurns(p_, position.t, memory_.turns);
    if (p_.settled_states) waitForEarlierKernels();
    allowNextKernel();  // not before: the next one's blocks would crowd where there is room now
    takeShift(p_, at_.stream, 0, turns);
    const int own_tile = step.take(position, sections, turns);
    __syncthreads();

    Rows<C> rows(p_, at_);
    int stage = 0;
    for (int tile = sections.begin + at_.warp; tile < sections.end; tile += C::kWarps) {
      __syncwarp();  // nobody reads what the next copy replaces
      issue(sections, tile + (C::kStages - 1) * C::kWarps, stage == 0 ? C::kStages - 1 : stage - 1);
      waitForCopies<C::kStages - 1>();
      __syncwarp();
      const TileAt at = sections.tileAt(tile);
      const StepQueries<C> queries{(at.section == kSinks ? memory_.q_sink : memory_.q) + at_.g * C::kRowStride, at_.c};
      consume(position, sections, queries, {{at, at_.warp, stage}}, tile == own_tile, rows);
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
    }
    Ending<C>(args_, at_, memory_).finish(rows);
  }

  // Warps with rows of their own read all tiles that the block copies; where several have the same rows, each reads its
  // share of them.
  __device__ void runChunk(Sections<C>& sections) {
    waitForEarlierKernels();
    allowNextKernel();
    if (args_.is_cluster) arriveAtCluster();
    const Position<C> position(p_, at_.stream);
    sections.settleChunk(args_, at_, position);
    issueFirst(sections);

    Rows<C> rows(p_, at_);
    ChunkQueries<C> queries;
    bool are_for_sinks = sections.tileAt(sections.begin).section == kSinks;
    takeQueries(position, are_for_sinks, queries);
    const bool shares_tiles = at_.parts < C::kWarps, has_rows = at_.row_begin + at_.warp_row < at_.num_rows;
    const auto meet = [&] {
      if (shares_tiles)
        __syncthreads();
      else
        __syncwarp();
    };
    int stage = 0;
    for (int first = sections.begin; first < sections.end; first += C::kWarps) {
      meet();  // nobody reads what the next copies replace
      issue(sections, first + (C::kStages - 1) * C::kWarps + at_.warp, stage == 0 ? C::kStages - 1 : stage - 1);
      waitForCopies<C::kStages - 1>();
      meet();
      for (int warp = at_.part; has_rows && warp < C::kWarps && first + warp < sections.end;) {
        const TileAt tile = sections.tileAt(first + warp);
        if (tile.section == kChunk && tile.row0 > rows.last_token) break;  // later than all of this warp's rows
        if (are_for_sinks && tile.section != kSinks) {
          are_for_sinks = false;
          takeQueries(position, false, queries);
        }
        // Two at a time, so that there is more to do beside each other.
        const int next = warp + at_.parts;
        const bool has_next = next < C::kWarps && first + next < sections.end;
        const TileAt next_tile = has_next ? sections.tileAt(first + next) : tile;
        if (has_next && next_tile.section == tile.section) {
          consume(position, sections, queries, {{tile, warp, stage}, {next_tile, next, stage}}, false, rows);
          warp = next + at_.parts;
        } else {
          consume(position, sections, queries, {{tile, warp, stage}}, false, rows);
          warp = next;
        }
      }
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
    }
    Ending<C>(args_, at_, memory_).finish(rows);
  }

  // Each warp's first tiles.
  __device__ void issueFirst(const Sections<C>& sections) {
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) issue(sections, sections.begin + i * C::kWarps + at_.warp, i);
  }

  // Starts the copy of a tile, if there is one; ends a group of copies in any case.
  __device__ void issue(const Sections<C>& sections, int tile, int stage) {
    if (tile < sections.end) {
      const auto [section, row0] = sections.tileAt(tile);
      const Source source = sections.sourceOf(section);
      uint4* target = memory_.stage(at_.warp, stage);
      if constexpr (C::kInt8) {
        uint4* scale_target = memory_.stageScales(at_.warp, stage);
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

  // A chunk's prepared queries, as the sinks meet them or as all others do.
  __device__ void takeQueries(const Position<C>& position, bool for_sinks, ChunkQueries<C>& queries) const {
    const Half* rows[C::kRowTiles];
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      const int row = min(at_.row_begin + at_.warp_row + 8 * r + at_.g, at_.num_rows - 1), token = at_.tokenOf(row);
      const bool is_turned_back = for_sinks && position.ring.shift(position.t + token) > 0;
      const size_t head = static_cast<size_t>(at_.stream) * p_.num_q_heads + at_.headOf(row);
      rows[r] = static_cast<const Half*>(is_turned_back ? args_.q_sink : args_.q) +
                (head * p_.num_tokens + token) * C::kHeadDim;
    }
    queries.take(rows, at_.c);
  }

  // Attends to kCount tiles of one section in the stages `at` says. is_own: the one tile holds the step's token.
  template <int kCount, typename Queries>
  __device__ void consume(const Position<C>& position, const Sections<C>& sections, const Queries& queries,
                          const Staged (&at)[kCount], bool is_own, Rows<C>& rows) {
    if constexpr (C::kInt8) {
      if (at[0].tile.section == kWindow) {
        consumeTiles<true>(position, sections, queries, at, is_own, rows);
        return;
      }
    }
    consumeTiles<false>(position, sections, queries, at, is_own, rows);
  }

  template <bool kInt8Tile, int kCount, typename Queries>
  __device__ void consumeTiles(const Position<C>& position, const Sections<C>& sections, const Queries& queries,
                               const Staged (&at)[kCount], bool is_own, Rows<C>& rows) {
    using L = Tile<C, kInt8Tile>;
    constexpr int kGroups = kCount * L::kGroups;
    const int lane = at_.lane, g = at_.g;
    const Section section = at[0].tile.section;
    const int limit = sections.sourceOf(section).limit;
    const bool has_scales = kInt8Tile || (C::kInt8 && C::kPrefill && section == kChunk);
    const int scale_shift = (kInt8Tile ? sections.window_scales : sections.chunk_scales).shift;
    if constexpr (!C::kPrefill) takeOwn<kInt8Tile>(sections, at[0], limit, is_own);

    typename L::Dots dots[kCount] = {};
    float factor[kGroups], value_scale[kGroups];
    bool is_plain = rows.isPlain(p_);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      L::multiplyKeys(queries, memory_.stage(at[n].warp, at[n].stage), lane, dots[n]);
      const __half* scales = reinterpret_cast<__half*>(memory_.stageScales(at[n].warp, at[n].stage)) + scale_shift;
#pragma unroll
      for (int i = 0; i < L::kGroups; ++i) {
        factor[n * L::kGroups + i] = rows.logit_scale;
        if (!has_scales) continue;
        factor[n * L::kGroups + i] *= __half2float(scales[L::keyRow(i, g)]);
        value_scale[n * L::kGroups + i] = __half2float(scales[C::kValueScalesAt + L::keyRow(i, g)]);
      }
      is_plain = is_plain && isSeenWhole(position, section, at[n].tile.row0, L::kKeys, limit, rows);
    }

    uint32_t weights[C::kRowTiles][kGroups];
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
      float logits[kGroups][2], largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int n = group / L::kGroups, own = group % L::kGroups;
#pragma unroll
        for (int j = 0; j < 2; ++j) logits[group][j] = dots[n][r][own / 2][2 * (own % 2) + j] * factor[group];
      }
      if (!is_plain) {  // asked once: most tiles are
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          const int row = at[group / L::kGroups].tile.row0 + L::keyRow(group % L::kGroups, g);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            logits[group][j] = seenLogit(logits[group][j], section, row, limit, position, rows, r, j);
          }
        }
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int j = 0; j < 2; ++j) largest[j] = fmaxf(largest[j], logits[group][j]);
      }
      rows.raiseBase(r, largest);
      rows.template weigh<kInt8Tile>(r, logits, has_scales, value_scale, weights[r]);
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      L::addValues(weights, n * L::kGroups, memory_.stage(at[n].warp, at[n].stage), lane, rows.out);
    }
  }

  // A step's tile as it will be once its token is stored: no values that are not there, and its own row, if it is here.
  template <bool kInt8Tile>
  __device__ void takeOwn(const Sections<C>& sections, const Staged& at, int limit, bool is_own) const {
    using L = Tile<C, kInt8Tile>;
    uint4* data = memory_.stage(at.warp, at.stage);
    if (at.tile.row0 + L::kKeys > limit) L::clearValues(max(limit - at.tile.row0, 0), data, at_.lane);
    if (is_own) {
      __syncwarp();
      const int own_key = sections.own_row - at.tile.row0;
      L::insert(memory_.new_k, memory_.new_v, own_key, data, at_.lane);
      auto* scales = reinterpret_cast<__half*>(memory_.stageScales(at.warp, at.stage)) + sections.window_scales.shift;
      if (kInt8Tile && at_.lane < 2) scales[at_.lane * C::kValueScalesAt + own_key] = memory_.new_scales[at_.lane];
    }
    __syncwarp();
  }

  // Logit of a scaled q . k, or none if the row is not there for this query.
  __device__ float seenLogit(float scaled, Section section, int row, int limit, const Position<C>& position,
                             const Rows<C>& rows, int r, int j) const {
    // Steps since the slot was written, as the newest token in the ring sees it.
    const int age = position.newest_slot - row + (row > position.newest_slot ? p_.window_size : 0);
    const float logit = logitOf(scaled, section, row, age, position, rows, r, j);
    bool is_seen = row < limit;
    if constexpr (C::kPrefill) {
      if (section == kWindow) is_seen = is_seen && age + 1 + rows.token[r][j] < p_.window_size;
      if (section == kChunk) is_seen = is_seen && row <= rows.token[r][j];
    }
    return is_seen ? logit : -INFINITY;
  }

  // Whether all of the warp's rows see all keys of a tile.
  __device__ bool isSeenWhole(const Position<C>& position, Section section, int row0, int num_keys, int limit,
                              const Rows<C>& rows) const {
    const int last = row0 + num_keys - 1;
    if (last >= limit) return false;
    if (!C::kPrefill || section == kSinks) return true;
    if (section == kChunk) return last <= rows.first_token;
    if (row0 <= position.newest_slot && last > position.newest_slot) return false;  // the oldest is among them
    const int oldest = position.newest_slot - row0 + (row0 > position.newest_slot ? p_.window_size : 0);
    return oldest + 1 + rows.last_token < p_.window_size;
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
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksOfSm) attend(const __grid_constant__ AttendArgs args) {
  extern __shared__ uint4 shared[];
  const Place<C> at(args);
  const Shared<C> memory(shared);
  Attend<C>(args, at, memory).run();
}

// How a kernel of one head dimension is launched.
struct AttendKernel {
  const void* function;
  int warp_rows;  // of a block where all warps have the same
  int num_threads;
  int num_warps;
  int shared_bytes;
  int cluster_bytes;  // more of them in a cluster
  int blocks_of_sm;   // at most
};

template <int kHeadDim, DType kDType, bool kInt8, int kRowTiles, bool kPrefill>
AttendKernel attendKernel() {
  using C = Config<kHeadDim, kDType, kInt8, kRowTiles, kPrefill>;
  return {reinterpret_cast<const void*>(&attend<C>),
          C::kWarpRows,
          C::kThreads,
          C::kWarps,
          C::kSharedBytes,
          C::kClusterBytes,
          C::kBlocksOfSm};
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
