// The host's part of sink attention: where every stream is, how the work is cut, and the memory for it.
#include "sink_attention.h"

#include <algorithm>

#include "reads.h"
#include "sink_attention_plan.h"

namespace sinkexport::cpu {
namespace {

constexpr int64_t kLeastBytes = 32 * 1024;  // of a cache that a further worker is worth waking for
constexpr int64_t kItemsPerWorker = 3;      // of a chunk, so that workers end at about the same time

constexpr int64_t roundedUp(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
constexpr int64_t cut(int64_t n, int64_t into) {
  return (n + into - 1) / into;
}

int64_t elementBytes(WindowType type) {
  return type == WindowType::kInt8 ? 1 : type == WindowType::kFloat16 ? 2 : 4;
}

StreamCache streamOf(const SinkAttentionParams& p, int64_t b) {
  const int64_t t = p.position[b], past = std::max<int64_t>(t - p.num_sinks, 0);
  const int64_t valid = p.num_valid == nullptr ? p.num_tokens : p.num_valid[b];
  StreamCache stream;
  stream.position = t;
  stream.num_valid = static_cast<int>(std::clamp<int64_t>(valid, 0, p.num_tokens));
  stream.num_sinks = static_cast<int>(std::min<int64_t>(t, p.num_sinks));
  stream.num_ring = static_cast<int>(std::min<int64_t>(past, p.window_size));
  return stream;
}

void findStreams(const SinkAttentionParams& p, StreamCache* streams) {
  for (int b = 0; b < p.batch; ++b) streams[b] = streamOf(p, b);
}

// Outputs of tokens that do not count.
void clearOutputs(const SinkAttentionParams& p, const StreamCache* streams) {
  const int64_t width = p.out_tokens_first ? int64_t{p.num_q_heads} * p.value_dim : p.value_dim;
  const int64_t heads = p.out_tokens_first ? 1 : p.num_q_heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t head = 0; head < heads; ++head) {
      float* rows = p.out + (b * heads + head) * p.num_tokens * width;
      std::fill(rows + streams[b].num_valid * width, rows + p.num_tokens * width, 0.0f);
    }
  }
}

int64_t cachedKeys(const SinkAttentionParams& p, const StreamCache& cache) {
  if (cache.num_valid == 0) return 0;
  return std::min<int64_t>(cache.num_sinks + cache.num_ring + cache.num_valid, int64_t{p.num_sinks} + p.window_size);
}

// --- a step ---

StepWork stepWork(const SinkAttentionParams& p, Slices& slices) {
  const int64_t group = p.num_q_heads / p.num_kv_heads, half = p.rotary_dim / 2 + 1;
  const int64_t dim = roundedUp(p.head_dim, 16), value_dim = roundedUp(p.value_dim, 16);
  StepWork work;
  for (float** one : {&work.cos, &work.sin, &work.sink_cos, &work.sink_sin, &work.shift_cos, &work.shift_sin}) {
    *one = slices.take<float>(half);
  }
  work.q = slices.take<float>(group * dim);
  work.sink_q = slices.take<float>(group * dim);
  work.row = slices.take<float>(std::max(dim, value_dim));
  work.normed = slices.take<float>(std::max(dim, value_dim));
  work.logits = slices.take<float>(group * kStepBlock);
  work.key_scale = slices.take<float>(kStepBlock);
  work.value_scale = slices.take<float>(kStepBlock);
  for (float*& sums : work.sums) sums = slices.take<float>(2 * roundedUp(group, 16) + group * value_dim);
  return work;
}

struct StepMemory {
  StreamCache* streams;
  int64_t *stream_start, *bounds;
  StepWork* work;
  int* ended;

