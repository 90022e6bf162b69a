// Host side of sink attention, and the small kernels around the attention itself: what a chunk needs beforehand, the
// merge of splits, and the chunk's way into the states.
#include "sink_attention.h"

#include <cmath>

#include "problem.h"
#include "sink_attention_kernel.cuh"

namespace sinkexport {
namespace detail {

extern template AttendKernel attendKernelOf<64>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<80>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<96>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<128>(DType, bool, int, bool);
extern template AttendKernel attendKernelOf<256>(DType, bool, int, bool);

}  // namespace detail

namespace {

using detail::AttendArgs;
using detail::AttendKernel;
using detail::divUp;
using detail::Half;
using detail::RowSums;

constexpr int kThreads = 128, kWarps = kThreads / 32;  // of the small kernels

// --- prefill: what attention and write need of the chunk; null: as the caller gave it ---

struct ChunkArgs {
  SinkAttentionParams p;
  void* q;
  void* q_sink;
  void* k;
  void* v;
  void* k_scale;
  void* v_scale;
};

// A row of k or v that attention meets as it will be stored: int8 entries as 16-bit numbers and their scale; sinks, and
// everything where the window is not int8, as they are, with a scale of 1. By one warp.
template <DType kDType>
__device__ void prepareRow(const typename Half<kDType>::T* row, const detail::Turns& turns, int num_pairs,
                           const SinkAttentionParams& p, bool is_rounded, typename Half<kDType>::T* target,
                           __half* scale, int lane) {
  using H = Half<kDType>;
  float largest = 0.0f;
  for (int d = lane; d < p.head_dim; d += 32) {
    largest = fmaxf(largest, fabsf(detail::turned<kDType>(row, d, turns.cos, turns.sin, num_pairs, p.interleaved)));
  }
  const __half step = is_rounded ? detail::int8Scale(detail::warpMax(largest)) : __float2half_rn(1.0f);
  for (int d = lane; d < p.head_dim; d += 32) {
    const float x = detail::turned<kDType>(row, d, turns.cos, turns.sin, num_pairs, p.interleaved);
    target[d] = H::fromFloat(is_rounded ? detail::int8Entry(x, __half2float(step)) : x);
  }
  if (scale != nullptr && lane == 0) *scale = step;
}

// Grid: T x B.
template <DType kDType>
__global__ void __launch_bounds__(kThreads) prepareChunk(const __grid_constant__ ChunkArgs args) {
  using H = Half<kDType>;
  using T = typename H::T;
  extern __shared__ float turns_shared[];
  const SinkAttentionParams& p = args.p;
  const int token = blockIdx.x, stream = blockIdx.y, lane = threadIdx.x % 32;
  const int64_t t = detail::streamPosition(p.position, stream) + token;
  const detail::Turns turns = detail::makeTurns(p, stream, token, t, turns_shared);
  __syncthreads();
  const bool is_rounded = p.int8_window && t >= p.num_sinks;
  for (int head = threadIdx.x / 32; head < p.num_q_heads + 2 * p.num_kv_heads; head += kWarps) {
    if (head < p.num_q_heads) {
      const size_t at = ((static_cast<size_t>(stream) * p.num_q_heads + head) * p.num_tokens + token) * p.head_dim;
      const T* row = static_cast<const T*>(p.q) + at;
      for (int d = lane; d < p.head_dim; d += 32) {
        if (args.q != nullptr) {
          static_cast<T*>(args.q)[at + d] =
              H::fromFloat(detail::turned<kDType>(row, d, turns.cos, turns.sin, turns.num_pairs, p.interleaved));
        }
        if (args.q_sink != nullptr) {
          static_cast<T*>(args.q_sink)[at + d] = H::fromFloat(
              detail::turned<kDType>(row, d, turns.sink_cos, turns.sink_sin, turns.num_sink_pairs, p.interleaved));
        }
      }
      continue;
    }
    const bool is_value = head >= p.num_q_heads + p.num_kv_heads;
    const int kv_head = head - p.num_q_heads - (is_value ? p.num_kv_heads : 0);
    const size_t row = (static_cast<size_t>(stream) * p.num_kv_heads + kv_head) * p.num_tokens + token;
    void* target = is_value ? args.v : args.k;
    void* scales = is_value ? args.v_scale : args.k_scale;
    if (target == nullptr) continue;
    prepareRow<kDType>(static_cast<const T*>(is_value ? p.v : p.k) + row * p.head_dim, turns,
                       is_value ? 0 : turns.num_pairs, p, is_rounded, static_cast<T*>(target) + row * p.head_dim,
                       scales != nullptr ? static_cast<__half*>(scales) + row : nullptr, lane);
  }
}

// Grid: T x B. Stores the chunk's valid tokens: at most W of them, so no two want one slot.
template <DType kDType>
__global__ void __launch_bounds__(kThreads) writeChunk(const __grid_constant__ AttendArgs args) {
  using H = Half<kDType>;
  using T = typename H::T;
  const SinkAttentionParams& p = args.p;
  const int token = blockIdx.x, stream = blockIdx.y, lane = threadIdx.x % 32;
  if (p.num_valid != nullptr && token >= p.num_valid[stream]) return;
  const sinkrt::Ring ring{p.num_sinks, p.window_size};
  const int64_t t = detail::streamPosition(p.position, stream) + token;
  const bool is_sink = ring.isSink(t);
  for (int head = threadIdx.x / 32; head < 2 * p.num_kv_heads; head += kWarps) {
    const bool is_value = head >= p.num_kv_heads;
    const size_t head_row = static_cast<size_t>(stream) * p.num_kv_heads + head % p.num_kv_heads;
    const size_t from = head_row * p.num_tokens + token;
    const size_t to = is_sink ? head_row * p.num_sinks + t : head_row * p.window_size + ring.slot(t);
    const T* row = static_cast<const T*>(is_value ? args.v : args.k) + from * p.head_dim;
    void* state = is_value ? (is_sink ? p.sink_v : p.window_v) : (is_sink ? p.sink_k : p.window_k);
    if (p.int8_window && !is_sink) {
      auto* target = static_cast<int8_t*>(state) + to * p.head_dim;
      for (int d = lane; d < p.head_dim; d += 32) target[d] = static_cast<int8_t>(H::toFloat(row[d]));
      if (lane == 0) {
        static_cast<__half*>(is_value ? p.window_v_scale : p.window_k_scale)[to] =
            static_cast<const __half*>(is_value ? args.v_scale : args.k_scale)[from];
      }
    } else {
      const auto* source = reinterpret_cast<const uint4*>(row);
      auto* target = reinterpret_cast<uint4*>(static_cast<T*>(state) + to * p.head_dim);
      for (int i = lane; i < p.head_dim / 8; i += 32) target[i] = source[i];
    }
  }
}

// A block for each row of [B, Hq, T].
template <DType kDType>
__global__ void __launch_bounds__(kThreads) mergeSplits(const __grid_constant__ AttendArgs args) {
  extern __shared__ float outs[];  // [kWarps, D]
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
  for (int i = 0; i < kAtOnce; ++i) read(warp + kWarps * i, sum[i], x[i]);

  RowSums all;
  for (int split = lane; split < args.num_splits; split += 32) all.base = fmaxf(all.base, sums[split].x);
  all.base = detail::warpMax(all.base);
  auto factorOf = [&](float base) { return base == -INFINITY ? 0.0f : detail::exp2Fast(base - all.base); };
  for (int split = lane; split < args.num_splits; split += 32) all.sum += factorOf(sums[split].x) * sums[split].y;
  all.sum = detail::warpSum(all.sum);

  float4 out[kMostPieces] = {};
  for (int begin = warp; begin < args.num_splits; begin += kWarps * kAtOnce) {
    if (begin > warp) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) read(begin + kWarps * i, sum[i], x[i]);
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
  const float normal = detail::normaliser(all, p.sink_logit, head);
  for (int d = threadIdx.x; d < p.head_dim; d += kThreads) {
    float x = 0.0f;
    for (int w = 0; w < kWarps; ++w) x += outs[w * p.head_dim + d];
    detail::storeOut<kDType>(p, row, d, x * normal);
  }
}

// --- host ---

bool isPrefill(const SinkAttentionParams& p) {
  return p.num_tokens > 1;
}

AttendKernel kernelOf(const SinkAttentionParams& p) {
  const int group = p.num_q_heads / p.num_kv_heads;
  switch (p.head_dim) {
    case 64:
      return detail::attendKernelOf<64>(p.dtype, p.int8_window, group, isPrefill(p));
    case 80:
      return detail::attendKernelOf<80>(p.dtype, p.int8_window, group, isPrefill(p));
    case 96:
      return detail::attendKernelOf<96>(p.dtype, p.int8_window, group, isPrefill(p));
    case 128:
      return detail::attendKernelOf<128>(p.dtype, p.int8_window, group, isPrefill(p));
    default:
      return detail::attendKernelOf<256>(p.dtype, p.int8_window, group, isPrefill(p));
  }
}

// Workspaces are sized for this many multiprocessors, so that a size computed on one machine (or with no GPU at all) is
// enough on another.
constexpr int kMostSms = 192;

struct Shape {
  AttendKernel kernel;
  int row_chunks;   // blocks for the rows of one (stream, kv head)
  int window_keys;  // of a tile
  int tiles;
  int row_blocks;  // blocks of one split

