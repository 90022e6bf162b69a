// A chunk: T tokens a stream attend over the sinks and the ring as they were and over the chunk itself, each by its own
// distance. Early tokens still see keys that later ones evict, so the rows are written last.
#pragma once

#include "sink_attention_chunk_rows.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr float kMasked = 2.0f * kNoLogit;  // below any largest logit by more than exp2Of distinguishes

enum class Section { kSinks, kRing, kChunk };

// Keys that lie one after another in memory.
struct KeyRows {
  Section section;
  int64_t count;
  int64_t oldest;     // of the ring: tokens from the first key to the chunk's first token
  bool begins_cache;  // the first key is token 0
};

// Keys first .. first + n - 1 of a section, and one tile of rows that attends over them.
template <typename Matmul, int V>
struct TileRun {
  static constexpr int64_t kLanes = 16 * V;

  const SinkAttentionParams& p;
  const ChunkWork& work;
  const KeyRows& keys;
  int64_t tile;
  int64_t first_token, last_token;  // of the tile's rows
  int block;
  bool reads_in_place;

  float* row(float* of_tiles) const { return of_tiles + tile * kLanes; }

  // Softcap, ALiBi and masks. first: index of key 0 of the logits in its section.
  void adjust(int64_t first, int n, Floats (&peaks)[V]) const {
    const Floats cap = broadcast(p.softcap * kLog2E), masked = broadcast(kMasked);
    const float* places = row(keys.section == Section::kSinks ? work.sink_place : work.token);
    for (int v = 0; v < V; ++v) {
      const Floats token = load(row(work.token) + 16 * v), slope = load(row(work.slope) + 16 * v);
      const Floats place = load(places + 16 * v);
      Floats peak = broadcast(kNoLogit);
      for (int key = 0; key < n; ++key) {
        const int64_t index = first + key, age = keys.oldest - index;
        float* logit = work.logits + (key * V + v) * 16;
        Floats x = load(logit);
        if (p.softcap > 0.0f) x = cap * tanh(x);
        if (p.alibi_slopes != nullptr) {
          const float key_place = static_cast<float>(keys.section == Section::kRing ? -age : index);
          x = fma(slope, broadcast(key_place) - place, x);
        }
        if (keys.section == Section::kRing) {
          x = ifLess(token, broadcast(static_cast<float>(p.window_size - age)), x, masked);
        } else if (keys.section == Section::kChunk) {
          x = ifLess(token, broadcast(static_cast<float>(index)), masked, x);
        }
        store(logit, x);
        peak = max(peak, x);
      }
      peaks[v] = peak;
    }
  }

  // Logits to weights. Pairs of keys where Matmul takes pairs: a missing second one has no weight.
  void weigh(int n, bool has_token_0, const Floats (&base)[V]) const {
    for (int v = 0; v < V; ++v) {
      const auto weight = [&](int key) __attribute__((always_inline)) {
        return exp2Of(load(work.logits + (key * V + v) * 16) - base[v]);
      };
      Floats sums = load(row(work.sums) + 16 * v);
      if (Matmul::kTogether == 1) {
        int key = 0;
        if (has_token_0) {
          const Floats first = weight(0) * load(row(work.sink_factor) + 16 * v);
          store(work.logits + v * 16, first);
          sums = sums + first;
          key = 1;
        }
        for (; key < n; ++key) {
          const Floats x = weight(key);
          store(work.logits + (key * V + v) * 16, x);
          sums = sums + x;
        }
      } else {
#ifdef SINKEXPORT_BF16
        for (int key = 0; key < n; key += 2) {
          Floats first = weight(key);
          if (has_token_0 && key == 0) first = first * load(row(work.sink_factor) + 16 * v);
          const Floats second = key + 1 < n ? weight(key + 1) : broadcast(0.0f);
          storeBytes(static_cast<char*>(work.weights) + int64_t{64} * (key / 2 * V + v), packBf16(first, second));
          sums = sums + (first + second);
        }
#endif
      }
      store(row(work.sums) + 16 * v, sums);
    }
  }

  // What the first tile asks for while it multiplies keys, if they are read where they are stored: their values, which
  // come next, and the keys of the next block.
  SINKEXPORT_INLINE Ahead aheadOf(const char* k, const char* v, int64_t begin) const {
    if (tile > 0 || !reads_in_place) return {nullptr, nullptr, 0, 0};
    const int64_t row_bytes = 4 / Matmul::kTogether;
    const int64_t k_bytes = row_bytes * p.head_dim, v_bytes = row_bytes * p.value_dim;
    return {k + (begin + block) * k_bytes, v + begin * v_bytes, k_bytes, v_bytes};
  }

