// A step: one token a stream. The query heads of a kv head share one reading of its cache, which workers cut by keys.
#pragma once

#include "sink_attention_step_matmul.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

// Sums of a unit's heads so far.
struct StepSums {
  float *largest, *sums, *out;  // [G], [G], [G][Dv padded]
};

// One piece of a unit's cache.
struct StepKeys {
  const float* q;      // [G][D padded], in units of the logits
  int64_t begin, end;  // rows of the piece
  bool is_sink;
  int64_t newest;  // of the window: slot of the new token; of sinks: the query's place in the cache
};

// Logits of one head to weights, in place; sums are scaled down where the largest logit rises.
inline void weigh(const SinkAttentionParams& p, const StepKeys& keys, const StepWork& work, const StepSums& sums,
                  int64_t g, int64_t head, int64_t first, int n, bool has_scale) {
  float* logits = work.logits + g * kStepBlock;
  const Floats cap = broadcast(p.softcap * kLog2E);
  Floats largest_yet = broadcast(kNoLogit);
  for (int i = 0; i < n; i += 16) {
    Floats x = load(logits + i);
    if (has_scale) x = x * load(work.key_scale + i);
    if (p.softcap > 0.0f) x = cap * tanh(x);
    if (p.alibi_slopes != nullptr) {
      float distance[16];  // of the key from the query, at most 0
      for (int j = 0; j < 16; ++j) {
        const int64_t key = first + i + j;
        distance[j] = static_cast<float>(keys.is_sink || key <= keys.newest ? key - keys.newest
                                                                            : key - keys.newest - p.window_size);
      }
      x = fma(broadcast(p.alibi_slopes[head] * kLog2E), load(distance), x);
    }
    if (i + 16 > n) {  // behind the last key
      storePart(logits + i, x, n - i);
      for (int j = n; j < i + 16; ++j) logits[j] = kNoLogit;
      x = load(logits + i);
    }
    store(logits + i, x);
    largest_yet = max(largest_yet, x);
  }
  const float found = largest(largest_yet);
  if (found > sums.largest[g]) {
    const float shrink = exp2Of(sums.largest[g] - found);
    sums.largest[g] = found;
    sums.sums[g] *= shrink;
    const int64_t padded = (p.value_dim + 15) / 16 * 16;
    for (int64_t d = g * padded; d < (g + 1) * padded; d += 16) {
      store(sums.out + d, load(sums.out + d) * broadcast(shrink));
    }
  }
  const Floats base = broadcast(sums.largest[g]);
  Floats total = broadcast(0.0f);
  for (int i = 0; i < n; i += 16) {
    Floats weight = exp2Of(load(logits + i) - base);
    if (keys.is_sink && p.sink_scale != nullptr && first + i == 0) {
      store(logits, weight);
      logits[0] *= p.sink_scale[head];
      weight = load(logits);
    }
    total = total + weight;
    if (has_scale) weight = weight * load(work.value_scale + i);
    store(logits + i, weight);
  }
  sums.sums[g] += sum(total);
}

// Attends over one piece. unit: of [B * Hkv], head: the first query head.
template <typename Row>
void attendKeys(const SinkAttentionParams& p, const StepKeys& keys, const StepWork& work, const StepSums& sums,
                int64_t unit, int64_t head, const void* all_keys, const void* all_values) {
  using Element = typename Row::Element;
  const int64_t group = p.num_q_heads / p.num_kv_heads, rows = keys.is_sink ? p.num_sinks : p.window_size;
  const int64_t padded_k = (p.head_dim + 15) / 16 * 16, padded_v = (p.value_dim + 15) / 16 * 16;
  for (int64_t first = keys.begin; first < keys.end; first += kStepBlock) {
    const int n = static_cast<int>(keys.end - first < kStepBlock ? keys.end - first : kStepBlock);
    const int64_t row = unit * rows + first;
    const Element* k = static_cast<const Element*>(all_keys) + row * p.head_dim;
    const Element* v = static_cast<const Element*>(all_values) + row * p.value_dim;
    if (Row::kHasScale) {
      for (int i = 0; i < n; i += 16) {
        store(work.key_scale + i, loadHalfPart(p.window_k_scale + row + i, n - i));
        store(work.value_scale + i, loadHalfPart(p.window_v_scale + row + i, n - i));
      }
    }
    for (int64_t g = 0; g < group;) {
      const float* q = keys.q + g * padded_k;
      float* logits = work.logits + g * kStepBlock;
      float* out = sums.out + g * padded_v;
      const int64_t left = group - g, now = left >= 4 ? 4 : left;
      if (now == 4) findLogits<Row, 4>(k, n, p.head_dim, q, logits);
      if (now == 3) findLogits<Row, 3>(k, n, p.head_dim, q, logits);
      if (now == 2) findLogits<Row, 2>(k, n, p.head_dim, q, logits);
      if (now == 1) findLogits<Row, 1>(k, n, p.head_dim, q, logits);
      for (int64_t i = g; i < g + now; ++i) {
        weigh(p, keys, work, sums, i, head + i, first, n, Row::kHasScale);
      }
      if (now == 4) addAllValues<Row, 4>(v, n, p.value_dim, logits, out);
      if (now == 3) addAllValues<Row, 3>(v, n, p.value_dim, logits, out);
      if (now == 2) addAllValues<Row, 2>(v, n, p.value_dim, logits, out);
      if (now == 1) addAllValues<Row, 1>(v, n, p.value_dim, logits, out);
      g += now;
    }
  }
}

