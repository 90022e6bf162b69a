// What benchmarks have in common: a clock, memory with small numbers in it, and the speed at which it is read.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"

namespace sinkexport::cpu::bench {

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Aligned {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Aligned>;

// Bytes that mean small finite numbers in every format.
inline Memory filled(size_t bytes) {
  bytes = (bytes + 4095) / 4096 * 4096;
  Memory memory(static_cast<char*>(std::aligned_alloc(4096, bytes)));
  uint32_t state = 1;
  for (size_t i = 0; i < bytes / 4; ++i) {
    state = state * 1664525u + 1013904223u;
    const uint32_t word = (state & 0x0f7f0f7fu) | 0x20002000u;
    std::memcpy(memory.get() + 4 * i, &word, 4);
  }
  return memory;
}

// Reads `bytes`, a multiple of 64, and does next to nothing with them.
inline uint64_t sumOf(const char* from, size_t bytes) {
  uint64_t sum[8] = {};
  for (size_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(from + at + 4096);
    for (int lane = 0; lane < 8; ++lane) {
      uint64_t word;
      std::memcpy(&word, from + at + 8 * lane, 8);
      sum[lane] += word;
    }
  }
  return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// GB/s of reading 512 MB by all threads, a piece of 16 MB after another; of each piece the least time.
inline double readSpeed(const Parallel& parallel, int repeats) {
  constexpr size_t kPiece = size_t{16} << 20, kPieces = 32;
  const Memory memory = filled(kPiece * kPieces);
  std::vector<uint64_t> sums(static_cast<size_t>(parallel.threads) * 8);
  std::vector<double> best(kPieces, 1e9);
  for (size_t i = 0; i < static_cast<size_t>(repeats) * kPieces; ++i) {
    const double start = now();
    parallelFor(parallel, parallel.threads, [&](int64_t task) {
      const size_t share = kPiece / 64 / static_cast<size_t>(parallel.threads) * 64;
      const char* from = memory.get() + kPiece * (i % kPieces) + share * static_cast<size_t>(task);
      sums[static_cast<size_t>(task) * 8] += sumOf(from, share);
    });
    best[i % kPieces] = std::min(best[i % kPieces], now() - start);
  }
  double sum = 0;
  for (double one : best) sum += one;
  return kPiece * kPieces / sum / 1e9;
}

}  // namespace sinkexport::cpu::bench