  StepMemory(const SinkAttentionParams& p, int threads, Slices& slices) {
    streams = slices.take<StreamCache>(p.batch);
    stream_start = slices.take<int64_t>(p.batch + 1);
    bounds = slices.take<int64_t>(threads + 1);
    work = slices.take<StepWork>(threads);
    ended = slices.take<int>(threads);
    for (int w = 0; w < threads; ++w) {
      const StepWork one = stepWork(p, slices);
      if (work != nullptr) work[w] = one;
    }
  }
};

// The key that is nearest below `key` at which a unit may be cut.
int64_t cutBelow(const SinkAttentionParams& p, const StepPlan& plan, int64_t key) {
  int64_t b = 0;
  while (b + 1 < p.batch && plan.stream_start[b + 1] <= key) ++b;
  const int64_t start = plan.stream_start[b], keys = (plan.stream_start[b + 1] - start) / p.num_kv_heads;
  if (keys == 0) return key;
  const int64_t within = (key - start) % keys;
  return key - within + within / kStepBlock * kStepBlock;
}

// Threads that share `keys` cached keys.
int stepWorkers(const SinkAttentionParams& p, int64_t keys, int threads) {
  const int64_t bytes = keys * (p.head_dim + p.value_dim) * elementBytes(p.window_type);
  return static_cast<int>(std::clamp<int64_t>(bytes / kLeastBytes, 1, std::max(threads, 1)));
}

void runStep(const AttentionKernels& kernels, const SinkAttentionParams& p, const Parallel& parallel,
             Scratch& scratch) {
  const int threads = std::max(parallel.threads, 1);
  Slices count(nullptr);
  StepMemory(p, threads, count);
  Slices slices(scratch.reserve(count.bytes()));
  const StepMemory memory(p, threads, slices);
  findStreams(p, memory.streams);
  clearOutputs(p, memory.streams);
  memory.stream_start[0] = 0;
  for (int b = 0; b < p.batch; ++b) {
    memory.stream_start[b + 1] = memory.stream_start[b] + cachedKeys(p, memory.streams[b]) * p.num_kv_heads;
  }
  const int64_t keys = memory.stream_start[p.batch];
  const int workers = stepWorkers(p, keys, threads);
  StepPlan plan{memory.streams, memory.stream_start, memory.bounds, memory.work, memory.ended, workers};
  for (int w = 0; w < workers; ++w) {
    memory.ended[w] = 0;
    memory.bounds[w] = cutBelow(p, plan, keys * w / workers);
  }
  memory.bounds[workers] = keys;
  parallelFor(parallel, workers, [&](int64_t w) { kernels.step(p, plan, static_cast<int>(w)); });
}

// --- a chunk ---

ChunkRows chunkRows(const SinkAttentionParams& p, const ChunkPlan& plan, Slices& slices) {
  const int64_t dim = p.head_dim, value_dim = p.value_dim, tokens = p.num_tokens, bytes = elementBytes(p.window_type);
  const bool is_stored = p.window_type != WindowType::kFloat32;
  // Rows of pairs are written in whole vectors: where these would reach into the next piece's rows, there are none.
  const bool has_pairs = plan.is_bfloat16 && dim % 16 == 0 && value_dim % 16 == 0;
  ChunkRows rows{};
  rows.keys = slices.take<float>(tokens * dim);
  rows.values = slices.take<float>(tokens * value_dim);
  if (is_stored) {
    rows.stored_k = slices.take<char>(tokens * dim * bytes);
    rows.stored_v = slices.take<char>(tokens * value_dim * bytes);
    rows.scale_k = slices.take<uint16_t>(tokens);
    rows.scale_v = slices.take<uint16_t>(tokens);
  }
  if (has_pairs) {
    rows.pairs_k = slices.take<uint16_t>(tokens * dim);
    rows.pairs_v = slices.take<uint16_t>((tokens + 1) * value_dim);
  }
  return rows;
}

ChunkWork chunkWork(const SinkAttentionParams& p, const ChunkPlan& plan, Slices& slices) {
  // 32 more: vectors may be stored past the end of rows that no vector fills.
  const int64_t dim = p.head_dim, value_dim = p.value_dim, more = 32;
  const int64_t lanes = int64_t{plan.tile_vectors} * 16, rows = lanes * plan.tiles_per_item;
  ChunkWork work{};
  for (float** one : {&work.cos, &work.sin, &work.sink_cos, &work.sink_sin, &work.shift_cos, &work.shift_sin}) {
    *one = slices.take<float>(p.rotary_dim / 2 + 1);
  }
  for (float** one : {&work.row, &work.sink_row, &work.normed})
    *one = slices.take<float>(std::max(dim, value_dim) + more);
  work.q = slices.take<float>(rows * dim);
  work.sink_q = slices.take<float>(rows * dim);
  work.logits = slices.take<float>(plan.block_keys * lanes);
  work.weights = slices.take<float>(plan.is_bfloat16 ? plan.block_keys / 2 * lanes : 0);
  work.tile_k = slices.take<float>(plan.block_keys * dim + more);
  work.tile_v = slices.take<float>(plan.block_keys * value_dim + more);
  work.out = slices.take<float>(rows * value_dim);
  work.out_rows = slices.take<float>(16 * value_dim);
  for (float** one : {&work.largest, &work.sums, &work.token, &work.slope, &work.sink_place, &work.sink_factor}) {
    *one = slices.take<float>(rows);
  }
  return work;
}

struct ChunkMemory {
  StreamCache* streams;
  ChunkRows* rows;
  ChunkWork* work;
  int64_t *next_piece, *next_item;
  int* ended;

