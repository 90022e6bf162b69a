// Matmuls of a chunk: 16 rows (token, query head) lie in the lanes of a vector, keys and values are broadcast from
// where they are stored, so that nothing of the cache is turned.
#pragma once

#include "sink_attention_softmax.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

constexpr int kMaxTileVectors = kRegisters >= 32 ? 3 : 1;

// float32 operands. One step of a sum takes one number of each.
struct FloatMatmul {
  static constexpr int kTogether = 1;  // numbers that are multiplied at once
  using Lanes = Floats;
  static SINKEXPORT_INLINE Lanes lanes(const void* from, int64_t index) {
    return load(static_cast<const float*>(from) + 16 * index);
  }
  static SINKEXPORT_INLINE Lanes same(const void* from, int64_t index) {
    return broadcast(static_cast<const float*>(from)[index]);
  }
  static SINKEXPORT_INLINE Floats multiplyAdd(Lanes a, Lanes b, Floats sum) { return fma(a, b, sum); }
};

#ifdef SINKEXPORT_BF16
// Pairs of bfloat16, sums in float32.
struct Bf16Matmul {
  static constexpr int kTogether = 2;
  using Lanes = Bytes;
  static SINKEXPORT_INLINE Lanes lanes(const void* from, int64_t index) {
    return loadBytes(static_cast<const char*>(from) + 64 * index);
  }
  static SINKEXPORT_INLINE Lanes same(const void* from, int64_t index) {
    return broadcastPair(static_cast<const char*>(from) + 4 * index);
  }
  static SINKEXPORT_INLINE Floats multiplyAdd(Lanes a, Lanes b, Floats sum) { return dotBf16(sum, a, b); }
};
#endif

// N sums of V vectors of rows: found[n] = sum over i of rows[i] * factors[n * across + i * along]. rows: [count][V].
template <typename Matmul, int V, int N>
SINKEXPORT_INLINE void multiply(const void* rows, const void* factors, int64_t across, int64_t along, int count,
                                Floats (&found)[N][V]) {
  for (int i = 0; i < count; ++i) {
    typename Matmul::Lanes row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = Matmul::lanes(rows, int64_t{i} * V + v);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const typename Matmul::Lanes factor = Matmul::same(factors, n * across + i * along);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) found[n][v] = Matmul::multiplyAdd(row[v], factor, found[n][v]);
    }
  }
}

template <typename Matmul, int V, int N>
SINKEXPORT_INLINE void logitsOfKeys(const void* q, const char* keys, int64_t key_steps, int steps, float* logits,
                                    Floats (&peaks)[V]) {
  Floats found[N][V];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) found[n][v] = broadcast(0.0f);
  }
  multiply<Matmul, V, N>(q, keys, key_steps, 1, steps, found);
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store(logits + (n * V + v) * 16, found[n][v]);
      peaks[v] = max(peaks[v], found[n][v]);
    }
  }
}

// Rows that will be wanted soon, one for each key; null: none.
struct Ahead {
  const char *k, *v;
  int64_t k_bytes, v_bytes;  // of a row
};

// logits [n][V * 16] of n keys, [n][dim] of Matmul's type, and q [dim][V * 16]; their largest in `peaks`.
template <typename Matmul, int V>
void tileLogits(const void* q, const void* keys, int n, int dim, const Ahead& ahead, float* logits,
                Floats (&peaks)[V]) {
  constexpr int kKeys = kRegisters >= 32 ? 8 : 4;
  const int steps = dim / Matmul::kTogether;
  const char* from = static_cast<const char*>(keys);
  int key = 0;
  for (; key + kKeys <= n; key += kKeys) {
    for (int64_t at = 0; at < kKeys * ahead.k_bytes; at += 64) prefetch(ahead.k + key * ahead.k_bytes + at);
    for (int64_t at = 0; at < kKeys * ahead.v_bytes; at += 64) prefetch(ahead.v + key * ahead.v_bytes + at);
    logitsOfKeys<Matmul, V, kKeys>(q, from + int64_t{4} * key * steps, steps, steps, logits + key * V * 16, peaks);
  }
  for (; key < n; ++key) {
    logitsOfKeys<Matmul, V, 1>(q, from + int64_t{4} * key * steps, steps, steps, logits + key * V * 16, peaks);
  }
}

// out [dim][V * 16] = out * shrink + weights [n][V * 16] times values [n][dim], n a multiple of Matmul::kTogether.
template <typename Matmul, int V>
void tileOut(const void* weights, const void* values, int n, int dim, const Floats (&shrink)[V], float* out) {
  constexpr int kDims = kRegisters >= 32 ? 8 : 4;
  for (int d = 0; d < dim; d += kDims) {
    Floats found[kDims][V];
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) found[i][v] = load(out + ((d + i) * V + v) * 16) * shrink[v];
    }
    multiply<Matmul, V, kDims>(weights, static_cast<const char*>(values) + 4 * d, 1, dim, n / Matmul::kTogether, found);
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(out + ((d + i) * V + v) * 16, found[i][v]);
    }
  }
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