  explicit Shape(const SinkAttentionParams& p) : kernel(kernelOf(p)) {
    const int rows = p.num_q_heads / p.num_kv_heads * p.num_tokens;
    row_chunks = divUp(rows, kernel.num_rows);
    const int other_keys = detail::tileKeys(p.head_dim, p.int8_window, false);
    window_keys = detail::tileKeys(p.head_dim, p.int8_window, p.int8_window);
    tiles = divUp(p.num_sinks, other_keys) + divUp(p.window_size, window_keys) +
            (isPrefill(p) ? divUp(p.num_tokens, other_keys) : 0);
    row_blocks = row_chunks * p.batch * p.num_kv_heads;
  }

  // More splits than four rounds of resident blocks (one for prefill, whose partial results are large) gain nothing.
  int mostSplits(const SinkAttentionParams& p, int resident_blocks) const {
    const int by_blocks = divUp((isPrefill(p) ? 1 : 4) * resident_blocks, row_blocks);
    const int by_tiles = divUp(tiles, kernel.num_warps);
    return by_blocks < by_tiles ? by_blocks : by_tiles;
  }

  // The splits that take the least time by a rough model, fitted to an H200, in microseconds: all tiles at memory's
  // speed, as far as multiprocessors have equal shares of them, or, if it is longer, a warp's tiles one after another.
  int splits(const SinkAttentionParams& p, int num_sms, double memory_bytes_of_us, int blocks_of_sm) const {
    const double bytes = (p.int8_window ? 0.5 : 1.0) * p.head_dim / 128 * window_keys / 16;  // of a tile, 8 KiB
    const double tile = bytes * 8192 * num_sms / memory_bytes_of_us;
    const double tile_in_a_row = (0.56 + 0.44 * bytes) * kernel.num_rows / 8;
    constexpr double kRound = 0.5, kMerge = 2.5, kMergeOfSplit = 0.1;
    int best = 1;
    double best_cost = INFINITY;
    for (int n = 1; n <= mostSplits(p, num_sms * blocks_of_sm); ++n) {
      const int blocks = row_blocks * n, rounds = divUp(blocks, num_sms * blocks_of_sm);
      // One round needs no more than blocks on every multiprocessor; of several, the last should be full.
      const int places = rounds == 1 ? num_sms * divUp(blocks, num_sms) : num_sms * blocks_of_sm * rounds;
      const double at_once = tile * tiles * row_blocks / num_sms * places / blocks;
      const double in_a_row = tile_in_a_row * rounds * divUp(divUp(tiles, n), kernel.num_warps);
      const double longer = at_once > in_a_row ? at_once : in_a_row;
      const double cost = longer + 0.01 * in_a_row + kRound * rounds + (n > 1 ? kMerge + kMergeOfSplit * n : 0.0);
      if (cost < best_cost) best = n, best_cost = cost;
    }
    return best;
  }
};

// Where everything lies in the workspace, 256-byte aligned. With base = nullptr only its size counts, and it holds what
// any choice of pointers may need: their number is often not known yet when memory is planned.
struct Workspace {
  AttendArgs args;
  ChunkArgs chunk;
  bool is_prepared;  // whether prepareChunk has anything to do
  size_t num_bytes = 0;