  // k, v: factors of the n keys from `first` on.
  void attend(int64_t first, int n, const char* k, const char* v, const void* q) const {
    int64_t begin = 0, end = n;
    bool is_masked = false;
    if (keys.section == Section::kRing) {
      const int64_t limit = keys.oldest - first - p.window_size + 1;  // keys from limit + token on are seen
      if (limit + first_token > 0) begin = (limit + first_token) / Matmul::kTogether * Matmul::kTogether;
      is_masked = limit + last_token > begin;
    } else if (keys.section == Section::kChunk) {
      if (last_token + 1 - first < end) end = last_token + 1 - first;
      is_masked = first + end - 1 > first_token;
    }
    if (begin >= end) return;
    const int count = static_cast<int>(end - begin);
    const int64_t row_bytes = 4 / Matmul::kTogether;
    Floats peaks[V], base[V], shrink[V];
    for (int i = 0; i < V; ++i) peaks[i] = broadcast(kNoLogit);
    const char* tile_q = static_cast<const char*>(q) + tile * kLanes * p.head_dim * row_bytes;
    const Ahead ahead = aheadOf(k, v, begin);
    tileLogits<Matmul, V>(tile_q, k + begin * p.head_dim * row_bytes, count, p.head_dim, ahead, work.logits, peaks);
    if (is_masked || p.softcap > 0.0f || p.alibi_slopes != nullptr) adjust(first + begin, count, peaks);
    for (int i = 0; i < V; ++i) {
      float* largest_yet = row(work.largest) + 16 * i;
      float* sums = row(work.sums) + 16 * i;
      base[i] = max(load(largest_yet), peaks[i]);
      shrink[i] = exp2Of(load(largest_yet) - base[i]);
      store(largest_yet, base[i]);
      store(sums, load(sums) * shrink[i]);
    }
    weigh(count, p.sink_scale != nullptr && keys.begins_cache && first + begin == 0, base);
    const int whole = (count + Matmul::kTogether - 1) / Matmul::kTogether * Matmul::kTogether;
    const void* weights = Matmul::kTogether == 1 ? work.logits : work.weights;
    tileOut<Matmul, V>(weights, v + begin * p.value_dim * row_bytes, whole, p.value_dim, shrink,
                       work.out + tile * kLanes * p.value_dim);
  }
};

// All tiles of an item over one section. k, v: its rows; scales: of them, or null.
template <typename Matmul, int V, typename Row>
void attendSection(const SinkAttentionParams& p, const ChunkWork& work, int block, const Item& item,
                   const KeyRows& keys, const void* k, const void* v, const uint16_t* scale_k, const uint16_t* scale_v,
                   const void* q) {
  using Element = typename Row::Element;
  const int64_t last_seen = (item.first_row + item.num_rows - 1) / item.group;
  for (int64_t first = 0; first < keys.count; first += block) {
    if (keys.section == Section::kChunk && first > last_seen) return;
    const int n = static_cast<int>(keys.count - first < block ? keys.count - first : block);
    const Element* k_rows = static_cast<const Element*>(k) + first * p.head_dim;
    const void* tile_k = asFactors<Matmul, Row>(k_rows, scale_k == nullptr ? nullptr : scale_k + first, n, p.head_dim,
                                                false, work.tile_k);
    const void* tile_v =
        asFactors<Matmul, Row>(static_cast<const Element*>(v) + first * p.value_dim,
                               scale_v == nullptr ? nullptr : scale_v + first, n, p.value_dim, true, work.tile_v);
    for (int64_t tile = 0; tile < item.num_tiles; ++tile) {
      const int64_t begin = item.first_row + tile * 16 * V, unit_end = item.first_row + item.num_rows;
      const int64_t end = begin + 16 * V < unit_end ? begin + 16 * V : unit_end;
      const TileRun<Matmul, V> run{
          p, work, keys, tile, begin / item.group, (end - 1) / item.group, block, tile_k == k_rows};
      run.attend(first, n, static_cast<const char*>(tile_k), static_cast<const char*>(tile_v), q);
    }
  }
}

// Whether the cache has evicted nothing before any of an item's tokens: sinks meet queries as the window does then.
inline bool sinksStayNear(const SinkAttentionParams& p, const StreamCache& cache, const Item& item) {
  const int64_t last = cache.position + (item.first_row + item.num_rows - 1) / item.group;
  return p.q_turned_weight == nullptr && p.frequency != nullptr && last < int64_t{p.num_sinks} + p.window_size;
}