// Turns a unit's queries and, where it `writes`, writes the new token's row. angles: the stream's.
inline void beginUnit(const SinkAttentionParams& p, const StreamCache& cache, const StepWork& work,
                      const Angles& angles, int64_t b, int64_t kv_head, bool writes) {
  const int64_t t = cache.position, group = p.num_q_heads / p.num_kv_heads;
  const int64_t padded = (p.head_dim + 15) / 16 * 16;
  const float factor = logitFactor(p);
  const float of_row = rowFactor(p, false, b, 0);
  for (int64_t g = 0; g < group; ++g) {
    const float* q = normalisedQuery(p, b, kv_head * group + g, 0, of_row, work.normed);
    float *to = work.q + g * padded, *to_sink = work.sink_q + g * padded;
    turnQuery(p, q, angles, factor, to, to_sink, p.num_sinks > 0);
    for (int64_t i = p.head_dim; i < padded; ++i) to[i] = to_sink[i] = 0.0f;
  }
  if (!writes) return;
  const int64_t unit = b * p.num_kv_heads + kv_head;
  const float* k = normalisedKey(p, b, kv_head, 0, work.normed);
  turn(k, work.row, p.head_dim, angles.half, p.interleaved, angles.cosine, angles.sine, 1.0f);
  const float* v = normalisedValue(p, b, kv_head, 0, work.normed);
  if (t < p.num_sinks) {
    std::memcpy(p.sink_k + (unit * p.num_sinks + t) * p.head_dim, work.row, p.head_dim * sizeof(float));
    std::memcpy(p.sink_v + (unit * p.num_sinks + t) * p.value_dim, v, p.value_dim * sizeof(float));
  } else {
    const int64_t slot = unit * p.window_size + (t - p.num_sinks) % p.window_size;
    storeRow(p.window_type, work.row, p.head_dim, p.window_k, p.window_k_scale, slot);
    storeRow(p.window_type, v, p.value_dim, p.window_v, p.window_v_scale, slot);
  }
}

// Rows begin .. end - 1 of a unit's cache, sinks first, then slots of the window.
inline void attendUnit(const SinkAttentionParams& p, const StreamCache& cache, const StepWork& work,
                       const Angles& angles, const StepSums& sums, int64_t b, int64_t kv_head, int64_t begin,
                       int64_t end) {
  const int64_t group = p.num_q_heads / p.num_kv_heads, unit = b * p.num_kv_heads + kv_head, t = cache.position;
  const bool new_sink = t < p.num_sinks;
  const int64_t sinks = cache.num_sinks + (new_sink ? 1 : 0);
  const int64_t slot = new_sink ? -1 : (t - p.num_sinks) % p.window_size;
  const int64_t own = new_sink ? t : sinks + slot;
  beginUnit(p, cache, work, angles, b, kv_head, !p.reads_only && begin <= own && own < end);
  for (int64_t g = 0; g < group; ++g) sums.largest[g] = kNoLogit, sums.sums[g] = 0.0f;
  const int64_t padded = (p.value_dim + 15) / 16 * 16;
  for (int64_t i = 0; i < group * padded; i += 16) store(sums.out + i, broadcast(0.0f));
  if (begin < sinks) {
    const int64_t last_place = int64_t{p.num_sinks} + p.window_size - 1;
    const StepKeys keys{work.sink_q, begin, end < sinks ? end : sinks, true, t < last_place ? t : last_place};
    attendKeys<FloatRow>(p, keys, work, sums, unit, kv_head * group, p.sink_k, p.sink_v);
  }
  if (end > sinks) {
    const StepKeys keys{work.q, begin > sinks ? begin - sinks : 0, end - sinks, false, slot};
    if (p.window_type == WindowType::kFloat32) {
      attendKeys<FloatRow>(p, keys, work, sums, unit, kv_head * group, p.window_k, p.window_v);
    } else if (p.window_type == WindowType::kFloat16) {
      attendKeys<HalfRow>(p, keys, work, sums, unit, kv_head * group, p.window_k, p.window_v);
    } else {
      attendKeys<Int8Row>(p, keys, work, sums, unit, kv_head * group, p.window_k, p.window_v);
    }
  }
}