  Workspace(const SinkAttentionParams& p, int num_splits, void* base) : args{}, chunk{} {
    const size_t rows = static_cast<size_t>(p.batch) * p.num_q_heads * p.num_tokens;
    const size_t kv_rows = static_cast<size_t>(p.batch) * p.num_kv_heads * p.num_tokens;
    auto take = [&](size_t bytes) {
      void* address = base != nullptr ? static_cast<char*>(base) + num_bytes : nullptr;
      num_bytes += (bytes + 255) / 256 * 256;
      return address;
    };
    args.p = chunk.p = p;
    args.num_splits = num_splits;
    if (num_splits > 1) {
      args.partial_out = static_cast<float*>(take(rows * num_splits * p.head_dim * sizeof(float)));
      args.partial_sums = static_cast<float2*>(take(rows * num_splits * sizeof(float2)));
    }
    const bool is_turned = p.frequency != nullptr || base == nullptr;
    const bool is_turned_back = p.num_sinks > 0 && (is_turned || p.shift_cos != nullptr);
    is_prepared = isPrefill(p) && (is_turned || is_turned_back || p.int8_window);
    if (isPrefill(p)) {
      if (is_turned) chunk.q = take(rows * p.head_dim * 2);
      if (is_turned_back) chunk.q_sink = take(rows * p.head_dim * 2);
      if (is_turned || p.int8_window) chunk.k = take(kv_rows * p.head_dim * 2);
      if (p.int8_window) {
        chunk.v = take(kv_rows * p.head_dim * 2);
        chunk.k_scale = take(kv_rows * 2);
        chunk.v_scale = take(kv_rows * 2);
      }
    }
    args.q = chunk.q != nullptr ? chunk.q : p.q;
    args.q_sink = chunk.q_sink != nullptr ? chunk.q_sink : args.q;
    args.k = chunk.k != nullptr ? chunk.k : p.k;
    args.v = chunk.v != nullptr ? chunk.v : p.v;
    args.k_scale = chunk.k_scale;
    args.v_scale = chunk.v_scale;
  }
};

bool isMisaligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 != 0;
}

struct Named {
  const char* name;
  const void* pointer;
  bool is_needed;
};

const char* shapeProblem(const SinkAttentionParams& p) {
  if (p.batch < 1 || p.batch > 64) return explain("batch: received %d, expected 1 .. 64", p.batch);
  if (p.num_kv_heads < 1 || p.num_kv_heads > 1023) {
    return explain("num_kv_heads: received %d, expected 1 .. 1023", p.num_kv_heads);
  }
  if (p.num_q_heads < 1 || p.num_q_heads % p.num_kv_heads != 0) {
    return explain("num_q_heads: received %d, expected a multiple of num_kv_heads (%d)", p.num_q_heads, p.num_kv_heads);
  }
  if (p.head_dim != 64 && p.head_dim != 80 && p.head_dim != 96 && p.head_dim != 128 && p.head_dim != 256) {
    return explain("head_dim: received %d, expected 64, 80, 96, 128 or 256", p.head_dim);
  }
  if (p.num_sinks < 0) return explain("num_sinks: received %d, expected >= 0", p.num_sinks);
  if (p.window_size < 1) return explain("window_size: received %d, expected >= 1", p.window_size);
  if (int64_t{p.num_sinks} + p.window_size > 65536) {
    return explain("num_sinks + window_size: received %lld, expected at most 65536",
                   static_cast<long long>(int64_t{p.num_sinks} + p.window_size));
  }
  if (p.num_tokens < 1 || p.num_tokens > p.window_size) {
    return explain("num_tokens: received %d, expected 1 .. window_size (%d)", p.num_tokens, p.window_size);
  }
  if (int64_t{p.batch} * p.num_q_heads * p.num_tokens > INT32_MAX) {
    return explain("batch * num_q_heads * num_tokens: expected below 2^31; run shorter chunks");
  }
  if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    return explain("dtype: received %d, expected 0 (float16) or 1 (bfloat16)", static_cast<int>(p.dtype));
  }
  return nullptr;
}

}  // namespace

