// The kernels around a chunk's attention: what it needs of the chunk beforehand, and the chunk's way into the states.
#pragma once

#include "sink_attention_config.cuh"
#include "sink_attention_rows.cuh"
#include "warp.cuh"

namespace sinkexport {
namespace sink_attention {

constexpr int kChunkThreads = 256;

// What attention and write need of the chunk; null: as the caller gave it.
struct ChunkArgs {
  SinkAttentionParams p;
  void* q;
  void* q_sink;
  void* k;
  void* v;
  void* k_scale;
  void* v_scale;
};

// Where a thread stands among rows of D dimensions: 8 of them are a lane's, and a power of two of lanes a row's.
struct RowLanes {
  int of_row, piece, first_row, rows_at_once;
  bool is_used;

  __device__ explicit RowLanes(int head_dim) : of_row(8) {
    while (8 * of_row < head_dim) of_row *= 2;
    piece = threadIdx.x % of_row;
    first_row = threadIdx.x / of_row;
    rows_at_once = kChunkThreads / of_row;
    is_used = 8 * piece < head_dim;
  }
};

template <typename Half>
__device__ Piece<Half> pieceOf(const Half* row, int piece) {
  return *reinterpret_cast<const Piece<Half>*>(row + 8 * piece);
}

// How a lane's 8 dimensions of any row of a token are turned.
struct LaneTurn {
  float cos[8], sin[8];  // sin: of the sum, see turnedBy
  uint32_t is_turned;    // by dimension

  __device__ LaneTurn(int piece, const float* all_cos, const float* all_sin, int num_pairs, bool interleaved)
      : is_turned(0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int d = 8 * piece + i;
      cos[i] = 1.0f, sin[i] = 0.0f;
      if (d >= 2 * num_pairs) continue;
      const bool is_first = interleaved ? d % 2 == 0 : d < num_pairs;
      const int pair = interleaved ? d / 2 : (is_first ? d : d - num_pairs);
      cos[i] = all_cos[pair], sin[i] = is_first ? -all_sin[pair] : all_sin[pair];
      is_turned |= 1u << i;
    }
  }