inline StepSums sumsAt(const SinkAttentionParams& p, float* memory) {
  const int64_t group = p.num_q_heads / p.num_kv_heads, aligned = (group + 15) / 16 * 16;
  return {memory, memory + aligned, memory + 2 * aligned};
}

inline void finishUnit(const SinkAttentionParams& p, const StepSums& sums, int64_t b, int64_t kv_head) {
  const int64_t group = p.num_q_heads / p.num_kv_heads, padded = (p.value_dim + 15) / 16 * 16;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    const float factor = normaliser(sums.largest[g], sums.sums[g], p.sink_logit, head);
    writeOut(p, b, head, 0, sums.out + g * padded, 1, factor);
  }
}

// Adds the sums of a part of a unit to those of another.
inline void addSums(const SinkAttentionParams& p, const StepSums& to, const StepSums& from) {
  const int64_t group = p.num_q_heads / p.num_kv_heads, padded = (p.value_dim + 15) / 16 * 16;
  for (int64_t g = 0; g < group; ++g) {
    const float base = to.largest[g] > from.largest[g] ? to.largest[g] : from.largest[g];
    const float mine = exp2Of(to.largest[g] - base), others = exp2Of(from.largest[g] - base);
    to.largest[g] = base;
    to.sums[g] = to.sums[g] * mine + from.sums[g] * others;
    for (int64_t d = g * padded; d < (g + 1) * padded; d += 16) {
      store(to.out + d, fma(load(from.out + d), broadcast(others), load(to.out + d) * broadcast(mine)));
    }
  }
}

// If all parts of the unit that begins at key `start` have ended, adds them in order and writes the output.
inline void mergeParts(const SinkAttentionParams& p, const StepPlan& plan, int64_t start, int64_t end, int64_t b,
                       int64_t kv_head) {
  int first = 0, parts = 0;
  while (plan.bounds[first + 1] <= start) ++first;
  for (int w = first; w < plan.workers && plan.bounds[w] < end; ++w) parts += plan.bounds[w] < plan.bounds[w + 1];
  if (__atomic_add_fetch(&plan.ended[first], 1, __ATOMIC_ACQ_REL) != parts) return;
  const StepSums all = sumsAt(p, plan.work[first].sums[1]);
  for (int w = first + 1; w < plan.workers && plan.bounds[w] < end; ++w) {
    if (plan.bounds[w] < plan.bounds[w + 1]) addSums(p, all, sumsAt(p, plan.work[w].sums[0]));
  }
  finishUnit(p, all, b, kv_head);
}

inline void stepWorker(const SinkAttentionParams& p, const StepPlan& plan, int worker) {
  const int64_t begin = plan.bounds[worker], end = plan.bounds[worker + 1];
  const StepWork& work = plan.work[worker];
  Angles angles{work.cos, work.sin, work.sink_cos, work.sink_sin, work.shift_cos, work.shift_sin};
  for (int64_t b = 0, at = begin; b < p.batch && at < end; ++b) {
    if (at < plan.stream_start[b + 1]) findAngles(p, b, 0, plan.streams[b].position, p.num_sinks > 0, angles);
    const int64_t start = plan.stream_start[b], keys = (plan.stream_start[b + 1] - start) / p.num_kv_heads;
    while (at < end && at < plan.stream_start[b + 1]) {
      const int64_t kv_head = (at - start) / keys, unit_start = start + kv_head * keys, unit_end = unit_start + keys;
      const int64_t stop = end < unit_end ? end : unit_end;
      const StepSums sums = sumsAt(p, work.sums[unit_start < begin ? 0 : 1]);
      attendUnit(p, plan.streams[b], work, angles, sums, b, kv_head, at - unit_start, stop - unit_start);
      if (at == unit_start && stop == unit_end) {
        finishUnit(p, sums, b, kv_head);
      } else {
        mergeParts(p, plan, unit_start, unit_end, b, kv_head);
      }
      at = stop;
    }
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