// Queries of an item's tiles, turned and placed, and what their rows need beside. Returns those that sinks meet.
template <typename Matmul, int V>
const void* prepareQueries(const SinkAttentionParams& p, const StreamCache& cache, const ChunkWork& work,
                           const Item& item) {
  constexpr int64_t kLanes = 16 * V;
  const int64_t last_place = int64_t{p.num_sinks} + p.window_size - 1;
  const float factor = logitFactor(p);
  const int64_t tile_bytes = kLanes * p.head_dim * (4 / Matmul::kTogether);
  Angles angles{work.cos, work.sin, work.sink_cos, work.sink_sin, work.shift_cos, work.shift_sin};
  const bool has_sinks = cache.num_sinks > 0 && !sinksStayNear(p, cache, item);
  int64_t token = -1;
  float of_row = 1.0f;
  for (int64_t i = 0; i < item.num_tiles * kLanes; ++i) {
    const int64_t tile = i / kLanes, lane = i % kLanes;
    // Rows behind the last one are copies of it.
    const int64_t row = item.first_row + (i < item.num_rows ? i : item.num_rows - 1);
    const int64_t head = item.kv_head * item.group + row % item.group;
    if (row / item.group != token) {
      token = row / item.group;
      findAngles(p, item.b, token, cache.position + token, has_sinks, angles);
      of_row = rowFactor(p, false, item.b, token);
    }
    const float* q = normalisedQuery(p, item.b, head, token, of_row, work.normed);
    if (token + kTokensAhead < item.num_tokens) {
      const float* later = queryRow(p, item.b, head, token + kTokensAhead);
      for (int d = 0; d < p.head_dim; d += 16) prefetch(later + d);
    }
    turnQuery(p, q, angles, factor, work.row, work.sink_row, has_sinks);
    placeQuery<Matmul>(work.row, p.head_dim, kLanes, lane, static_cast<char*>(work.q) + tile * tile_bytes);
    if (has_sinks) {
      placeQuery<Matmul>(work.sink_row, p.head_dim, kLanes, lane, static_cast<char*>(work.sink_q) + tile * tile_bytes);
    }
    const int64_t place = cache.position + token;
    work.token[i] = static_cast<float>(token);
    work.sink_place[i] = static_cast<float>(place < last_place ? place : last_place);
    work.slope[i] = p.alibi_slopes != nullptr ? p.alibi_slopes[head] * kLog2E : 0.0f;
    work.sink_factor[i] = p.sink_scale != nullptr ? p.sink_scale[head] : 1.0f;
    work.largest[i] = kNoLogit;
    work.sums[i] = 0.0f;
  }
  for (int64_t i = 0; i < item.num_tiles * kLanes * p.value_dim; i += 16) store(work.out + i, broadcast(0.0f));
  return has_sinks ? work.sink_q : work.q;
}

template <typename Matmul, int V, typename Row>
void attendRing(const SinkAttentionParams& p, const StreamCache& cache, const ChunkWork& work, int block,
                const Item& item) {
  const int64_t newest = (cache.position - 1 - p.num_sinks) % p.window_size;
  const int64_t older = cache.num_ring == p.window_size ? p.window_size - 1 - newest : 0;
  for (int part = 0; part < 2; ++part) {
    const bool is_older = part == 0;
    const KeyRows keys{Section::kRing, is_older ? older : newest + 1, is_older ? p.window_size : newest + 1, false};
    const int64_t row = item.unit * p.window_size + (is_older ? newest + 1 : 0);
    const auto* k = static_cast<const typename Row::Element*>(p.window_k) + row * p.head_dim;
    const auto* v = static_cast<const typename Row::Element*>(p.window_v) + row * p.value_dim;
    attendSection<Matmul, V, Row>(p, work, block, item, keys, k, v, Row::kHasScale ? p.window_k_scale + row : nullptr,
                                  Row::kHasScale ? p.window_v_scale + row : nullptr, work.q);
  }
}

// Outputs of an item's rows. lanes: rows of a tile.
inline void writeItem(const SinkAttentionParams& p, const ChunkWork& work, const Item& item, int64_t lanes) {
  const int64_t n = p.value_dim;
  for (int64_t first = 0; first < item.num_rows; first += 16) {
    const float* values = work.out + first / lanes * lanes * n + first % lanes;  // [Dv][lanes]
    const bool is_whole = n % 16 == 0;
    for (int64_t d = 0; is_whole && d < n; d += 16) {
      Floats block[16];
      for (int i = 0; i < 16; ++i) block[i] = load(values + (d + i) * lanes);
      transpose(block);
      for (int i = 0; i < 16; ++i) store(work.out_rows + i * n + d, block[i]);
    }
    for (int64_t i = first; i < item.num_rows && i < first + 16; ++i) {
      const int64_t row = item.first_row + i, head = item.kv_head * item.group + row % item.group;
      const float factor = normaliser(work.largest[i], work.sums[i], p.sink_logit, head);
      const float* from = is_whole ? work.out_rows + (i - first) * n : values + (i - first);
      writeOut(p, item.b, head, row / item.group, from, is_whole ? 1 : lanes, factor);
    }
  }
}

