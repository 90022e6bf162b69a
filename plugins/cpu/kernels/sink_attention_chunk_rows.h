// Rows of a chunk on their way: new ones turned, rounded, and at last written; queries and cached rows brought into the
// form that the matmuls of sink_attention_tile.h take.
#pragma once

#include "half.h"
#include "sink_attention_tile.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int kTokensAhead = 4;  // whose rows are asked for: they lie too far apart for the processor to see

// Rows first_row .. of a unit, for one worker: row r is query head r % group of token r / group.
struct Item {
  int64_t b, kv_head, unit, group;
  int64_t first_row, num_rows, num_tiles;
  int num_tokens;  // that count
};

// New rows first .. last - 1 of a unit, turned, as they are stored and in float32 as they take part.
inline void prepareRows(const SinkAttentionParams& p, const StreamCache& cache, const ChunkWork& work, const Item& item,
                        int first, int last) {
  for (int i = first; i < last; ++i) {
    const int64_t t = cache.position + i;
    Angles angles{work.cos, work.sin, nullptr, nullptr, nullptr, nullptr};
    if (p.frequency != nullptr) {
      angles.half = p.rotary_dim / 2;
      anglesOf(t, p.frequency, angles.half, p.rope_scaling, angles.cosine, angles.sine);
    }
    for (int part = 0; part < 2; ++part) {
      const bool is_key = part == 0;
      const int n = is_key ? p.head_dim : p.value_dim;
      const float* row = is_key ? normalisedKey(p, item.b, item.kv_head, i, work.normed)
                                : normalisedValue(p, item.b, item.kv_head, i, work.normed);
      float* to = (is_key ? work.keys : work.values) + int64_t{i} * n;
      if (i + kTokensAhead < item.num_tokens) {
        const float* later = newRow(p, is_key, item.b, item.kv_head, i + kTokensAhead);
        for (int d = 0; d < n; d += 16) prefetch(later + d);
      }
      if (is_key) {
        turn(row, work.row, n, angles.half, p.interleaved, angles.cosine, angles.sine, 1.0f);
        row = work.row;
      }
      if (t < p.num_sinks || p.window_type == WindowType::kFloat32) {
        std::memcpy(to, row, n * sizeof(float));
        continue;
      }
      void* stored = is_key ? work.stored_k : work.stored_v;
      uint16_t* scales = is_key ? work.scale_k : work.scale_v;
      storeRow(p.window_type, row, n, stored, scales, i);
      for (int d = 0; d < n; d += 16) {
        const int left = n - d;
        if (p.window_type == WindowType::kFloat16) {
          storePart(to + d, HalfRow::readPart(static_cast<const uint16_t*>(stored) + int64_t{i} * n + d, left), left);
        } else {
          const Floats entries = Int8Row::readPart(static_cast<const int8_t*>(stored) + int64_t{i} * n + d, left);
          storePart(to + d, entries * broadcast(floatOfHalf(scales[i])), left);
        }
      }
    }
  }
}

// Copies the prepared rows to the states.
inline void writeRows(const SinkAttentionParams& p, const StreamCache& cache, const ChunkWork& work, const Item& item) {
  const int64_t bytes = p.window_type == WindowType::kFloat32 ? 4 : p.window_type == WindowType::kFloat16 ? 2 : 1;
  for (int64_t i = 0; i < item.num_tokens; ++i) {
    const int64_t t = cache.position + i, slot = item.unit * p.window_size + (t - p.num_sinks) % p.window_size;
    for (int part = 0; part < 2; ++part) {
      const bool is_key = part == 0;
      const int64_t n = is_key ? p.head_dim : p.value_dim;
      const float* row = (is_key ? work.keys : work.values) + i * n;
      char* window = static_cast<char*>(is_key ? p.window_k : p.window_v);
      if (t < p.num_sinks) {
        std::memcpy((is_key ? p.sink_k : p.sink_v) + (item.unit * p.num_sinks + t) * n, row, n * sizeof(float));
      } else if (p.window_type == WindowType::kFloat32) {
        std::memcpy(window + slot * n * bytes, row, n * sizeof(float));
      } else {
        const char* stored = static_cast<const char*>(is_key ? work.stored_k : work.stored_v);
        std::memcpy(window + slot * n * bytes, stored + i * n * bytes, n * bytes);
        if (p.window_type != WindowType::kInt8) continue;
        (is_key ? p.window_k_scale : p.window_v_scale)[slot] = (is_key ? work.scale_k : work.scale_v)[i];
      }
    }
  }
}