  // y: what each of x is turned with.
  __device__ void turn(const float (&x)[8], const float (&y)[8], float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = is_turned >> i & 1 ? turnedBy(x[i], y[i], cos[i], sin[i]) : x[i];
  }
};

// A lane's 8 dimensions of a row, and those that they are turned with; num_pairs = 0: none.
template <typename Half>
__device__ void readPieces(const Half* row, int piece, int num_pairs, bool interleaved, float (&x)[8], float (&y)[8]) {
  const Piece<Half> own = pieceOf(row, piece);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = toFloat(own.halves[i]);
  if (8 * piece >= 2 * num_pairs) return;
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = x[i ^ 1];
  } else if (num_pairs % 8 == 0) {
    const Piece<Half> other = pieceOf(row, piece + (8 * piece < num_pairs ? num_pairs : -num_pairs) / 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = toFloat(other.halves[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int d = 8 * piece + i;
      if (d < 2 * num_pairs) y[i] = toFloat(row[partnerOf(d, num_pairs, false)]);
    }
  }
}

template <typename Half>
__device__ void storePiece(void* rows, size_t row, int head_dim, int piece, const float (&x)[8]) {
  Piece<Half> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.halves[i] = fromFloat<Half>(x[i]);
  *reinterpret_cast<Piece<Half>*>(static_cast<Half*>(rows) + row * head_dim + 8 * piece) = out;
}

// A row of k or v that attention meets as it will be stored: int8 entries as 16-bit numbers and their scale; sinks, and
// everything where the window is not int8, as they are, with a scale of 1. By all lanes of the warp; rows: null for
// those that have none to store.
template <typename Half>
__device__ void prepareRow(const SinkAttentionParams& p, const RowLanes& lanes, float (&x)[8], bool is_rounded,
                           void* rows, void* scales, size_t row) {
  __half step = __float2half_rn(1.0f);
  if (is_rounded) {
    float largest = 0.0f;
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
    for (int other = 1; other < lanes.of_row; other *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
    }
    step = int8Scale(largest);
    for (int i = 0; i < 8; ++i) x[i] = int8Entry(x[i], __half2float(step));
  }
  if (rows == nullptr) return;
  storePiece<Half>(rows, row, p.head_dim, lanes.piece, x);
  if (scales != nullptr && lanes.piece == 0) static_cast<__half*>(scales)[row] = step;
}

// Grid: T x B.
template <typename Half>
__global__ void __launch_bounds__(kChunkThreads) prepareChunk(const __grid_constant__ ChunkArgs args) {
  extern __shared__ float turns_shared[];
  waitForEarlierKernels();
  allowNextKernel();
  const SinkAttentionParams& p = args.p;
  const int token = blockIdx.x, stream = blockIdx.y;
  if (p.num_valid != nullptr && token >= p.num_valid[stream]) return;
  const int64_t t = streamPosition(p.position, stream) + token;
  Turns turns = makeTurns(p, t, turns_shared);
  takeShift(p, stream, token, turns);
  __syncthreads();
  const bool is_rounded = p.int8_window && t >= p.num_sinks;
  const bool turns_back = args.q_sink != nullptr && sinkrt::Ring{p.num_sinks, p.window_size}.shift(t) > 0;
  const RowLanes lanes(p.head_dim);
  const int first_k = p.num_q_heads, first_v = first_k + p.num_kv_heads;
  const int num_rows = args.v != nullptr ? first_v + p.num_kv_heads : args.k != nullptr ? first_v : first_k;
  const bool skips_q = args.q == nullptr && !turns_back;
  const auto rowOf = [&](int heads, int head) {
    return (static_cast<size_t>(stream) * heads + head) * p.num_tokens + token;
  };
  const int num_turned = max(turns.num_pairs, turns.num_sink_pairs);
  const LaneTurn plain(lanes.piece, turns.cos, turns.sin, turns.num_pairs, p.interleaved);
  const LaneTurn for_sinks(lanes.piece, turns.sink_cos, turns.sink_sin, turns_back ? turns.num_sink_pairs : 0,
                           p.interleaved);
#pragma unroll 2
  for (int begin = skips_q ? first_k : 0; begin < num_rows; begin += lanes.rows_at_once) {
    const int index = begin + lanes.first_row;
    const bool is_q = index < first_k, is_value = index >= first_v, is_there = index < num_rows && lanes.is_used;
    const int head = is_q ? index : (is_value ? index - first_v : index - first_k);
    const size_t row = rowOf(is_q ? p.num_q_heads : p.num_kv_heads, is_there ? head : 0);
    const auto* from = static_cast<const Half*>(is_q ? p.q : (is_value ? p.v : p.k)) + row * p.head_dim;
    float x[8] = {}, y[8] = {}, out[8];
    if (is_there) readPieces(from, lanes.piece, is_value ? 0 : num_turned, p.interleaved, x, y);
    if (is_there && is_q && turns_back) {
      for_sinks.turn(x, y, out);
      storePiece<Half>(args.q_sink, row, p.head_dim, lanes.piece, out);
    }
    if (!is_value) {
      plain.turn(x, y, out);
      for (int i = 0; i < 8; ++i) x[i] = out[i];
    }
    if (is_there && is_q && args.q != nullptr) storePiece<Half>(args.q, row, p.head_dim, lanes.piece, x);
    // Rows of other kinds may be in the warp: all its lanes exchange, those of k and v store.
    prepareRow<Half>(p, lanes, x, is_rounded, is_there && !is_q ? (is_value ? args.v : args.k) : nullptr,
                     is_value ? args.v_scale : args.k_scale, row);
  }
}

// Grid: T x B. Stores the chunk's valid tokens: at most W of them, so no two want one slot.
template <typename Half>
__global__ void __launch_bounds__(kChunkThreads) writeChunk(const __grid_constant__ AttendArgs args) {
  waitForEarlierKernels();
  allowNextKernel();
  const SinkAttentionParams& p = args.p;
  const int token = blockIdx.x, stream = blockIdx.y;
  if (p.num_valid != nullptr && token >= p.num_valid[stream]) return;
  const sinkrt::Ring ring{p.num_sinks, p.window_size};
  const int64_t t = streamPosition(p.position, stream) + token;
  const bool is_sink = ring.isSink(t);
  const size_t slot = is_sink ? t : ring.slot(t);
  const RowLanes lanes(p.head_dim);
  if (!lanes.is_used) return;
  for (int index = lanes.first_row; index < 2 * p.num_kv_heads; index += lanes.rows_at_once) {
    const bool is_value = index >= p.num_kv_heads;
    const size_t head_row = static_cast<size_t>(stream) * p.num_kv_heads + index % p.num_kv_heads;
    const size_t from = head_row * p.num_tokens + token, to = head_row * (is_sink ? p.num_sinks : p.window_size) + slot;
    const Piece<Half> piece =
        pieceOf(static_cast<const Half*>(is_value ? args.v : args.k) + from * p.head_dim, lanes.piece);
    void* state = is_value ? (is_sink ? p.sink_v : p.window_v) : (is_sink ? p.sink_k : p.window_k);
    if (p.int8_window && !is_sink) {
      struct alignas(8) Entries {
        int8_t entries[8];
      } out;
#pragma unroll
      for (int i = 0; i < 8; ++i) out.entries[i] = static_cast<int8_t>(toFloat(piece.halves[i]));
      *reinterpret_cast<Entries*>(static_cast<int8_t*>(state) + to * p.head_dim + 8 * lanes.piece) = out;
      if (lanes.piece == 0) {
        static_cast<__half*>(is_value ? p.window_v_scale : p.window_k_scale)[to] =
            static_cast<const __half*>(is_value ? args.v_scale : args.k_scale)[from];
      }
    } else {
      *reinterpret_cast<Piece<Half>*>(static_cast<Half*>(state) + to * p.head_dim + 8 * lanes.piece) = piece;
    }
  }
}

}  // namespace sink_attention
}  // namespace sinkexport