template <typename Matmul, int V>
void attendItem(const SinkAttentionParams& p, const StreamCache& cache, const ChunkWork& work, int block,
                const Item& item) {
  const void* sink_q = prepareQueries<Matmul, V>(p, cache, work, item);
  if (cache.num_sinks > 0) {
    const KeyRows keys{Section::kSinks, cache.num_sinks, 0, true};
    attendSection<Matmul, V, FloatRow>(p, work, block, item, keys, p.sink_k + item.unit * p.num_sinks * p.head_dim,
                                       p.sink_v + item.unit * p.num_sinks * p.value_dim, nullptr, nullptr, sink_q);
  }
  if (cache.num_ring > 0) {
    if (p.window_type == WindowType::kFloat32) attendRing<Matmul, V, FloatRow>(p, cache, work, block, item);
    if (p.window_type == WindowType::kFloat16) attendRing<Matmul, V, HalfRow>(p, cache, work, block, item);
    if (p.window_type == WindowType::kInt8) attendRing<Matmul, V, Int8Row>(p, cache, work, block, item);
  }
  const KeyRows keys{Section::kChunk, item.num_tokens, 0, cache.position == 0};
  if (work.pairs_k != nullptr) {
    attendSection<Matmul, V, PairRow>(p, work, block, item, keys, work.pairs_k, work.pairs_v, nullptr, nullptr, work.q);
  } else {
    attendSection<Matmul, V, FloatRow>(p, work, block, item, keys, work.keys, work.values, nullptr, nullptr, work.q);
  }
  writeItem(p, work, item, 16 * V);
}

template <typename Matmul>
void attendTiles(const SinkAttentionParams& p, const ChunkPlan& plan, const ChunkWork& work, const Item& item) {
  const StreamCache& cache = plan.streams[item.b];
  if (plan.tile_vectors == 1) attendItem<Matmul, 1>(p, cache, work, plan.block_keys, item);
#ifdef SINKEXPORT_WIDE_TILES
  if (plan.tile_vectors == 2) attendItem<Matmul, 2>(p, cache, work, plan.block_keys, item);
  if (plan.tile_vectors == 3) attendItem<Matmul, 3>(p, cache, work, plan.block_keys, item);
#endif
}

inline void chunkWorker(const SinkAttentionParams& p, const ChunkPlan& plan, int worker) {
  ChunkWork work = plan.work[worker];
  const int64_t item_rows = int64_t{plan.tiles_per_item} * plan.tile_vectors * 16;
  while (true) {
    // From the last one on: later rows have more keys, and threads end together after small items.
    const int64_t next = plan.num_items - 1 - __atomic_fetch_add(plan.next_item, 1, __ATOMIC_RELAXED);
    if (next < 0) return;
    Item item;
    item.unit = next / plan.items_per_unit;
    item.b = item.unit / p.num_kv_heads;
    item.kv_head = item.unit % p.num_kv_heads;
    item.group = p.num_q_heads / p.num_kv_heads;
    const StreamCache& cache = plan.streams[item.b];
    static_cast<ChunkRows&>(work) = plan.rows[item.unit];
    item.num_tokens = cache.num_valid;
    item.first_row = next % plan.items_per_unit * item_rows;
    const int64_t left = item.num_tokens * item.group - item.first_row;
    item.num_rows = left < item_rows ? left : item_rows;
    item.num_tiles = (item.num_rows + plan.tile_vectors * 16 - 1) / (plan.tile_vectors * 16);
    if (left > 0) {
#ifdef SINKEXPORT_BF16
      if (plan.is_bfloat16) {
        attendTiles<Bf16Matmul>(p, plan, work, item);
      } else {
        attendTiles<FloatMatmul>(p, plan, work, item);
      }
#else
      attendTiles<FloatMatmul>(p, plan, work, item);
#endif
    }
    const int ended = __atomic_add_fetch(plan.ended + item.unit, 1, __ATOMIC_ACQ_REL);
    if (p.reads_only || ended < plan.items_per_unit || item.num_tokens == 0) continue;
    writeRows(p, cache, work, item);
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
