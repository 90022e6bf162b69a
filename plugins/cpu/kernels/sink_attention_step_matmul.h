// Matmuls of a step: up to four query heads share one reading of keys and values, as they are stored.
#pragma once

#include "sink_attention_softmax.h"

namespace sinkexport::cpu::SINKEXPORT_ISA {

// Keys whose sums with H heads fill 16 lanes, and how many of them are multiplied at a time.
template <int H>
struct KeyTile {
  static constexpr int kKeys = H == 1 ? 16 : H == 2 ? 8 : 4;
  static constexpr int kAtOnce = kRegisters >= 32 ? (H == 1 ? 8 : 4) : (H == 1 ? 4 : H == 2 ? 2 : 1);
};

template <typename Element>
SINKEXPORT_INLINE void prefetchRow(const Element* row, int dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < static_cast<int64_t>(dim * sizeof(Element)); at += 64) prefetchOnce(bytes + at + kAhead);
}

// Logits of H heads and n keys. keys: [n, dim]; q: [H][dim padded], zeros behind; logits: [H][kStepBlock].
template <typename Row, int H>
void findLogits(const typename Row::Element* keys, int n, int dim, const float* q, float* logits) {
  constexpr int kKeys = KeyTile<H>::kKeys, kAtOnce = KeyTile<H>::kAtOnce;
  const int64_t padded = (dim + 15) / 16 * 16;
  const int whole = dim / 16 * 16;
  for (int first = 0; first < n; first += kKeys) {
    Floats sums[16];
    for (int i = kKeys * H; i < 16; ++i) sums[i] = broadcast(0.0f);
    for (int part = 0; part < kKeys; part += kAtOnce) {
      const typename Row::Element* rows[kAtOnce];
      Floats found[kAtOnce][H];
#pragma GCC unroll 16
      for (int k = 0; k < kAtOnce; ++k) {
        const int key = first + part + k;
        rows[k] = keys + static_cast<int64_t>(key < n ? key : n - 1) * dim;  // a key that is not there is not used
        prefetchRow(rows[k], dim);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) found[k][h] = broadcast(0.0f);
      }
      for (int d = 0; d < whole; d += 16) {
        Floats query[H];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) query[h] = load(q + h * padded + d);
#pragma GCC unroll 16
        for (int k = 0; k < kAtOnce; ++k) {
          const Floats row = Row::read(rows[k] + d);
#pragma GCC unroll 4
          for (int h = 0; h < H; ++h) found[k][h] = fma(row, query[h], found[k][h]);
        }
      }
      if (whole < dim) {
#pragma GCC unroll 16
        for (int k = 0; k < kAtOnce; ++k) {
          const Floats row = Row::readPart(rows[k] + whole, dim - whole);
#pragma GCC unroll 4
          for (int h = 0; h < H; ++h) found[k][h] = fma(row, load(q + h * padded + whole), found[k][h]);
        }
      }
#pragma GCC unroll 16
      for (int k = 0; k < kAtOnce; ++k) {
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) sums[h * kKeys + part + k] = found[k][h];
      }
    }
    float lanes[16];
    store(lanes, sumEach(sums));
    for (int h = 0; h < H; ++h) std::memcpy(logits + h * kStepBlock + first, lanes + h * kKeys, kKeys * sizeof(float));
  }
}

// Adds to V vectors of the sums of H heads the values of n keys, each times its weight. kPart: of the only vector the
// first `size` lanes are there.
template <typename Row, int H, int V, bool kPart>
void addValues(const typename Row::Element* values, int n, int dim, int size, const float* weights, float* sums,
               int64_t padded) {
  Floats found[H][V];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) found[h][v] = load(sums + h * padded + 16 * v);
  }
  for (int k = 0; k < n; ++k) {
    Floats row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const typename Row::Element* from = values + static_cast<int64_t>(k) * dim + 16 * v;
      if (v * 16 * sizeof *from % 64 == 0) prefetchOnce(reinterpret_cast<const char*>(from) + kAhead);
      row[v] = kPart ? Row::readPart(from, size) : Row::read(from);
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const Floats weight = broadcast(weights[h * kStepBlock + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) found[h][v] = fma(row[v], weight, found[h][v]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(sums + h * padded + 16 * v, found[h][v]);
  }
}

template <typename Row, int H>
void addAllValues(const typename Row::Element* values, int n, int dim, const float* weights, float* sums) {
  constexpr int kMost = kRegisters >= 32 ? 4 : 1;
  const int64_t padded = (dim + 15) / 16 * 16;
  int d = 0;
  for (; d + 16 * kMost <= dim; d += 16 * kMost) {
    addValues<Row, H, kMost, false>(values + d, n, dim, 16, weights, sums + d, padded);
  }
  for (; d + 32 <= dim; d += 32) {
    addValues<Row, H, kMost == 1 ? 1 : 2, false>(values + d, n, dim, 16, weights, sums + d, padded);
    if (kMost == 1) addValues<Row, H, 1, false>(values + d + 16, n, dim, 16, weights, sums + d + 16, padded);
  }
  for (; d + 16 <= dim; d += 16) addValues<Row, H, 1, false>(values + d, n, dim, 16, weights, sums + d, padded);
  if (d < dim) addValues<Row, H, 1, true>(values + d, n, dim, dim - d, weights, sums + d, padded);
}

}  // namespace sinkexport::cpu::SINKEXPORT_ISA