const char* sinkAttentionProblem(const SinkAttentionParams& p) {
  if (const char* problem = shapeProblem(p)) return problem;
  if (!(p.scale > 0.0f) || !std::isfinite(p.scale)) {
    return explain("scale: received %g, expected a finite number > 0", static_cast<double>(p.scale));
  }
  if (!(p.softcap >= 0.0f) || !std::isfinite(p.softcap)) {
    return explain("softcap: received %g, expected a finite number >= 0", static_cast<double>(p.softcap));
  }
  if ((p.shift_cos == nullptr) != (p.shift_sin == nullptr)) {
    return explain("shift_cos, shift_sin: received one of them, expected both or neither");
  }
  const bool has_rotation = p.frequency != nullptr || p.shift_cos != nullptr;
  if (p.frequency != nullptr && p.shift_cos != nullptr) {
    return explain("frequency, shift_cos: received both, expected frequency alone (q, k unrotated) or shift alone");
  }
  if (has_rotation && (p.rotary_dim < 2 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0)) {
    return explain("rotary_dim: received %d, expected an even number in 2 .. head_dim (%d)", p.rotary_dim, p.head_dim);
  }
  if (p.frequency != nullptr && !std::isfinite(p.rope_scaling)) {
    return explain("rope_scaling: received %g, expected a finite number", static_cast<double>(p.rope_scaling));
  }
  if (p.sink_scale != nullptr && p.num_sinks < 1) {
    return explain("sink_scale: received with num_sinks = 0, expected num_sinks >= 1");
  }
  if (p.stream_rows != 0 && (isPrefill(p) || p.stream_rows < p.num_q_heads)) {
    return explain("stream_rows: received %d, expected 0, or num_q_heads (%d) or more in a step", p.stream_rows,
                   p.num_q_heads);
  }
  if (p.gate != nullptr && p.gate_dim != 1 && p.gate_dim != p.head_dim) {
    return explain("gate_dim: received %d, expected 1 or head_dim (%d)", p.gate_dim, p.head_dim);
  }
  const bool has_sinks = p.num_sinks > 0;
  const Named all[] = {{"q", p.q, true},
                       {"k", p.k, true},
                       {"v", p.v, true},
                       {"out", p.out, true},
                       {"position", p.position, true},
                       {"window_k", p.window_k, true},
                       {"window_v", p.window_v, true},
                       {"sink_k", p.sink_k, has_sinks},
                       {"sink_v", p.sink_v, has_sinks},
                       {"window_k_scale", p.window_k_scale, p.int8_window},
                       {"window_v_scale", p.window_v_scale, p.int8_window},
                       {"num_valid", p.num_valid, false},
                       {"shift_cos", p.shift_cos, false},
                       {"shift_sin", p.shift_sin, false},
                       {"frequency", p.frequency, false},
                       {"alibi_slopes", p.alibi_slopes, false},
                       {"sink_logit", p.sink_logit, false},
                       {"sink_scale", p.sink_scale, false},
                       {"gate", p.gate, false}};
  for (const Named& one : all) {
    if (one.is_needed && one.pointer == nullptr) return explain("%s: received null, expected a pointer", one.name);
    if (isMisaligned(one.pointer)) {
      return explain("%s: received %p, expected an address that 16 divides", one.name, one.pointer);
    }
  }
  return nullptr;
}