// One row of a tile of queries, in lane `lane` of [dim][V * 16] or of pairs of bfloat16 [dim / 2][V * 16][2].
template <typename Matmul>
void placeQuery(const float* row, int dim, int64_t lanes, int64_t lane, void* tile) {
  if (Matmul::kTogether == 1) {
    float* to = static_cast<float*>(tile) + lane;
    for (int d = 0; d < dim; ++d) to[d * lanes] = row[d];
  } else {
#ifdef SINKEXPORT_BF16
    uint32_t pairs[16];
    uint32_t* to = static_cast<uint32_t*>(tile) + lane;
    for (int d = 0; d < dim; d += 16) {
      uint16_t* halves = reinterpret_cast<uint16_t*>(pairs);
      storeBf16(halves, loadPart(row + d, dim - d));
      const int64_t count = dim - d < 16 ? (dim - d) / 2 : 8;
      for (int64_t i = 0; i < count; ++i) to[(d / 2 + i) * lanes] = pairs[i];
    }
#endif
  }
}

// n rows of [n, dim] as factors of a matmul, in `tile` or where they lie. interleaved: two rows side by side, as values
// are multiplied; then `tile` has a row of zeros behind an odd number.
template <typename Matmul, typename Row>
const void* asFactors(const typename Row::Element* rows, const uint16_t* scales, int n, int dim, bool interleaved,
                      void* tile) {
  if (Row::kIsPairs || (Matmul::kTogether == 1 && Row::kIsFloat)) return rows;
  for (int first = 0; first < n; first += 16) {
    float factors[16];
    if (Row::kHasScale) store(factors, loadHalfPart(scales + first, n - first));
    for (int i = first; i < n && i < first + 16; i += interleaved ? Matmul::kTogether : 1) {
      for (int d = 0; d < dim; d += 16) {
        const auto read = [&](int row) __attribute__((always_inline)) {
          if (row >= n) return broadcast(0.0f);
          const typename Row::Element* from = rows + int64_t{row} * dim + d;
          prefetch(reinterpret_cast<const char*>(from) + kAhead);
          const Floats x = d + 16 <= dim ? Row::read(from) : Row::readPart(from, dim - d);
          return Row::kHasScale ? x * broadcast(factors[row - first]) : x;
        };
        if (Matmul::kTogether == 1) {
          storePart(static_cast<float*>(tile) + int64_t{i} * dim + d, read(i), dim - d);
        } else {
#ifdef SINKEXPORT_BF16
          // What is stored behind a row's end is overwritten by the next one; behind the last there is room.
          uint16_t* to = static_cast<uint16_t*>(tile) + int64_t{i} * dim;
          if (interleaved) {
            storeBytes(to + 2 * d, packBf16(read(i), read(i + 1)));
          } else {
            storeBf16(to + d, read(i));
          }
#endif
        }
      }
    }
  }
  return tile;
}

// Prepares new rows, piece by piece.
inline void prepareWorker(const SinkAttentionParams& p, const ChunkPlan& plan, int worker) {
  const int64_t pieces = int64_t{p.batch} * p.num_kv_heads * plan.pieces_per_unit;
  while (true) {
    const int64_t next = __atomic_fetch_add(plan.next_piece, 1, __ATOMIC_RELAXED);
    if (next >= pieces) return;
    Item item{};
    item.unit = next / plan.pieces_per_unit;
    item.b = item.unit / p.num_kv_heads;
    item.kv_head = item.unit % p.num_kv_heads;
    const StreamCache& cache = plan.streams[item.b];
    item.num_tokens = cache.num_valid;
    const int first = static_cast<int>(next % plan.pieces_per_unit) * kPieceTokens;
    const int last = first + kPieceTokens < item.num_tokens ? first + kPieceTokens : item.num_tokens;
    if (first >= last) continue;
    ChunkWork work = plan.work[worker];
    static_cast<ChunkRows&>(work) = plan.rows[item.unit];
    prepareRows(p, cache, work, item, first, last);
#ifdef SINKEXPORT_BF16
    if (work.pairs_k == nullptr) continue;
    asFactors<Bf16Matmul, FloatRow>(work.keys + int64_t{first} * p.head_dim, nullptr, last - first, p.head_dim, false,
                                    static_cast<uint16_t*>(work.pairs_k) + int64_t{first} * p.head_dim);
    asFactors<Bf16Matmul, FloatRow>(work.values + int64_t{first} * p.value_dim, nullptr, last - first, p.value_dim,
                                    true, static_cast<uint16_t*>(work.pairs_v) + int64_t{first} * p.value_dim);
#endif
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