  ChunkMemory(const SinkAttentionParams& p, const ChunkPlan& plan, int threads, Slices& slices) {
    streams = slices.take<StreamCache>(p.batch);
    const int64_t units = int64_t{p.batch} * p.num_kv_heads;
    rows = slices.take<ChunkRows>(units);
    work = slices.take<ChunkWork>(threads);
    next_piece = slices.take<int64_t>(1);
    next_item = slices.take<int64_t>(1);
    ended = slices.take<int>(units);
    for (int64_t unit = 0; unit < units; ++unit) {
      const ChunkRows one = chunkRows(p, plan, slices);
      if (rows != nullptr) rows[unit] = one;
    }
    for (int w = 0; w < threads; ++w) {
      const ChunkWork one = chunkWork(p, plan, slices);
      if (work != nullptr) work[w] = one;
    }
  }
};

void runChunk(const AttentionKernels& kernels, const SinkAttentionParams& p, const Parallel& parallel,
              Scratch& scratch) {
  const int threads = std::max(parallel.threads, 1);
  const int64_t units = int64_t{p.batch} * p.num_kv_heads;
  const int64_t vectors = cut(int64_t{p.num_tokens} * (p.num_q_heads / p.num_kv_heads), 16);
  ChunkPlan plan{};
  plan.tile_vectors = static_cast<int>(cut(vectors, cut(vectors, kernels.max_tile_vectors)));
  plan.block_keys = std::max(p.head_dim, p.value_dim) > 96 ? 32 : 64;  // keys and values of a block stay in 32 KiB
  const int64_t tiles = cut(vectors, plan.tile_vectors);
  const int64_t shared = std::clamp<int64_t>(units * tiles / (threads * kItemsPerWorker), 1, kMaxItemTiles);
  plan.tiles_per_item = static_cast<int>(std::min(shared, tiles));
  plan.items_per_unit = static_cast<int>(cut(tiles, plan.tiles_per_item));
  plan.pieces_per_unit = static_cast<int>(cut(p.num_tokens, kPieceTokens));
  plan.num_items = units * plan.items_per_unit;
  plan.workers = static_cast<int>(std::min<int64_t>(threads, plan.num_items));
  plan.is_bfloat16 = p.bfloat16_chunks && kernels.has_bfloat16;

  Slices count(nullptr);
  ChunkMemory(p, plan, threads, count);
  Slices slices(scratch.reserve(count.bytes()));
  const ChunkMemory memory(p, plan, threads, slices);
  plan.streams = memory.streams;
  plan.rows = memory.rows;
  plan.work = memory.work;
  plan.next_piece = memory.next_piece;
  plan.next_item = memory.next_item;
  plan.ended = memory.ended;
  findStreams(p, memory.streams);
  clearOutputs(p, memory.streams);
  *memory.next_piece = *memory.next_item = 0;
  std::fill(memory.ended, memory.ended + units, 0);
  parallelFor(parallel, plan.workers, [&](int64_t w) { kernels.prepare(p, plan, static_cast<int>(w)); });
  parallelFor(parallel, plan.workers, [&](int64_t w) { kernels.chunk(p, plan, static_cast<int>(w)); });
}

void runAttention(const AttentionKernels& kernels, const SinkAttentionParams& p, const Parallel& parallel,
                  Scratch& scratch) {
  (p.num_tokens == 1 ? runStep : runChunk)(kernels, p, parallel, scratch);
}

}  // namespace

void sinkAttentionReads(const SinkAttentionParams& p, int threads, Reads& reads) {
  int64_t keys = 0;
  for (int64_t b = 0; b < p.batch; ++b) keys += cachedKeys(p, streamOf(p, b)) * p.num_kv_heads;
  const int workers = stepWorkers(p, keys, threads);
  int64_t start = 0, worker = 0;  // of the stream: the first key
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t of_unit = cachedKeys(p, streamOf(p, b)), end = start + of_unit * p.num_kv_heads;
    const int64_t sinks = std::min<int64_t>(of_unit, p.num_sinks);
    for (; worker < workers && keys * worker / workers < end; ++worker) {
      const int64_t key = keys * worker / workers - start, unit = b * p.num_kv_heads + key / of_unit;
      const int64_t first = std::max<int64_t>(key % of_unit / kStepBlock * kStepBlock - sinks, 0);
      const int64_t row = unit * p.window_size + first, rows = of_unit - sinks - first;
      const int64_t k_bytes = p.head_dim * elementBytes(p.window_type);
      const int64_t v_bytes = p.value_dim * elementBytes(p.window_type);
      reads.set(static_cast<int>(worker), 0, static_cast<const char*>(p.window_k) + row * k_bytes, rows * k_bytes);
      reads.set(static_cast<int>(worker), 1, static_cast<const char*>(p.window_v) + row * v_bytes, rows * v_bytes);
    }
    start = end;
  }
}

#define SINKEXPORT_DECLARE(isa, value)                                                                          \
  namespace isa {                                                                                               \
  extern const AttentionKernels kAttentionKernels;                                                              \
  static void runSinkAttention(const SinkAttentionParams& params, const Parallel& parallel, Scratch& scratch) { \
    runAttention(kAttentionKernels, params, parallel, scratch);                                                 \
  }                                                                                                             \
  }
SINKEXPORT_FOR_EACH_ISA(SINKEXPORT_DECLARE)
#undef SINKEXPORT_DECLARE

SinkAttentionFunction sinkAttentionFor(Isa isa) {
#define SINKEXPORT_FIND(name, value) \
  if (isa == value) return name::runSinkAttention;
  SINKEXPORT_FOR_EACH_ISA(SINKEXPORT_FIND)
#undef SINKEXPORT_FIND
  return nullptr;
}

}  // namespace sinkexport::cpu