size_t sinkAttentionWorkspaceBytes(const SinkAttentionParams& p) {
  if (shapeProblem(p) != nullptr) return 0;
  const Shape shape(p);
  const int most_splits = shape.mostSplits(p, kMostSms * shape.kernel.blocks_of_sm);
  return Workspace(p, most_splits, nullptr).num_bytes;
}

namespace {

template <DType kDType>
cudaError_t launch(const SinkAttentionParams& p, void* workspace, cudaStream_t stream) {
  int device = 0, num_sms = 0, shared_of_sm = 0, shared_of_block = 0, major = 0, memory_khz = 0, memory_bits = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&num_sms, cudaDevAttrMultiProcessorCount},
                {&shared_of_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
                {&shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&major, cudaDevAttrComputeCapabilityMajor},
                {&memory_khz, cudaDevAttrMemoryClockRate},
                {&memory_bits, cudaDevAttrGlobalMemoryBusWidth}};
  cudaError_t error = cudaGetDevice(&device);
  for (const auto& one : wanted) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(one.value, one.attribute, device);
  }
  if (error != cudaSuccess) return error;

  const Shape shape(p);
  const AttendKernel& kernel = shape.kernel;
  constexpr int kReservedOfBlock = 1024;
  int blocks_of_sm = shared_of_sm / (kernel.shared_bytes + kReservedOfBlock);
  blocks_of_sm = blocks_of_sm < 1 ? 1 : (blocks_of_sm > kernel.blocks_of_sm ? kernel.blocks_of_sm : blocks_of_sm);
  constexpr double kOfPeak = 0.88, kUsualBytesOfUs = 2.7e6;  // what is reached of the data sheet's; if it is not told
  const double peak = 2e-3 * memory_khz * memory_bits / 8;   // two transfers a clock
  const int num_splits = shape.splits(p, num_sms < kMostSms ? num_sms : kMostSms,
                                      peak > 0 ? kOfPeak * peak : kUsualBytesOfUs, blocks_of_sm);
  Workspace space(p, num_splits, workspace);
  AttendArgs& args = space.args;
  args.tiles_per_split = divUp(shape.tiles, num_splits);
  const dim3 tokens(p.num_tokens, p.batch);

  if (space.is_prepared) {
    prepareChunk<kDType><<<tokens, kThreads, detail::turnsFloats(p.head_dim) * sizeof(float), stream>>>(space.chunk);
    if ((error = cudaGetLastError()) != cudaSuccess) return error;
  }

  // Blocks are placed as those of the launch before end. If no merge comes in between, they would crowd on the first
  // multiprocessors that are free, and most would wait for those: so each takes as much shared memory as is its share.
  int shared_bytes = kernel.shared_bytes;
  if (num_splits == 1 && !isPrefill(p) && shape.row_blocks <= num_sms * blocks_of_sm) {
    const int share = shared_of_sm / divUp(shape.row_blocks, num_sms);
    const int most = share < shared_of_block ? share : shared_of_block;
    const int padded = (most - kReservedOfBlock) / 128 * 128;
    shared_bytes = padded > shared_bytes ? padded : shared_bytes;
  }
  // The most there is, in every launch alike: another thread may launch the same kernel with more than this one needs.
  error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_of_block);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&args};
  const dim3 grid(shape.row_chunks, num_splits, p.batch * p.num_kv_heads);
  // Both kernels wait for the one before them where they need its results, and may be placed earlier.
  const bool overlaps = major >= 9;
  error = launchOverlapping(kernel.function, grid, dim3(kernel.num_threads), shared_bytes, overlaps, stream, arguments);
  if (error != cudaSuccess) return error;
  if (num_splits > 1) {
    error = launchOverlapping(&mergeSplits<kDType>, dim3(p.batch * p.num_q_heads * p.num_tokens), dim3(kThreads),
                              kWarps * p.head_dim * sizeof(float), overlaps, stream, args);
    if (error != cudaSuccess) return error;
  }

  if (isPrefill(p)) {  // after attention: early queries need keys that later tokens evict
    writeChunk<kDType><<<tokens, kThreads, 0, stream>>>(args);
    error = cudaGetLastError();
  }
  return error;
}

}  // namespace

cudaError_t launchSinkAttention(const SinkAttentionParams& p, void* workspace, cudaStream_t stream) {
  if (sinkAttentionProblem(p) != nullptr || isMisaligned(workspace)) return cudaErrorInvalidValue;
  if (workspace == nullptr && sinkAttentionWorkspaceBytes(p) > 0) return cudaErrorInvalidValue;
  return p.dtype == DType::kFloat16 ? launch<DType::kFloat16>(p, workspace, stream)
                                    : launch<DType::kBFloat16>(p, workspace, stream);
}

}  // namespace sinkexport
